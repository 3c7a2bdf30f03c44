"""What the gateway did: requests, experts' shares, cost and saving, errors, feedback, budgets."""

import math
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, case, distinct, func, select

from deferral.gateway.alarms import MEANINGS
from deferral.gateway.keys import Key
from deferral.gateway.ledger import recorded_by_key
from deferral.gateway.rows import ROUTED
from deferral.gateway.schema import alarms, cascades, decisions, feedback
from deferral.gateway.windows import Span, minute_of, span, time_zone, with_article

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Budget", "Ringing", "Share", "Status", "dollars", "status"]


@dataclass(frozen=True)
class Share:
    """What one expert answered; "" is nobody.  Means are None where there is nothing to average."""

    expert: str
    requests: int
    price: float
    failed: int
    mean_latency_s: float | None
    judged: int
    mean_quality: float | None


@dataclass(frozen=True)
class Budget:
    """What a key has spent in its present window, and when that ends, in seconds since 1970."""

    key: str
    name: str
    budget: float
    window: str
    spent: float | None  # None where this machine does not know the key's time zone
    ends: float | None


@dataclass(frozen=True)
class Ringing:
    """An alarm of drift that rings, of one expert or of all (""), since when in seconds since 1970."""

    title: str
    expert: str
    since: float

    def __str__(self) -> str:
        whose = f" of {self.expert}" if self.expert else ""
        return f"alarm: {self.title}{whose}, since {minute_of(self.since)}"


