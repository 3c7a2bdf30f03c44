"""HTTP as clients speak it: what uvicorn leaves open is bounded."""

import asyncio
from typing import Any, cast

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from deferral.gateway.gathering import Gathering
from deferral.gateway.problems import error_body

__all__ = ["Protocol"]

_LONGEST_HEAD = 1 << 16
_TOO_LONG = f"expected a head of at most {_LONGEST_HEAD} bytes"
# Requests that wait for the reply to another on their connection; one read may bring thousands.
_MOST_AHEAD = 100
# Nobody ends while a request is under way: who sends half of one must not hold that up.  Nobody has been asked for it yet, so
# that it can be sent again.
_LONGEST_UPLOAD_S, _LAST_UPLOAD_S = 120.0, 5.0


class _LongHead(Exception):
    """A head that has ended, and is too long."""


class _TooManyAhead(Exception):
    """Requests that were sent before the replies to others came."""


_REFUSED: dict[type | None, str] = {
    _LongHead: _TOO_LONG,
    _TooManyAhead: f"expected at most {_MOST_AHEAD} requests ahead of their replies",
}


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP, on a transport that gathers what is written in one turn of the event loop.

    Who connects and says nothing, or a head (or trailers) without an end, is sent away.  A wish to be upgraded, which Java's
    client has with every first request, is not granted, and its request is answered like any other.  A stream to a client of
    HTTP/1.0, which knows no chunks, goes on until the connection ends.  Who has sent half of a request, were it one byte, has two
    minutes for the rest, or five seconds once the server is to end.  Who takes nothing of a reply for a minute loses the rest.
    Nothing more is read while requests wait for the replies to others, and of these there may be a hundred.
    """

    # Bytes since the last that were the end of a head, or a part of a body; and how many a head can have that ends now.
    _unfinished = _most = 0
    # Of a body, in the bytes that came together.
    _parts: list[bytes]
    # A request has begun to come, and has not come to its end.
    _partial = False
    _running: RequestResponseCycle | None = None
    _ending = False
    _upload: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        self._gathering, self._parts = Gathering(transport, self.loop), []
        super().connection_made(cast(asyncio.Transport, self._gathering))
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, error: Exception | None) -> None:
        """The client is gone: the request that is answered learns of it, and not only the last that was sent."""
        super().connection_lost(error)
        self._wait_no_more()
        self._gathering.wait_no_more()
        running = self._running
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Some bytes of requests."""
        self._most = self._unfinished = self._unfinished + len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as wish:
            self._not_upgraded(data[wish.args[0] :])
        except httptools.HttpParserError as error:
            self._refuse(_REFUSED.get(type(error.__context__), "this is no HTTP/1.1"))
        else:
            if self._unfinished > _LONGEST_HEAD:
                self._refuse(_TOO_LONG)
            self._pass_on_parts()
            self._wait_for_the_rest()

    def on_message_begin(self) -> None:
        """The first byte of a request: from now on it is the rest of it that is waited for."""
        self._unset_keepalive_if_required()
        self._partial = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A request begins, with its headers: what comes as trailers, after checks of whoever is in front, is none of them."""
        if self._most > _LONGEST_HEAD and self._head_size() > _LONGEST_HEAD:
            raise _LongHead
        self._unfinished = 0
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            self.headers = []
            if len(self.pipeline) > _MOST_AHEAD:
                raise _TooManyAhead
            if self._ending:
                self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """A part of a body: uvicorn would copy all that came before it, for every chunk of a byte."""
        self._unfinished = 0
        self._parts.append(body)

    def on_message_complete(self) -> None:
        """The end of a request."""
        self._pass_on_parts()
        self._partial = False
        self._wait_no_more()
        if not self.parser.should_upgrade():
            super().on_message_complete()
            if self.cycle.response_complete:
                # It was refused before all of it had come; uvicorn looks at it no more.
                self.cycle.more_body = False
                self._unset_keepalive_if_required()
                self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def on_response_complete(self) -> None:
        """The end of a reply; a request that waited for it may begin, and half of one is waited for."""
        super().on_response_complete()
        if self.pipeline:
            # uvicorn reads on after every reply, and so takes in more than it answers.
            self.flow.pause_reading()
        self._wait_for_the_rest()

    def pause_writing(self) -> None:
        """Much is unsent: the client has to take some of it."""
        super().pause_writing()
        self._gathering.wait_for_the_reader()

    def resume_writing(self) -> None:
        """The client has taken enough."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._gathering.wait_no_more()

    def shutdown(self) -> None:
        """The server is to end: what is under way is finished."""
        self._ending = True
        self._wait_no_more()
        if self._partial and (self.cycle is None or (self.cycle.response_complete and not self.cycle.more_body)):
            # Of half a head uvicorn knows nothing, and would close the door on it.
            self._unset_keepalive_if_required()
        else:
            super().shutdown()
        self._wait_for_the_rest()

    def _head_size(self) -> int:
        """Of the head that has ended, but for the spaces around its values."""
        first = b"%b %b HTTP/1.1\r\n" % (self.parser.get_method(), self.url)
        return len(first) + sum(len(name) + len(value) + len(b": \r\n") for name, value in self.headers) + len(b"\r\n")

    def _pass_on_parts(self) -> None:
        if self._parts:
            body, self._parts = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts), []
            super().on_body(body)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, _without_chunks(app, cycle) if cycle.scope["http_version"] == "1.0" else app)

    def _wait_for_the_rest(self) -> None:
        """Most requests come whole, and have no use for a timer."""
        if not self._partial or self._replying():
            return
        self._unset_keepalive_if_required()
        if self._upload is None:
            patience = _LAST_UPLOAD_S if self._ending else _LONGEST_UPLOAD_S
            self._upload = self.loop.call_later(patience, self._too_late, patience)

    def _replying(self) -> bool:
        """Whether the client waits for a reply, or gets one: the end of that will look for the rest of a request again."""
        running = self._running
        return running is not None and not running.response_complete and (running.response_started or not running.more_body)

    def _wait_no_more(self) -> None:
        if self._upload is not None:
            self._upload.cancel()
            self._upload = None

    def _too_late(self, patience: float) -> None:
        self._upload = None
        if self._replying() or self.transport.is_closing():
            return
        running = self._running
        if running is not None and running.more_body and running.response_complete:
            # It was refused before all of it had come.
            self.transport.close()
            return
        status, code = (503, "server_ends") if self._ending else (408, "request_timeout")
        body = error_body(status, code, f"the request: expected all of it within {patience:.0f} s; send it again")
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
