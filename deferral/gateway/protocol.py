"""HTTP as clients speak it: what uvicorn leaves open is bounded, and the head of a reply leaves with what follows it."""

import asyncio
from typing import Any, cast

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from deferral.gateway.problems import error_body

__all__ = ["Protocol"]

_AT_ONCE = 1 << 16
_LONGEST_HEAD = 1 << 16
# Nobody ends while a request is under way: who sends half of one must not hold that up.  Nobody has been asked for it yet, so
# that it can be sent again.
_LONGEST_UPLOAD_S, _LAST_UPLOAD_S = 120.0, 5.0


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP, on a transport that gathers what is written in one turn of the event loop.

    Who connects and says nothing, or a head (or trailers) without an end, is sent away.  A wish to be upgraded, which Java's
    client has with every first request, is not granted, and its request is answered like any other.  A stream to a client of
    HTTP/1.0, which knows no chunks, goes on until the connection ends.  Who has sent half of a request has two minutes for the
    rest, or five seconds once the server is to end.
    """

    # Bytes since the last that were the end of a head, or a part of a body.
    _unfinished = 0
    _running: RequestResponseCycle | None = None
    _ending = False
    _upload: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(cast(asyncio.Transport, Gathering(transport, self.loop)))
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, error: Exception | None) -> None:
        """The client is gone: the request that is answered learns of it, and not only the last that was sent."""
        super().connection_lost(error)
        self._wait_no_more()
        running = self._running
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Some bytes of requests."""
        self._unset_keepalive_if_required()
        self._unfinished += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as wish:
            self._not_upgraded(data[wish.args[0] :])
        except httptools.HttpParserError:
            self._refuse("this is no HTTP/1.1")
        else:
            if self._unfinished > _LONGEST_HEAD:
                self._refuse(f"expected a head of at most {_LONGEST_HEAD} bytes")
            self._wait_for_the_rest()

    def on_headers_complete(self) -> None:
        """A request begins, with its headers: what comes as trailers, after checks of whoever is in front, is none of them."""
        self._unfinished = 0
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            self.headers = []

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._unfinished = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a request."""
        self._wait_no_more()
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """The end of a reply; a request that waited for it may begin."""
        super().on_response_complete()
        self._wait_for_the_rest()

    def shutdown(self) -> None:
        """The server is to end: what is under way is finished."""
        super().shutdown()
        self._ending = True
        self._wait_no_more()
        self._wait_for_the_rest()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, _without_chunks(app, cycle) if cycle.scope["http_version"] == "1.0" else app)

    def _wait_for_the_rest(self) -> None:
        """Most requests come whole, and have no use for a timer."""
        running = self._running
        if running is not None and running.more_body and not running.response_started and self._upload is None:
            patience = _LAST_UPLOAD_S if self._ending else _LONGEST_UPLOAD_S
            self._upload = self.loop.call_later(patience, self._too_late, running, patience)

    def _wait_no_more(self) -> None:
        if self._upload is not None:
            self._upload.cancel()
            self._upload = None

    def _too_late(self, cycle: RequestResponseCycle, patience: float) -> None:
        if cycle.response_started or self.transport.is_closing():
            return
        status, code = (503, "server_ends") if self._ending else (408, "request_timeout")
        body = error_body(status, code, f"the body: expected all of it within {patience:.0f} s; send it again")
        head = b"content-type: application/json\r\ncontent-length: %d\r\nretry-after: 1\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(b"".join([STATUS_LINE[status], head, body]))
        self.transport.close()

    def _not_upgraded(self, rest: bytes) -> None:
        """The parser takes what follows the head for another protocol: once more, without the wish."""
        headers = [(name, value) for name, value in self.headers if name != b"upgrade"]
        if len(headers) == len(self.headers):
            self._refuse("CONNECT is not served")
            return
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        head = [b"%b %b HTTP/%b\r\n" % (method, self.url, version), *(b"%b: %b\r\n" % header for header in headers), b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"".join([*head, rest]))

    def _refuse(self, message: str) -> None:
        """An answer, if it is not in the middle of another; then the end."""
        if self.cycle is None or self.cycle.response_complete:
            self.send_400_response(message)
        else:
            self.transport.close()


def _without_chunks(app: ASGIApp, cycle: RequestResponseCycle) -> Any:
    """The app, for a client whose only sign of an end of unknown length is the end of the connection."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        unknown = False

        async def unframed(message: Message) -> None:
            nonlocal unknown
            if message["type"] == "http.response.start":
                unknown = all(name != b"content-length" for name, _ in message["headers"])
                cycle.chunked_encoding = False if unknown else None
            elif unknown:
                # uvicorn takes each part for all that is left.
                cycle.expected_content_length = len(message["body"])
            await send(message)

        await app(scope, receive, unframed)

    return run


class Gathering:
    """A transport whose bytes go out at the end of the turn in which they were written, or when they are 64 KiB."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._call_soon = transport, loop.call_soon
        self._parts: list[bytes] = []
        self._size = 0
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Bytes to be sent soon."""
        if not self._parts:
            self._call_soon(self._flush)
        self._parts.append(data)
        self._size += len(data)
        if self._size > _AT_ONCE:
            self._flush()

    def close(self) -> None:
        """What was written still goes out."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts, self._size = self._parts, [], 0
        if parts and not self.is_closing():
            self._transport.writelines(parts)
