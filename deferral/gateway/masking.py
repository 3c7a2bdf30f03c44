"""An expert's key in its own replies, which nobody is to see."""

__all__ = ["MaskedStream", "masked"]

_MASK = b"***"
# Shorter ones are words, such as servers without keys are given.
_SHORTEST = 8


def masked(key: bytes, text: bytes) -> bytes:
    """The text without the key as it is spelled: compressed or escaped it is not found."""
    return text.replace(key, _MASK) if len(key) >= _SHORTEST else text


class MaskedStream:
    """The same for a text that comes in parts.  What may be the beginning of the key waits for what follows it."""

    def __init__(self, key: bytes) -> None:
        self._key = key if len(key) >= _SHORTEST else b""
        self.held = b""

    def part(self, part: bytes) -> bytes:
        """What of it can go on; `held` is what cannot, and goes on when nothing follows."""
        key = self._key
        if not key:
            return part
        if self.held:
            part, self.held = self.held + part, b""
        part = part.replace(key, _MASK)
        # No key holds a line end, and nearly every part of a stream of events ends with one.
        if part.endswith(b"\n"):
            return part
        place = max(len(part) - len(key) + 1, 0)
        while (place := part.find(key[:1], place)) >= 0:
            if key.startswith(part[place:]):
                part, self.held = part[:place], part[place:]
                break
            place += 1
        return part
