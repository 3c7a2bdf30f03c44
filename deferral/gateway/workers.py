"""Several processes that serve from one socket: begun, watched, replaced when they die, and ended together."""

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from deferral.errors import DataError

__all__ = ["ignore_hangups", "supervise"]

_log = logging.getLogger("deferral.gateway")

# Where it can be, one clean process imports everything once, and each worker is a copy of it.
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
_LOOK = 0.2
# An exit status is there a moment after the end, and never if the fork server is gone.
_STATUS_S = 1.0
# Workers that end sooner than this after their start, so many in a row, will not do better the next time; where others stay up
# they are tried again, more seldom: those others serve, and hold what is not written yet.
_TOO_SOON = 10.0
_PATIENCE = 5
_LONGEST_PAUSE = 30.0


def ignore_hangups() -> None:
    """Until there is somebody who reloads at SIGHUP: it would end this process, and those that are begun by it."""
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


@dataclass(frozen=True)
class _Worker:
    """A process, the other end of a pipe that it holds as long as it lives, and when it began."""

    process: BaseProcess
    held: Connection
    began: float

    @property
    def lives(self) -> bool:
        """By its own word: multiprocessing takes all for dead once the process is that they are copies of."""
        return not self.held.poll()

    @property
    def status(self) -> int | None:
        """How it has ended."""
        self.process.join(_STATUS_S)
        return self.process.exitcode


def supervise(
    serve: Callable[[socket.socket], None],
    listener: socket.socket,
    count: int,
    *,
    ended_one: Callable[[int], None] = lambda process: None,
) -> bool:
    """Have `count` processes call `serve` with the socket until SIGTERM or SIGINT; SIGHUP is passed on to all.

    `serve` is a function that can be named, since each process is a new one; it must look whether what it has read has changed,
    once it follows SIGHUP.  `ended_one` is told the id of a process that has ended, before another takes its place.  DataError if
    they cannot stay up.  -> whether those that were told to end did so with status 0
    """
    ended, hung_up = threading.Event(), threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: ended.set())
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: hung_up.set())
    multiprocessing.set_forkserver_preload(["__main__", "deferral.gateway.serve"])
    running = [_begun(serve, listener) for _ in range(count)]
    failures, begin_at = 0, 0.0
    while not ended.is_set():
        wait([worker.held for worker in running], _LOOK)
        if hung_up.is_set():
            hung_up.clear()
            _tell(running, signal.SIGHUP)
        if ended.is_set():
            break
        now = time.monotonic()
        for worker in [one for one in running if not one.lives]:
            running.remove(worker)
            failures = failures + 1 if now - worker.began < _TOO_SOON else 1
            begin_at = now + min(0.1 * 2 ** min(failures, 10), _LONGEST_PAUSE)
            pid = worker.process.pid
            _log.error("worker %s ended with status %s; another takes its place", pid, worker.status)
            if pid is not None:
                ended_one(pid)
        if failures >= _PATIENCE and not any(now - worker.began >= _TOO_SOON for worker in running):
            break
        while len(running) < count and now >= begin_at:
            running.append(_begun(serve, listener))
    # Whoever connects from now on is refused at once: nobody would serve them.
    listener.close()
    _tell(running, signal.SIGTERM)
    for worker in running:
        wait([worker.held])
    if not ended.is_set():
        raise DataError(f"{_PATIENCE} workers in a row ended soon after their start; the log has the reason")
    bad = [worker for worker in running if worker.status != 0]
    for worker in bad:
        _log.error("worker %s ended with status %s", worker.process.pid, worker.status)
    return not bad


def _begun(serve: Callable[[socket.socket], None], listener: socket.socket) -> _Worker:
    context: Any = multiprocessing.get_context(_METHOD)
    held, holding = context.Pipe(duplex=False)
    process: BaseProcess = context.Process(target=_work, args=(serve, listener, holding), name="deferral worker")
    with _no_signals():
        process.start()
    holding.close()
    return _Worker(process, held, time.monotonic())


@contextmanager
def _no_signals() -> Iterator[None]:
    """They come later.  A process that is begun here never gets them: the one that all are copies of must outlive them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Begun in the block below, this process of multiprocessing would unblock them.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(serve: Callable[[socket.socket], None], listener: socket.socket, holding: Connection) -> None:
    # An argument of its process, the pipe is closed when that is gone, and not before.
    assert not holding.closed
    ignore_hangups()
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    serve(listener)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _tell(running: Sequence[_Worker], what: signal.Signals) -> None:
    for worker in running:
        if worker.process.pid is not None and worker.lives:
            os.kill(worker.process.pid, what)
