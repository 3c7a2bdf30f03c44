"""The record over time, in steps of equal length, and the newest decisions."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import BigInteger, Engine, case, cast, func, select

from deferral.gateway.database import decisions

__all__ = ["History", "history", "recent"]

_STEPS = 60
_Z = 1.96


@dataclass(frozen=True)
class History:
    """Of S steps of `width` seconds from `start` on.  Prices in dollars.

    `saving` is what the tokens of the routed answers would have cost at the router's best expert, less what was paid;
    `saving_half` is half the 95% interval of that sum, as of independent requests.
    """

    start: int
    width: int
    requests: list[int]
    failed: list[int]
    price: list[float]
    saving: list[float]
    saving_half: list[float]
    experts: dict[str, list[int]]  # requests that each answered; "" is nobody

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def history(engine: Engine, *, since: float, until: float) -> History:
    """Read it from the record: since <= time < until, in seconds since 1970."""
    width = max(1, math.ceil((until - since) / _STEPS))
    start = int(since)
    steps = max(1, math.ceil((until - start) / width))
    d = decisions.c
    step = (cast(d.time, BigInteger) - start) // width
    paired = (d.requested == "auto") & (d.outcome == "ok") & d.best_price.is_not(None)
    saved = case((paired, d.best_price - d.price), else_=0.0)
    with engine.connect() as connection:
        rows = connection.execute(
            select(
                step.label("step"),
                d.expert,
                func.count().label("requests"),
                func.sum(case((d.outcome.in_(("error", "truncated")), 1), else_=0)).label("failed"),
                func.sum(d.price).label("price"),
                func.sum(saved).label("saving"),
                func.sum(saved * saved).label("squares"),
                func.sum(case((paired, 1), else_=0)).label("paired"),
            )
            .where(d.time >= since, d.time < until)
            .group_by(step, d.expert)
        ).all()
    empty = [0.0] * steps
    found = {name: list(empty) for name in ("requests", "failed", "price", "saving", "squares", "paired")}
    experts: dict[str, list[int]] = {}
    for row in rows:
        # Databases round a time to a whole second in their own ways.
        place = min(max(int(row.step), 0), steps - 1)
        for name, values in found.items():
            values[place] += float(getattr(row, name))
        experts.setdefault(row.expert, [0] * steps)[place] += int(row.requests)
    half = [
        _Z * math.sqrt(max(squares - saving * saving / count, 0.0)) if count > 1 else 0.0
        for squares, saving, count in zip(found["squares"], found["saving"], found["paired"], strict=True)
    ]
    return History(
        start=start,
        width=width,
        requests=[int(count) for count in found["requests"]],
        failed=[int(count) for count in found["failed"]],
        price=found["price"],
        saving=found["saving"],
        saving_half=half,
        experts=dict(sorted(experts.items(), key=lambda entry: -sum(entry[1]))),
    )


def recent(engine: Engine, *, count: int = 50) -> list[dict[str, Any]]:
    """The newest decisions, newest first: who was asked and why, and what came of it."""
    d = decisions.c
    columns = (
        d.id, d.time, d.key, d.requested, d.expert, d.chosen, d.reason, d.price, d.estimated, d.input_tokens, d.output_tokens,
        d.latency_s, d.status, d.outcome, d.attempts, d.streamed, d.fast_path,
    )  # fmt: skip
    with engine.connect() as connection:
        rows = connection.execute(select(*columns).order_by(d.time.desc(), d.id.desc()).limit(count)).all()
    return [dict(row._mapping) for row in rows]
