"""Files that are there whole or not at all, also after a crash, and those that one process alone may write."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from deferral.errors import DataError

__all__ = ["PARTIAL", "claim", "written_whole"]

# Formatted with the name of the file, the id of the process, and random digits.
PARTIAL = ".{}.{}.{}.partial"


@contextmanager
def written_whole(path: Path, *, private: bool = False) -> Iterator[Path]:
    """A path to write to: what is there at the end takes the place of this one; where writing fails nothing is left.

    A link leads where it led.  A file that is replaced can be read by those who could read it; a new one, where it is `private`,
    by its owner alone.
    """
    try:
        path = path.resolve()
    except (RuntimeError, OSError) as error:
        raise DataError(f"{path}: a link that leads nowhere, {error}") from None
    partial = path.with_name(PARTIAL.format(path.name, os.getpid(), secrets.token_hex(4)))
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if private or mode is not None else 0o666))
    try:
        yield partial
        if mode is not None:
            partial.chmod(mode)
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
