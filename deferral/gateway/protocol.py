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
# Of the rest of a body, once the server is to end: nobody has been asked yet, and it can be sent to another.
_LAST_UPLOAD_S = 5.0


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP, on a transport that gathers what is written in one turn of the event loop.

    Who connects and says nothing, or a head (or trailers) without an end, is sent away.  A wish to be upgraded, which Java's
    client has with every first request, is not granted, and its request is answered like any other.  A stream to a client of
    HTTP/1.0, which knows no chunks, goes on until the connection ends.  A server that is to end waits for answers, and only a
    moment for requests that have not come in whole.
    """

    # Bytes since the last that were the end of a head, or a part of a body.
    _unfinished = 0
    _running: RequestResponseCycle | None = None
    _ending = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(cast(asyncio.Transport, Gathering(transport, self.loop)))
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, error: Exception | None) -> None:
        """The client is gone: the request that is answered learns of it, and not only the last that was sent."""
        super().connection_lost(error)
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
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def shutdown(self) -> None:
        """The server is to end: what is under way is finished."""
        super().shutdown()
        self._ending = True
        self._wait_for_the_rest()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, _without_chunks(app, cycle) if cycle.scope["http_version"] == "1.0" else app)
        if self._ending:
            self._wait_for_the_rest()

    def _wait_for_the_rest(self) -> None:
        running = self._running
        if running is not None and running.more_body and not running.response_complete:
            self.loop.call_later(_LAST_UPLOAD_S, self._too_late, running)

    def _too_late(self, cycle: RequestResponseCycle) -> None:
        if not cycle.more_body or cycle.response_started or self.transport.is_closing():
            return
        message = f"the server ends, and the body did not come within {_LAST_UPLOAD_S:.0f} s; send it again"
        body = error_body(503, "server_ends", message)
        head = b"content-type: application/json\r\ncontent-length: %d\r\nretry-after: 1\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(b"".join([STATUS_LINE[503], head, body]))
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
