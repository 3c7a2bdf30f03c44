"""Sums over each minute and expert, kept beside the decisions in the transaction that writes them."""

import math
from collections.abc import Iterable, Sequence

from sqlalchemy import Connection

from deferral.gateway.dialects import adding
from deferral.gateway.rows import ROUTED
from deferral.gateway.schema import cascades, decisions, minutes

__all__ = ["add_to_minutes"]

_NAMES = decisions.c.keys()
_SUMS = [column.name for column in minutes.c if not column.primary_key]
_DECISION, _FIRST, _EXTRA = map(cascades.c.keys().index, ("decision", "first", "extra"))


def add_to_minutes(connection: Connection, rows: Sequence[tuple], firsts: Iterable[tuple] = ()) -> None:
    """Add rows of decisions and of their cascades, each with all columns in order, to the minutes in which they arrived."""
    if not rows:
        return
    sums: dict[tuple[int, str], list[float]] = {}
    first = {one[_DECISION]: (one[_FIRST], one[_EXTRA]) for one in firsts}

    def add(minute: int, expert: str, more: Sequence[float]) -> None:
        sums[minute, expert] = [
            before + one for before, one in zip(sums.get((minute, expert), [0] * len(_SUMS)), more, strict=True)
        ]

    for values in rows:
        row = dict(zip(_NAMES, values, strict=True))
        compared = row["requested"] == ROUTED and row["outcome"] == "ok" and row["best_price"] is not None
        saved = row["best_price"] - row["price"] if compared else 0.0
        latency = row["latency_s"]
        # What nobody answered, or answered with an error, costs nothing; what a client left costs what was read.
        costs = row["expert"] != "" and (row["status"] < 300 or row["outcome"] == "cancelled")
        estimated = row["estimated"] and costs
        # A first answer that was not given is on the bill of whoever gave it.
        who, extra = first.get(row["id"], ("", 0.0))
        one = (
            1, row["requested"] == ROUTED, row["outcome"] in ("error", "truncated"), estimated,
            row["price"] - extra, compared, saved, saved * saved, latency is not None, latency or 0.0,
        )  # fmt: skip
        minute = math.floor(row["time"] / 60)
        add(minute, row["expert"], one)
        if extra:
            add(minute, who, [extra if name == "price" else 0 for name in _SUMS])
    # In one order, so that two workers do not wait for each other.
    found = [
        {"minute": minute, "expert": expert} | dict(zip(_SUMS, sums[minute, expert], strict=True))
        for minute, expert in sorted(sums)
    ]
    connection.execute(adding(connection, minutes), found)
