"""When workers die: others take their places, and nobody ends those that serve."""

import logging
import signal
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from deferral.errors import DataError
from deferral.gateway import workers as module
from deferral.gateway.workers import supervise


class Worker:
    """One that is there for some time, or until it is told to end; a real one would take a second to begin."""

    def __init__(self, lives_s: float) -> None:
        self.began = time.monotonic()
        self._ends = self.began + lives_s
        self.process, self.held, self.status = SimpleNamespace(pid=None), None, 1

    @property
    def lives(self) -> bool:
        return time.monotonic() < self._ends


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """How long each one that is begun will live; those after the last die at once, 12 of them, then all is to end."""
    lives: list[float] = []
    left = [12]

    def begin(*_) -> Worker:
        if not lives:
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGTERM)
        return Worker(lives.pop(0) if lives else 0.0)

    for name, value in {
        "_begun": begin,
        "wait": lambda *_: time.sleep(0.001),
        "_TOO_SOON": 0.05,
        "_LONGEST_PAUSE": 0.002,
    }.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "multiprocessing", SimpleNamespace(set_forkserver_preload=lambda names: None))
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield lives
    for name, handler in before.items():
        signal.signal(name, handler)


def test_a_worker_that_cannot_start_does_not_end_those_that_serve(begun: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    begun += [1e6, 1e6, 0.1]
    with socket.socket() as listener:
        assert not supervise(lambda listener: None, listener, 3), "those that are left have lost something"
    assert len(caplog.records) > module._PATIENCE


def test_workers_that_never_stay_up_end_all(begun: list[float]) -> None:
    with socket.socket() as listener, pytest.raises(DataError, match="5 workers in a row ended soon after their start"):
        supervise(lambda listener: None, listener, 1)
