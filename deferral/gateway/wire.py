"""ASGI by hand: the request path of a proxy has no use for an object per request."""

from collections.abc import Iterable, Mapping

from starlette.types import Receive, Scope, Send

from deferral.gateway.problems import Problem

__all__ = ["Left", "header_map", "read_body", "send_problem", "send_whole"]

_JSON = (b"content-type", b"application/json")


class Left(Exception):
    """The client is gone."""


def header_map(scope: Scope) -> dict[bytes, bytes]:
    """The last of each name."""
    return dict(scope["headers"])


async def read_body(receive: Receive, headers: Mapping[bytes, bytes], most: int) -> bytes:
    """The whole body; Problem 413 where it is longer than `most`, Left where the client is gone."""
    declared = headers.get(b"content-length", b"0")
    if not declared.isdigit() or int(declared[:20]) > most:
        raise _too_long(most)
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Problem(415, "unsupported_encoding", "content-encoding: expected a body that is not compressed")
    if headers.get(b"transfer-encoding", b"chunked").lower() != b"chunked":
        raise Problem(501, "unsupported_encoding", "transfer-encoding: expected chunked alone")
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Left
    body = message.get("body", b"")
    if not message.get("more_body", False):
        if len(body) > most:
            raise _too_long(most)
        return body
    parts, size = [body], len(body)
    while message.get("more_body", False):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Left
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise _too_long(most)
    return b"".join(parts)


async def send_whole(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    """A reply of known length."""
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def send_problem(send: Send, problem: Problem, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """An error in the shape that OpenAI's clients understand."""
    own = [(name.encode(), value.encode("latin-1", "replace")) for name, value in problem.headers.items()]
    await send_whole(send, problem.status, [_JSON, *own, *headers], problem.body)


def _too_long(most: int) -> Problem:
    return Problem(413, "request_too_large", f"the body: expected at most {most} bytes")
