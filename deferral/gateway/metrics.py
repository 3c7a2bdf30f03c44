"""What Prometheus is told.  Plain numbers, written in the event loop only: locks and labels would cost more than the counting."""

import asyncio
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import nlargest
from typing import get_args

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from deferral.gateway.alarms import Alarm
from deferral.gateway.keys import Key
from deferral.gateway.record import Record
from deferral.gateway.requests import Kind
from deferral.gateway.shadow import Shadow
from deferral.gateway.standing import Servers

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_DECIDING = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)
# Of thousands of keys those matter that come near their budget; a scrape must not hold up requests.
_BUDGETS = 100
_STATES = {"closed": 0.0, "half-open": 0.5, "open": 1.0, "resting": 1.0}

_Labels = tuple[str, ...]


class _Counts:
    """A counter: a number for each combination of labels."""

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self.name, self.text, self.labels = name, text, labels
        self.values: defaultdict[_Labels, float] = defaultdict(float)
        if not labels:
            self.values[()] = 0.0

    def family(self) -> CounterMetricFamily:
        family = CounterMetricFamily(self.name, self.text, labels=self.labels)
        for labels, value in list(self.values.items()):
            family.add_metric(labels, value)
        return family


class _Times:
    """A histogram of seconds: how many are in each bucket, and their sum."""

    def __init__(self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self.name, self.text, self.labels, self.bounds = name, text, labels, bounds
        self.values: dict[_Labels, list[float]] = {}

    def add(self, labels: _Labels, seconds: float) -> None:
        values = self.values.get(labels)
        if values is None:
            values = self.values[labels] = [0.0] * (len(self.bounds) + 2)
        values[bisect_left(self.bounds, seconds)] += 1
        values[-1] += seconds

    def family(self) -> HistogramMetricFamily:
        family = HistogramMetricFamily(self.name, self.text, labels=self.labels)
        for labels, values in list(self.values.items()):
            below, buckets = 0.0, []
            for bound, count in zip([*map(str, self.bounds), "+Inf"], values[:-1], strict=True):
                below += count
                buckets.append((bound, below))
            family.add_metric(labels, buckets, values[-1])
        return family


class Metrics(Collector):
    """Of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self._requests = _Counts("deferral_requests", "Requests, by path and status.", ("path", "status"))
        self._refused = _Counts("deferral_refused", "Requests turned away, by reason.", ("code",))
        self._decisions = _Counts("deferral_decisions", "Experts that the router chose.", ("expert", "path"))
        self._answers = _Counts("deferral_answers", "Answers, by expert and outcome.", ("expert", "outcome"))
        self._failures = _Counts("deferral_upstream_failures", "Failed attempts, by expert and kind.", ("expert", "kind"))
        self._retries = _Counts("deferral_retries", "Attempts at the same expert once more.", ("expert",))
        self._price = _Counts("deferral_price_dollars", "What answers cost.", ("expert",))
        self._cascades = _Counts(
            "deferral_cascades", "Requests that an expert answered first, by outcome.", ("expert", "outcome")
        )
        self._tokens = _Counts("deferral_tokens", "Tokens, by expert and direction.", ("expert", "direction"))
        self._best = _Counts("deferral_best_price_dollars", "What routed answers would have cost by the best expert.")
        self._routed = _Counts(
            "deferral_routed_price_dollars", "What routed answers cost, with first answers that were not given."
        )
        self._latency = _Times("deferral_latency_seconds", "To the last byte.", ("expert",), _SECONDS)
        self._first = _Times("deferral_first_byte_seconds", "To the first byte.", ("expert",), _SECONDS)
        self._deciding = _Times("deferral_decision_seconds", "Time of a decision.", (), _DECIDING)
        self._flying = 0
        self._servers: Callable[[], Mapping[str, Servers]] = dict
        self._alarms: Callable[[], Sequence[Alarm]] = tuple
        self._shadow: Callable[[], Shadow | None] = lambda: None
        self._record: Record | None = None
        self._budgets: Callable[[], Iterable[tuple[Key, float]]] = tuple
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def watch_servers(self, servers: Callable[[], Mapping[str, Servers]]) -> None:
        """Also show how the experts are doing whenever somebody looks."""
        self._servers = servers

    def expect(self, experts: Iterable[str]) -> None:
        """Begin at 0 what will be counted of these: a scraper sees no increase in a series that was not there."""
        for name in experts:
            self._price.values[name,] += 0
            for direction in ("input", "output"):
                self._tokens.values[name, direction] += 0
            for outcome in ("ok", "truncated"):
                self._answers.values[name, outcome] += 0
        for path in get_args(Kind):
            for status in ("200", "500", "502", "503", "504"):
                self._requests.values[path, status] += 0

    def watch_alarms(self, alarms: Callable[[], Sequence[Alarm]]) -> None:
        """Also show what was seen of drift, which all gateways on a database know."""
        self._alarms = alarms

    def watch_shadow(self, shadow: Callable[[], Shadow | None]) -> None:
        """Also show how many requests a candidate router has decided."""
        self._shadow = shadow

    def watch_record(self, record: Record) -> None:
        """Also show whether rows come into the database."""
        self._record = record

    def watch_budgets(self, budgets: Callable[[], Iterable[tuple[Key, float]]]) -> None:
        """Also show what keys have spent of their budgets: of the 100 that have spent the largest share."""
        self._budgets = budgets

    @property
    def under_way(self) -> int:
        return self._flying

    def began(self) -> None:
        self._flying += 1

    def ended(self, path: str, status: int) -> None:
        self._flying -= 1
        self._requests.values[path, str(status)] += 1

    def refused(self, code: str) -> None:
        self._refused.values[code,] += 1

    def decided(self, expert: str, seconds: float, *, fast: bool) -> None:
        self._decisions.values[expert, "fast" if fast else "full"] += 1
        self._deciding.add((), seconds)

    def failed(self, expert: str, kind: str) -> None:
        self._failures.values[expert, kind] += 1

    def retried(self, expert: str) -> None:
        self._retries.values[expert,] += 1

    def asked_first(self, expert: str, ending: str, extra: float, *, compared: bool) -> None:
        """`extra` dollars were paid for an answer that was not given.  `compared`: the best expert's price is known."""
        self._cascades.values[expert, ending] += 1
        self._price.values[expert,] += extra
        if compared:
            self._routed.values[()] += extra

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
        """`best_price` is NaN where the router did not choose, `first_byte_s` where the client left before there was one."""
        self._answers.values[expert, outcome] += 1
        self._price.values[expert,] += price
        self._tokens.values[expert, "input"] += input_tokens
        self._tokens.values[expert, "output"] += output_tokens
        if first_byte_s == first_byte_s:
            self._first.add((expert,), first_byte_s)
        self._latency.add((expert,), latency_s)
        if best_price == best_price:
            self._best.values[()] += best_price
            self._routed.values[()] += price

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        """For a scraper."""
        counts = (self._requests, self._refused, self._decisions, self._answers, self._failures, self._retries, self._cascades)
        dollars = self._price, self._best, self._routed
        for each in (*counts, *dollars, self._tokens, self._latency, self._first, self._deciding):
            yield each.family()
        saving = self._best.values[()] - self._routed.values[()]
        yield GaugeMetricFamily("deferral_saving_dollars", "Saved against always asking the best expert.", saving)
        yield GaugeMetricFamily("deferral_requests_in_flight", "Requests under way.", self._flying)
        breakers = GaugeMetricFamily("deferral_breaker_open", "1: left alone, 0.5: on trial, 0: asked.", labels=["expert"])
        queues = GaugeMetricFamily("deferral_queue_length", "Requests that wait for a slot of an expert.", labels=["expert"])
        away = GaugeMetricFamily("deferral_addresses_away", "Addresses of an expert left alone or on trial.", labels=["expert"])
        for name, servers in self._servers().items():
            breakers.add_metric([name], _STATES[servers.state])
            queues.add_metric([name], servers.queued)
            away.add_metric([name], servers.away)
        labels = ["alarm", "expert"]
        ringing = GaugeMetricFamily("deferral_alarm", "1: the traffic has drifted from what the router learned.", labels=labels)
        drift = GaugeMetricFamily("deferral_drift", "What the alarm looks at, in its own units.", labels=labels)
        for alarm in self._alarms():
            seen = alarm.seen
            ringing.add_metric([seen.name, seen.expert], float(alarm.ringing))
            if seen.found is not None:
                drift.add_metric([seen.name, seen.expert], seen.found)
        yield from (breakers, queues, away, ringing, drift)
        if (shadow := self._shadow()) is not None:
            scored = CounterMetricFamily(
                "deferral_shadow", "Requests that the candidate router decided, or had no time for.", labels=["what"]
            )
            scored.add_metric(["scored"], shadow.scored)
            scored.add_metric(["dropped"], shadow.dropped)
            yield scored
        yield from self._kept()
        yield from self._spent()

    def _kept(self) -> Iterable[GaugeMetricFamily]:
        if self._record is not None:
            waiting, failing = self._record.waiting, bool(self._record.trouble)
            yield GaugeMetricFamily("deferral_record_waiting", "Rows that wait to be written.", waiting)
            yield GaugeMetricFamily("deferral_record_failing", "1: the database takes no rows.", failing)

    def _spent(self) -> Iterable[GaugeMetricFamily]:
        labels = ["key", "name", "window"]
        budgets = GaugeMetricFamily("deferral_budget_dollars", "What a key may spend in its window.", labels=labels)
        spent = GaugeMetricFamily("deferral_budget_spent_dollars", "Of that, spent or set aside.", labels=labels)
        known = ((key, dollars, key.budget) for key, dollars in self._budgets() if key.budget)
        for key, dollars, budget in nlargest(_BUDGETS, known, key=lambda one: one[1] / one[2]):
            whose = key.id, key.name, key.window
            budgets.add_metric(whose, budget)
            spent.add_metric(whose, dollars)
        return budgets, spent

    async def text(self) -> bytes:
        """All of it, in the format of Prometheus; of the numbers as they are, and in a thread, for it takes a while."""
        return await asyncio.to_thread(generate_latest, _Collected(list(self.collect())))


class _Collected(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        return self._families
