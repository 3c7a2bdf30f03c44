"""Metrics of several workers as one: each leaves its own where the others find them, and whoever is scraped adds them up.

What a worker has told a scraper is in its file, so that no counter falls when it is killed.  Its parent, one process, then adds
the file to a single one of all that have ended.
"""

import asyncio
import logging
import math
import os
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from deferral.gateway.metrics import Metrics

__all__ = ["WorkerMetrics", "fold"]

_log = logging.getLogger("deferral.gateway")

_EVERY = 1.0
_ENDED = "ended.prom"
_MARK, _REST = "# holds ", "# the rest\n"
# What each worker sees of the same thing; the others are shares of a sum.
_SEEN_BY_ALL = frozenset(
    {
        "deferral_breaker_open", "deferral_alarm", "deferral_drift", "deferral_record_failing", "deferral_budget_dollars",
        "deferral_budget_spent_dollars",
    }
)  # fmt: skip


class WorkerMetrics:
    """Those of this worker and, at most a second old, those of the others, by files in a folder that they share.

    What a worker counted stays counted when it ends; what it had under way ends with it.
    """

    def __init__(self, metrics: Metrics, folder: Path) -> None:
        self._metrics, self._folder = metrics, folder
        # The number of a process may come again.
        self._file = folder / f"{os.getpid()}-{secrets.token_hex(4)}.prom"
        self._trouble = ""

    async def follow(self) -> None:
        """Leave them for the others, every second."""
        while True:
            self.leave()
            await asyncio.sleep(_EVERY)

    def leave(self) -> bytes:
        """Leave them for the others.  -> those of this worker"""
        text = self._metrics.text()
        try:
            _write(self._file, text)
            self._trouble = ""
        except OSError as error:
            # A disk that is full for a while must not end it for good.
            if not self._trouble:
                _log.error("the metrics of this worker are not those of now, they cannot be written: %s", error)
            self._trouble = str(error)
        return text

    def text(self) -> bytes:
        """Of all workers, in the format of Prometheus."""
        own = self.leave().decode()
        texts = {}
        for path in sorted(self._folder.glob("*-*.prom")):
            # Whoever has ended may be added to the others in this moment.
            with suppress(FileNotFoundError):
                texts[path.name] = path.read_text()
        # Read last: it has all that was gone by then, and says what it has of what was not.
        ended, held = _ended(self._folder)
        alive = [(text, _lives(name)) for name, text in texts.items() if name not in held and name != self._file.name]
        return _summed([(own, True), *alive, *((text, False) for text in ended)])


def fold(folder: Path, process: int) -> None:
    """Add what a process that has ended has left to the one file of the ended; only one process may do that in a folder.

    Whoever reads meanwhile, and whatever becomes of this process, counts it once.
    """
    left = sorted(folder.glob(f"{process}-*.prom"))
    try:
        if left:
            ended, held = _ended(folder)
            texts = [(text, False) for text in (*ended, *(path.read_text() for path in left))]
            kept = {name for name in held if (folder / name).exists()} | {path.name for path in left}
            head = f"{_MARK}{' '.join(sorted(kept))}\n".encode()
            # A counter that falls by a rounding error looks like one that began again.
            _write(folder / _ENDED, head + _summed(texts) + _REST.encode() + _summed(texts, rest=True))
        for path in folder.glob(f"{process}-*"):
            path.unlink()
    except OSError as error:
        _log.error("the metrics of worker %d, which has ended, stay in a file of their own: %s", process, error)


def _ended(folder: Path) -> tuple[list[str], set[str]]:
    """Texts that add up to those that have ended, and the files that are in them though they may still be there."""
    try:
        text = (folder / _ENDED).read_text()
    except FileNotFoundError:
        return [], set()
    return text.split(_REST), set(text.partition("\n")[0].removeprefix(_MARK).split())


def _write(path: Path, text: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(text)
    os.replace(partial, path)


def _summed(texts: Sequence[tuple[str, bool]], *, rest: bool = False) -> bytes:
    registry = CollectorRegistry()
    registry.register(_Sums(texts, rest))
    return generate_latest(registry)


class _Sums(Collector):
    """Of texts, each of a process that lives or does not, in any order; or the `rest` that their sums lose by rounding."""

    def __init__(self, texts: Sequence[tuple[str, bool]], rest: bool) -> None:
        self._texts, self._rest = texts, rest

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], list[float]]] = {}
        for text, lives in self._texts:
            for family in text_string_to_metric_families(text):
                if family.type == "gauge" and not lives and family.name != "deferral_saving_dollars":
                    continue
                families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                found = values.setdefault(family.name, {})
                for sample in family.samples:
                    found.setdefault((sample.name, tuple(sorted(sample.labels.items()))), []).append(sample.value)
        for name, metric in families.items():
            for (sample_name, labels), seen in values[name].items():
                total = max(seen, key=abs) if name in _SEEN_BY_ALL else math.fsum(seen)
                metric.add_sample(sample_name, dict(labels), math.fsum([*seen, -total]) if self._rest else total)
            yield metric


def _lives(file: str) -> bool:
    try:
        os.kill(int(file.partition("-")[0]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
