"""Several processes that serve from one socket: begun, watched, replaced when they die, and ended together."""

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from deferral.errors import DataError

__all__ = ["ignore_hangups", "supervise"]

_log = logging.getLogger("deferral.gateway")

# Where it can be, one clean process imports everything once, and each worker is a copy of it.
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_LOOK = 0.2
# Workers that end sooner than this after their start, so many in a row, will not do better the next time; where others stay up
# they are tried again, more seldom: those others serve, and hold what is not written yet.
_TOO_SOON = 10.0
_PATIENCE = 5
_LONGEST_PAUSE = 30.0


def ignore_hangups() -> None:
    """Until there is somebody who reloads at SIGHUP: it would end this process, and those that are begun by it."""
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def supervise(
    serve: Callable[[socket.socket], None],
    listener: socket.socket,
    count: int,
    *,
    ended_one: Callable[[int], None] = lambda process: None,
) -> None:
    """Have `count` processes call `serve` with the socket until SIGTERM or SIGINT; SIGHUP is passed on to all.

    `serve` is a function that can be named, since each process is a new one; it must look whether what it has read has changed,
    once it follows SIGHUP.  `ended_one` is told the id of a process that has ended, before another takes its place.  DataError if
    they cannot stay up.
    """
    ignore_hangups()
    ended, hung_up = threading.Event(), threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: ended.set())
    multiprocessing.set_forkserver_preload(["__main__", "deferral.gateway.serve"])
    running = {_begun(serve, listener): time.monotonic()}
    # Only now: the process that all are copies of was begun with the first, and ignores SIGHUP as this one did.
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: hung_up.set())
    running |= {_begun(serve, listener): time.monotonic() for _ in range(count - 1)}
    failures, begin_at = 0, 0.0
    while not ended.is_set():
        wait([process.sentinel for process in running], _LOOK)
        if hung_up.is_set():
            hung_up.clear()
            _tell(running, signal.SIGHUP)
        if ended.is_set():
            break
        now = time.monotonic()
        for process, began in [(one, since) for one, since in running.items() if not one.is_alive()]:
            del running[process]
            failures = failures + 1 if now - began < _TOO_SOON else 1
            begin_at = now + min(0.1 * 2 ** min(failures, 10), _LONGEST_PAUSE)
            _log.error("worker %s ended with status %s; another takes its place", process.pid, process.exitcode)
            if process.pid is not None:
                ended_one(process.pid)
        if failures >= _PATIENCE and not any(now - began >= _TOO_SOON for began in running.values()):
            break
        while len(running) < count and now >= begin_at:
            running[_begun(serve, listener)] = now
    # Whoever comes now is turned away, and does not wait for nobody.
    listener.close()
    _tell(running, signal.SIGTERM)
    for process in running:
        process.join()
    if not ended.is_set():
        raise DataError(f"{_PATIENCE} workers in a row ended soon after their start; the log has the reason")


def _begun(serve: Callable[[socket.socket], None], listener: socket.socket) -> BaseProcess:
    context: Any = multiprocessing.get_context(_METHOD)
    process: BaseProcess = context.Process(target=_work, args=(serve, listener), name="deferral worker")
    process.start()
    return process


def _work(serve: Callable[[socket.socket], None], listener: socket.socket) -> None:
    ignore_hangups()
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    serve(listener)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _tell(running: dict[BaseProcess, float], what: signal.Signals) -> None:
    for process in running:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, what)
