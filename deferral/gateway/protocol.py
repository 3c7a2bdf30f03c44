"""How replies leave: the head and what follows it in one system call, which also wakes the client once and not twice."""

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["Protocol"]

_AT_ONCE = 1 << 16


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP, on a transport that gathers what is written in one turn of the event loop."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(cast(asyncio.Transport, Gathering(transport, self.loop)))


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
