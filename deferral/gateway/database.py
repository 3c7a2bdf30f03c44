"""The tables of the gateway, and a database to hold them.  What only SQLite understands is in this file."""
