"""Files that are there whole or not at all, also after a crash, and those that one process alone may write."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from deferral.errors import DataError

__all__ = ["PARTIAL", "claim", "written_whole"]

# Name of the file, of the process, and a number.
PARTIAL = ".{}.{}.{}.partial"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside this one to write to: what is there at the end takes its place; where writing fails nothing is left."""
    partial = path.with_name(PARTIAL.format(path.name, os.getpid(), secrets.token_hex(4)))
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def claim(file: BinaryIO, path: Path) -> None:
    """Hold an open file until it is closed; DataError where another process does: each of its rows would be there twice."""
    try:
        import fcntl
    except ModuleNotFoundError:
        # Windows has no such locks.
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{path}: another process is writing it; wait for it, or stop it first") from None
