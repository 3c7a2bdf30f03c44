"""Logs: one JSON object a line, written by a thread of its own, without keys."""

import json
import logging
import logging.handlers
import queue
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["JsonLines", "logging_to"]

# Whatever looks like a key: of this gateway, of the usual services, or behind the word Bearer.
_KEY = re.compile(r"\b(dk-[a-z2-7]+-|sk-|Bearer\s+)[\w\-.~+/=]{8,}")


class JsonLines(logging.Formatter):
    """{"time", "level", "logger", "message"}, and "error" with the traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return _KEY.sub(r"\1***", json.dumps(line))


@contextmanager
def logging_to(stream: TextIO = sys.stderr, level: str = "info") -> Iterator[None]:
    """While this lasts, everything logged goes to a stream as JSON lines; a slow terminal holds up nobody but the log."""
    lines: queue.SimpleQueue = queue.SimpleQueue()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    listener = logging.handlers.QueueListener(lines, handler)
    sender = _Sender(lines)
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    root.handlers[:] = [sender]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    listener.start()
    try:
        yield
    finally:
        listener.stop()
        logging.captureWarnings(False)
        root.setLevel(before[0])
        root.handlers[:] = before[1]


class _Sender(logging.handlers.QueueHandler):
    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        # The listener is in the same process: the record goes as it is, and is made a text there.
        return record
