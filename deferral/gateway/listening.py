"""The address that a gateway is reached at."""

import errno
import socket

from deferral.errors import DataError

__all__ = ["BACKLOG", "listening"]

BACKLOG = 4096


def listening(host: str, port: int) -> socket.socket:
    """A socket that takes connections at an address; they wait until somebody serves them.

    DataError names the address where it is not to be had, and says what to do.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise DataError(f"{host}: expected an address of this machine, or a name of one; {_reason(error)}") from error
    made = socket.socket(family)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise DataError(f"{host}:{port}: {_advice(error, port)}") from error
    made.setblocking(False)
    return made


def _advice(error: OSError, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken by another process; end that one, or choose another with --port"
    if error.errno == errno.EACCES:
        return f"port {port} needs more rights than this process has; choose one above 1023 with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine does not have the address; choose one that it has with --host"
    return f"cannot be bound, {_reason(error)}"


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
