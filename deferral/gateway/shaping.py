"""What an expert is sent: a client's request, with the name that the model has there, and in fields that it knows."""

import json

from deferral.gateway.experts_file import Expert
from deferral.gateway.requests import with_model

__all__ = ["shaped"]


def shaped(body: bytes, expert: Expert) -> bytes:
    """The body of a parsed request as this expert takes it.

    Only the model's name is another, every other byte as it was; unless the experts file renames fields of the request, drops
    some, or has values for those that are not there, in this order.
    """
    sent = with_model(body, expert.model)
    if not (expert.rename or expert.drop or expert.defaults):
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
        # A number beyond all bounds, or lists in lists without end: whoever is asked may say what is wrong with it.
        return sent
