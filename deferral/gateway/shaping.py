"""What an expert is sent: a client's request, with the name that the model has there, and a chat in fields that it knows."""

import json

from deferral.gateway.experts_file import Expert
from deferral.gateway.problems import Problem
from deferral.gateway.requests import Kind, with_model

__all__ = ["shaped"]


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
