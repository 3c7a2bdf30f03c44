"""An OpenAI-compatible server around a router: small models answer what they can, experts the rest, all of it on record."""
