"""Sums over each minute and expert, kept beside the decisions in the transaction that writes them."""

import math
from collections.abc import Sequence

from sqlalchemy import Connection

from deferral.gateway.dialects import adding
from deferral.gateway.schema import decisions, minutes

__all__ = ["add_to_minutes"]

_NAMES = decisions.c.keys()
_SUMS = [column.name for column in minutes.c if not column.primary_key]


def add_to_minutes(connection: Connection, rows: Sequence[tuple]) -> None:
    """Add rows of decisions, each with all columns in order, to the minutes in which they arrived."""
    if not rows:
        return
    sums: dict[tuple[int, str], list[float]] = {}
    for values in rows:
        row = dict(zip(_NAMES, values, strict=True))
        compared = row["requested"] == "auto" and row["outcome"] == "ok" and row["best_price"] is not None
        saved = row["best_price"] - row["price"] if compared else 0.0
        latency = row["latency_s"]
        # What nobody answered, or answered with an error, costs nothing; what a client left costs what was read.
        costs = row["expert"] != "" and (row["status"] < 300 or row["outcome"] == "cancelled")
        estimated = row["estimated"] and costs
        one = (
            1, row["requested"] == "auto", row["outcome"] in ("error", "truncated"), estimated,
            row["price"], compared, saved, saved * saved, latency is not None, latency or 0.0,
        )  # fmt: skip
        place = math.floor(row["time"] / 60), row["expert"]
        sums[place] = [before + more for before, more in zip(sums.get(place, [0] * len(one)), one, strict=True)]
    # In one order, so that two workers do not wait for each other.
    found = [
        {"minute": minute, "expert": expert} | dict(zip(_SUMS, sums[minute, expert], strict=True))
        for minute, expert in sorted(sums)
    ]
    connection.execute(adding(connection, minutes), found)
