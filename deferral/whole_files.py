"""Files that are there whole or not at all, also after a crash."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["PARTIAL", "written_whole"]

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
