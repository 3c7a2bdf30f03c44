"""What an expert is sent: a client's request, with the model's name there, a chat in fields that it knows, and some headers."""

import json
import re
from collections.abc import Mapping

from deferral.gateway.answering import ONCE, once_of
from deferral.gateway.experts_file import Expert
from deferral.gateway.problems import Problem
from deferral.gateway.requests import Asked, Kind, with_model, with_stream_usage
from deferral.gateway.upstream import FORWARDED

__all__ = ["asks_for_usage", "forwarded", "sent_to", "shaped"]

# A header that the upstream connection would not take must not look like a fault of the upstream.
_PLAIN = re.compile(rb"[ -~]*")


def shaped(body: bytes, expert: Expert, kind: Kind = "chat") -> bytes:
    """The body of a parsed request as this expert takes it; Problem 400 where it cannot be made that.

    Only the model's name is another, every other byte as it was; unless it is a chat, and the experts file renames fields, drops
    some, or has values for those that are not there, in this order.
    """
    sent = with_model(body, expert.model)
    if kind != "chat" or not (expert.rename or expert.drop or expert.defaults):
        return sent
    try:
        request = json.loads(sent)
        for old, new in expert.rename.items():
            if old in request:
                value = request.pop(old)
                request.setdefault(new, value)
        for name in expert.drop:
            request.pop(name, None)
        return json.dumps({**expert.defaults, **request}, allow_nan=False).encode()
    except (ValueError, RecursionError):
        message = (
            f"the body: it holds a number beyond all bounds, or lists too deep, and {expert.name} takes requests in another form"
        )
        raise Problem(400, "invalid_json", message) from None


def asks_for_usage(expert: Expert, asked: Asked, kind: Kind) -> bool:
    """Whether a stream is to report what its client does not want to know."""
    return expert.stream_usage and asked.stream and not asked.wants_usage and kind in ("chat", "completions")


def sent_to(expert: Expert, asked: Asked, kind: Kind, body: bytes) -> bytes:
    """The body as this expert takes it, asked for its usage where that is wanted."""
    sent = shaped(body, expert, kind)
    return with_stream_usage(sent, options_there=asked.stream_options) if asks_for_usage(expert, asked, kind) else sent


def forwarded(headers: Mapping[bytes, bytes], key: str) -> dict[str, str]:
    """The headers of a client with this key's id that go on to the expert."""
    found = {name.decode(): value.decode() for name in FORWARDED & headers.keys() if _PLAIN.fullmatch(value := headers[name])}
    if key and (once := found.get(ONCE)):
        # To the expert all clients are one: what two of them name alike must not be one request.
        found[ONCE] = once_of(key, once)
    return found