@dataclass(frozen=True)
class Status:
    """Of the requests that arrived at `since` or later.  Prices in dollars.

    `saving` is what the same tokens would have cost at the router's best expert, less what was paid, over `saving_requests`
    routed requests that were answered.
    """

    since: float
    requests: int
    routed: int
    streamed: int
    estimated: int  # answers whose price is an estimate
    fast_path: int
    price: float
    saving: float
    saving_requests: int
    outcomes: dict[str, int]
    shares: tuple[Share, ...]
    judged: int
    mean_quality: float | None
    budgets: tuple[Budget, ...]
    alarms: tuple[Ringing, ...]  # as they were seen last, whatever `since` is

    def summary(self, hours: float) -> str:
        """In words."""
        lines = [f"{self.requests} requests in {hours:g} hours, {self.routed} of them routed, {self.streamed} streamed"]
        if self.outcomes:
            lines.append(", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.items()))
        lines.append(f"{dollars(self.price)} spent" + (f" ({self.estimated} prices are estimates)" if self.estimated else ""))
        if self.saving_requests:
            lines.append(
                f"{dollars(self.saving)} saved against always the best expert, had it written as many tokens, over "
                f"{self.saving_requests} routed answers"
            )
        if self.fast_path:
            lines.append(f"{self.fast_path} decided by the static mix, since the encoder took too long")
        if self.mean_quality is not None:
            lines.append(f"{self.judged} answers judged, mean quality {self.mean_quality:.3f}")
        lines += map(str, self.alarms)
        return "\n".join(lines)

    def tables(self) -> "list[Table]":
        """For a terminal: the experts, and the budgets where there are any."""
        from rich.markup import escape
        from rich.table import Table

        experts = Table("expert", "share", "requests", "failed", "price", "latency", "judged", "quality")
        for share in self.shares:
            experts.add_row(
                escape(share.expert) or "(nobody)",
                f"{share.requests / self.requests:.1%}",
                str(share.requests),
                str(share.failed),
                dollars(share.price),
                "" if share.mean_latency_s is None else f"{share.mean_latency_s:.2f} s",
                str(share.judged),
                "" if share.mean_quality is None else f"{share.mean_quality:.3f}",
            )
        budgets = Table("key", "name", "spent", "budget", "window ends")
        for budget in self.budgets:
            wanted = f"${budget.budget:g} {with_article(budget.window)}"
            spent = "time zone not known here" if budget.spent is None else dollars(budget.spent)
            ends = "" if budget.ends is None else minute_of(budget.ends)
            budgets.add_row(budget.key, escape(budget.name), spent, wanted, ends)
        return [table for table in (experts, budgets) if table.row_count]


def status(engine: Engine, keys: Iterable[Key], *, since: float = 0.0, now: float | None = None) -> Status:
    """Read it from the record."""
    now = time.time() if now is None else now
    d, c, recent = decisions.c, cascades.c, decisions.c.time >= since
    paired = (d.requested == ROUTED) & (d.outcome == "ok") & d.best_price.is_not(None)
    ones = func.count()
    failed = func.sum(case((d.outcome.in_(("error", "truncated")), 1), else_=0))
    with engine.connect() as connection:
        total = connection.execute(
            select(
                ones.label("requests"),
                _count(d.requested == ROUTED).label("routed"),
                _count(d.streamed).label("streamed"),
                # What nobody answered, or answered with an error, costs nothing; what a client left costs what was read.
                _count(d.estimated & (d.expert != "") & ((d.status < 300) | (d.outcome == "cancelled"))).label("estimated"),
                _count(d.fast_path).label("fast_path"),
                func.coalesce(func.sum(d.price), 0.0).label("price"),
                func.coalesce(func.sum(case((paired, d.best_price - d.price), else_=0.0)), 0.0).label("saving"),
                _count(paired).label("saving_requests"),
            ).where(recent)
        ).one()
        outcomes = connection.execute(select(d.outcome, ones).where(recent).group_by(d.outcome).order_by(ones.desc())).all()
        experts = connection.execute(
            select(d.expert, ones, func.sum(d.price), failed, func.avg(d.latency_s))
            .where(recent)
            .group_by(d.expert)
            .order_by(ones.desc(), d.expert)
        ).all()
        # A first answer that was not given is on the bill of whoever gave it.
        moved = connection.execute(
            select(d.expert, c.first, func.sum(c.extra))
            .join(cascades, c.decision == d.id)
            .where(recent, c.extra > 0)
            .group_by(d.expert, c.first)
        ).all()
        # The mean of a decision's opinions, then the mean over decisions.
        opinion = (
            select(feedback.c.decision, func.avg(feedback.c.quality).label("quality")).group_by(feedback.c.decision).subquery()
        )
        judged = connection.execute(
            select(d.expert, func.count(distinct(d.id)), func.sum(opinion.c.quality))
            .join(opinion, opinion.c.decision == d.id)
            .where(recent)
            .group_by(d.expert)
        ).all()
        budgets = _budgets(connection, [key for key in keys if key.budget is not None], now)
        ringing = connection.execute(select(alarms).where(alarms.c.ringing).order_by(alarms.c.since)).all()
    quality = {expert: (count, float(summed)) for expert, count, summed in judged}
    judgements = sum(count for count, _ in quality.values())
    extra: defaultdict[str, float] = defaultdict(float)
    for answered, first, price in moved:
        extra[first] += price
        extra[answered] -= price
    silent = [(expert, 0, 0.0, 0, None) for expert in sorted(extra.keys() - {expert for expert, *_ in experts})]
    return Status(
        since=since,
        **total._mapping,
        outcomes=dict(outcomes),
        shares=tuple(
            Share(expert, count, float(price) + extra.get(expert, 0.0), int(bad), latency, *_judged(quality.get(expert)))
            for expert, count, price, bad, latency in [*experts, *silent]
        ),
        judged=judgements,
        mean_quality=sum(summed for _, summed in quality.values()) / judgements if judgements else None,
        budgets=budgets,
        alarms=tuple(Ringing(MEANINGS[one.name][0], one.expert, one.since) for one in ringing),
    )


def _count(condition: Any) -> Any:
    return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)


def _judged(found: tuple[int, float] | None) -> tuple[int, float | None]:
    return (found[0], found[1] / found[0]) if found else (0, None)


def dollars(value: float) -> str:
    """Cents, and three digits of what is less than a dollar: a small model's answers cost millionths."""
    sign, size = "-" if value < 0 else "", abs(value)
    if size == 0 or size >= 1:
        return f"{sign}${size:.2f}"
    places = min(2 - math.floor(math.log10(size)), 9)
    return f"{sign}${size:.{places}f}"


def _budgets(connection: Connection, keys: list[Key], now: float) -> tuple[Budget, ...]:
    windows: dict[str, Span | None] = {}
    for key in keys:
        try:
            windows[key.id] = span(key.window, now, time_zone(key.zone))
        except ValueError:
            windows[key.id] = None
    spent: dict[str, float] = {}
    for start in {window.start for window in windows.values() if window is not None}:
        some = [name for name, window in windows.items() if window is not None and window.start == start]
        spent |= recorded_by_key(connection, some, start)
    return tuple(
        Budget(key.id, key.name, key.budget or math.inf, key.window, spent.get(key.id), None if window is None else window.end)
        for key, window in ((key, windows[key.id]) for key in keys)
    )
