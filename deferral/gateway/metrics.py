"""What Prometheus is told."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)


class _States(Collector):
    def __init__(self, states: Callable[[], dict[str, str]], queued: Callable[[], dict[str, int]]) -> None:
        self._states, self._queued = states, queued

    def collect(self) -> Iterable[GaugeMetricFamily]:
        breakers = GaugeMetricFamily("deferral_breaker_open", "1: left alone, 0.5: on trial, 0: asked.", labels=["expert"])
        for name, state in self._states().items():
            breakers.add_metric([name], {"closed": 0.0, "half-open": 0.5, "open": 1.0}[state])
        queues = GaugeMetricFamily("deferral_queue_length", "Requests that wait for a slot of an expert.", labels=["expert"])
        for name, length in self._queued().items():
            queues.add_metric([name], length)
        return [breakers, queues]


class Metrics:
    """Of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._requests = Counter("deferral_requests", "Requests, by path and status.", ["path", "status"], registry=registry)
        self._decisions = Counter("deferral_decisions", "Experts that the router chose.", ["expert", "path"], registry=registry)
        self._answers = Counter("deferral_answers", "Answers by expert and outcome.", ["expert", "outcome"], registry=registry)
        self._failures = Counter(
            "deferral_upstream_failures", "Failed attempts by expert and kind.", ["expert", "kind"], registry=registry
        )
        self._retries = Counter("deferral_retries", "Attempts at the same expert once more.", ["expert"], registry=registry)
        self._price = Counter("deferral_price_dollars", "What answers cost.", ["expert"], registry=registry)
        self._tokens = Counter("deferral_tokens", "Tokens by expert and direction.", ["expert", "direction"], registry=registry)
        self._best = Counter(
            "deferral_best_price_dollars", "What routed answers would have cost by the best expert.", registry=registry
        )
        self._saving = Gauge("deferral_saving_dollars", "Saved against always asking the best expert.", registry=registry)
        self._latency = Histogram(
            "deferral_latency_seconds", "To the last byte.", ["expert"], buckets=_SECONDS, registry=registry
        )
        self._first = Histogram(
            "deferral_first_byte_seconds", "To the first byte.", ["expert"], buckets=_SECONDS, registry=registry
        )
        self._deciding = Histogram("deferral_decision_seconds", "Time of a decision.", buckets=_OVERHEAD, registry=registry)
        self._flying = Gauge("deferral_requests_in_flight", "Requests under way.", registry=registry)
        self._refused = Counter("deferral_refused", "Requests turned away, by reason.", ["code"], registry=registry)
        self._children: dict[tuple, tuple] = {}

    def watch(self, states: Callable[[], dict[str, str]], queued: Callable[[], dict[str, int]]) -> None:
        """Also show how the experts are doing whenever somebody looks."""
        self.registry.register(_States(states, queued))

    def began(self) -> None:
        self._flying.inc()

    def ended(self, path: str, status: int) -> None:
        self._flying.dec()
        self._requests.labels(path, str(status)).inc()

    def refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def decided(self, expert: str, seconds: float, *, fast: bool) -> None:
        self._decisions.labels(expert, "fast" if fast else "full").inc()
        self._deciding.observe(seconds)

    def failed(self, expert: str, kind: str) -> None:
        self._failures.labels(expert, kind).inc()

    def retried(self, expert: str) -> None:
        self._retries.labels(expert).inc()

    def answered(
        self,
        expert: str,
        outcome: str,
        *,
        price: float,
        best_price: float,
        input_tokens: int,
        output_tokens: int,
        first_byte_s: float,
        latency_s: float,
    ) -> None:
        """`best_price` is NaN where the router did not choose."""
        children = self._children.get((expert, outcome)) or self._bound(expert, outcome)
        answers, dollars, into, out, first, whole = children
        answers.inc()
        dollars.inc(price)
        into.inc(input_tokens)
        out.inc(output_tokens)
        first.observe(first_byte_s)
        whole.observe(latency_s)
        if best_price == best_price:
            self._best.inc(best_price)
            self._saving.inc(best_price - price)

    def text(self) -> bytes:
        """For a scraper."""
        return generate_latest(self.registry)

    def _bound(self, expert: str, outcome: str) -> tuple:
        # Looking a label up costs more than counting.
        children = (
            self._answers.labels(expert, outcome),
            self._price.labels(expert),
            self._tokens.labels(expert, "input"),
            self._tokens.labels(expert, "output"),
            self._first.labels(expert),
            self._latency.labels(expert),
        )
        self._children[expert, outcome] = children
        return children
