"""Metrics of several workers as one: each leaves its own where the others find them, and whoever is scraped adds them up."""

import asyncio
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from deferral.gateway.metrics import Metrics

__all__ = ["WorkerMetrics"]

_log = logging.getLogger("deferral.gateway")

_EVERY = 1.0
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
        self._trouble = ""

    async def follow(self) -> None:
        """Leave them for the others, every second."""
        while True:
            self.leave()
            await asyncio.sleep(_EVERY)

    def leave(self) -> None:
        """Leave them for the others."""
        path = self._folder / f"{os.getpid()}.prom"
        partial = path.with_suffix(".partial")
        try:
            partial.write_bytes(self._metrics.text())
            os.replace(partial, path)
            self._trouble = ""
        except OSError as error:
            # A disk that is full for a while must not end it for good.
            if not self._trouble:
                _log.error("the metrics of this worker are not those of now, they cannot be written: %s", error)
            self._trouble = str(error)

    def text(self) -> bytes:
        """Of all workers, in the format of Prometheus."""
        own = str(os.getpid())
        texts = {path.stem: path.read_text() for path in sorted(self._folder.glob("*.prom"))}
        registry = CollectorRegistry()
        registry.register(_Sums(texts | {own: self._metrics.text().decode()}))
        return generate_latest(registry)


class _Sums(Collector):
    """By process."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
        for process, text in self._texts.items():
            lives = _lives(int(process))
            for family in text_string_to_metric_families(text):
                if family.type == "gauge" and not lives and family.name != "deferral_saving_dollars":
                    continue
                families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                found = values.setdefault(family.name, {})
                for sample in family.samples:
                    key = sample.name, tuple(sorted(sample.labels.items()))
                    if family.name in _SEEN_BY_ALL:
                        found[key] = max(found.get(key, sample.value), sample.value, key=abs)
                    else:
                        found[key] = found.get(key, 0.0) + sample.value
        for name, metric in families.items():
            for (sample_name, labels), value in values[name].items():
                metric.add_sample(sample_name, dict(labels), value)
            yield metric


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
