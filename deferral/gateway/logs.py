"""Logs: one JSON object a line, written by a thread of its own, without keys."""

import json
import logging
import logging.handlers
import queue
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["Ending", "JsonLines", "logging_to"]

_MOST_WAITING, _LAST_S = 10_000, 5.0

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


class Ending:
    """How the log ended.  `stuck`: nobody read it, and the thread that writes it waits for ever; nor would the process end."""

    stuck = False


@contextmanager
def logging_to(stream: TextIO = sys.stderr, level: str = "info") -> Iterator[Ending]:
    """While this lasts, everything logged goes to a stream as JSON lines; a slow terminal holds up nobody but the log.

    Of what nobody reads the newest lines are lost, and counted; at the end it is waited for five seconds.
    """
    lines: queue.Queue = queue.Queue(_MOST_WAITING)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    listener, ending = _Listener(lines, handler), Ending()
    sender = _Sender(lines)
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    root.handlers[:] = [sender]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    listener.start()
    try:
        yield ending
    finally:
        last = threading.Thread(target=listener.stop, name="the last of the log", daemon=True)
        last.start()
        last.join(_LAST_S)
        ending.stuck = last.is_alive()
        logging.captureWarnings(False)
        root.setLevel(before[0])
        root.handlers[:] = before[1]


class _Listener(logging.handlers.QueueListener):
    def enqueue_sentinel(self) -> None:
        # A full queue is waited for: `logging_to` calls this in a thread that it does not wait for without an end.
        self.queue.put(None)  # type: ignore[attr-defined]


class _Sender(logging.handlers.QueueHandler):
    _lost = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
            if self._lost:
                lost, self._lost = self._lost, 0
                logging.getLogger(__name__).warning("%d lines are lost: the log was not read", lost)
        except queue.Full:
            self._lost += 1

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        # The listener is in the same process: the record goes as it is, and is made a text there.
        return record
