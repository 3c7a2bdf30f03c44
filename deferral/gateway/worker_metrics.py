"""Metrics of several workers as one: each leaves its own where the others find them, and whoever is scraped adds them up.

What a worker has told a scraper is in its file, so that no counter falls when it is killed.  Its parent, one process, then adds
the file to a single one of all that have ended.
"""

import asyncio
import json
import logging
import math
import os
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector

from deferral.gateway.metrics import Metrics

__all__ = ["WorkerMetrics", "fold"]

_log = logging.getLogger("deferral.gateway")

_EVERY = 1.0
_ENDED = "ended.json"
# What each worker sees of the same thing; the others are shares of a sum.
_SEEN_BY_ALL = frozenset(
    {
        "deferral_breaker_open", "deferral_addresses_away", "deferral_alarm", "deferral_drift", "deferral_record_failing",
        "deferral_budget_dollars", "deferral_budget_spent_dollars",
    }
)  # fmt: skip

# [[name, documentation, type, [[name of a sample, its labels, its value], ...]], ...]: of all that a process counts, as JSON,
# since the text of Prometheus is read by Python, one character after the other.
_Counted = list[list[Any]]


class WorkerMetrics:
    """Those of this worker and, at most a second old, those of the others, by files in a folder that they share.

    What a worker counted stays counted when it ends; what it had under way ends with it.
    """

    def __init__(self, metrics: Metrics, folder: Path) -> None:
        self._metrics, self._folder = metrics, folder
        # The number of a process may come again.
        self._file = folder / f"{os.getpid()}-{secrets.token_hex(4)}.json"
        self._trouble = ""

    async def follow(self) -> None:
        """Leave them for the others, every second."""
        while True:
            self.leave()
            await asyncio.sleep(_EVERY)

    def leave(self) -> _Counted:
        """Leave them for the others.  -> those of this worker"""
        counted = _counted(self._metrics.registry)
        try:
            _write(self._file, counted)
            self._trouble = ""
        except OSError as error:
            # A disk that is full for a while must not end it for good.
            if not self._trouble:
                _log.error("the metrics of this worker are not those of now, they cannot be written: %s", error)
            self._trouble = str(error)
        return counted

    async def text(self) -> bytes:
        """Of all workers, in the format of Prometheus."""
        return await asyncio.to_thread(self._with_others, self.leave())

    def _with_others(self, own: _Counted) -> bytes:
        others = {}
        for path in sorted(self._folder.glob("*-*.json")):
            # Whoever has ended may be added to the others in this moment.
            with suppress(FileNotFoundError):
                others[path.name] = json.loads(path.read_bytes())
        # Read last: it has all that was gone by then, and says what it has of what was not.
        ended, held = _ended(self._folder)
        alive = [(counted, _lives(name)) for name, counted in others.items() if name not in held and name != self._file.name]
        return generate_latest(_summed([(own, True), *alive, *((counted, False) for counted in ended)]))


def fold(folder: Path, process: int) -> None:
    """Add what a process that has ended has left to the one file of the ended; only one process may do that in a folder.

    Whoever reads meanwhile, and whatever becomes of this process, counts it once.
    """
    left = sorted(folder.glob(f"{process}-*.json"))
    try:
        if left:
            ended, held = _ended(folder)
            parts = [(counted, False) for counted in (*ended, *(json.loads(path.read_bytes()) for path in left))]
            kept = {name for name in held if (folder / name).exists()} | {path.name for path in left}
            # A counter that falls by a rounding error looks like one that began again.
            sums = [_counted(_summed(parts, rest=rest)) for rest in (False, True)]
            _write(folder / _ENDED, {"holds": sorted(kept), "sums": sums})
        for path in folder.glob(f"{process}-*"):
            path.unlink()
    except OSError as error:
        _log.error("the metrics of worker %d, which has ended, stay in a file of their own: %s", process, error)


def _ended(folder: Path) -> tuple[list[_Counted], set[str]]:
    """What adds up to those that have ended, and the files that are in it though they may still be there."""
    try:
        said = json.loads((folder / _ENDED).read_bytes())
    except FileNotFoundError:
        return [], set()
    return said["sums"], set(said["holds"])


def _write(path: Path, content: _Counted | dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial, path)


def _counted(registry: CollectorRegistry) -> _Counted:
    return [
        [
            family.name,
            family.documentation,
            family.type,
            [[sample.name, sample.labels, sample.value] for sample in family.samples],
        ]
        for family in registry.collect()
    ]


def _summed(parts: Sequence[tuple[_Counted, bool]], *, rest: bool = False) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_Sums(parts, rest))
    return registry


class _Sums(Collector):
    """Of processes, each of which lives or does not, in any order; or the `rest` that their sums lose by rounding."""

    def __init__(self, parts: Sequence[tuple[_Counted, bool]], rest: bool) -> None:
        self._parts, self._rest = parts, rest

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], list[float]]] = {}
        for counted, lives in self._parts:
            for family, documentation, kind, samples in counted:
                if kind == "gauge" and not lives and family != "deferral_saving_dollars":
                    continue
                families.setdefault(family, Metric(family, documentation, kind))
                found = values.setdefault(family, {})
                for sample, labels, value in samples:
                    found.setdefault((sample, tuple(sorted(labels.items()))), []).append(value)
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
