"""HTTP as clients speak it: what uvicorn leaves open is bounded, and the head of a reply leaves with what follows it."""

import asyncio
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

__all__ = ["Protocol"]

_AT_ONCE = 1 << 16
_LONGEST_HEAD = 1 << 16


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP, on a transport that gathers what is written in one turn of the event loop.

    Who connects and says nothing, or a head (or trailers) without an end, is sent away.  A wish to be upgraded, which Java's
    client has with every first request, is not granted, and its request is answered like any other.
    """

    # Bytes since the last that were the end of a head, or a part of a body.
    _unfinished = 0
    _running: RequestResponseCycle | None = None

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

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

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
