"""A transport for the replies of a server: few system calls, and no client that never reads."""

import asyncio
import logging
import sys
from contextlib import suppress
from typing import Any

if sys.platform == "linux":
    from fcntl import ioctl
    from termios import TIOCOUTQ

__all__ = ["Gathering"]

_log = logging.getLogger("deferral.gateway")

_AT_ONCE = 1 << 16
# In these versions `writelines` ignores the high-water mark: nobody is told to stop writing (CVE-2024-12254).
_WRITES_TOO_MUCH = (3, 12) <= sys.version_info < (3, 12, 9) or (3, 13) <= sys.version_info < (3, 13, 2)
# A client that takes nothing of its reply for so long does not read.
_LONGEST_PAUSE_S = 60.0


class Gathering:
    """A transport whose bytes go out at the end of the turn in which they were written, or when they are 64 KiB.

    Once asked to `wait_for_the_reader`, or closed with bytes unsent, it ends when the client takes nothing for a minute.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._call_soon, self._call_later = transport, loop.call_soon, loop.call_later
        self._parts: list[bytes] = []
        self._size = 0
        self._reader: asyncio.TimerHandle | None = None
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Bytes to be sent soon."""
        if not data:
            # From Python 3.12 on asyncio never comes to the end of a list that ends with nothing.
            return
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
        if self._transport.get_write_buffer_size():
            self.wait_for_the_reader()

    def wait_for_the_reader(self) -> None:
        """From now on the client has to take some of what is unsent, every minute."""
        if self._reader is None:
            self._look_again()

    def wait_no_more(self) -> None:
        """The client has taken enough, or is gone."""
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None

    def _look_again(self) -> None:
        self._reader = self._call_later(_LONGEST_PAUSE_S, self._look, self._unread())

    def _look(self, unread: int) -> None:
        if self._unread() < unread:
            self._look_again()
        else:
            _log.info("a client took nothing of its reply for %.0f s: it does not get the rest", _LONGEST_PAUSE_S)
            self._transport.abort()

    def _unread(self) -> int:
        """Bytes here and, of megabytes that a slow client takes minutes for, in the system's buffer, where it says."""
        here = self._transport.get_write_buffer_size()
        if sys.platform != "linux":
            return here
        with suppress(OSError, AttributeError):
            return here + int.from_bytes(
                ioctl(self._transport.get_extra_info("socket").fileno(), TIOCOUTQ, bytes(4)), sys.byteorder
            )
        return here

    def _flush(self) -> None:
        parts, self._parts, self._size = self._parts, [], 0
        if not parts or self.is_closing():
            return
        if _WRITES_TOO_MUCH:
            self._transport.write(b"".join(parts))
        else:
            self._transport.writelines(parts)
