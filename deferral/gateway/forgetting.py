"""Deletion of what is on record: all of a key, or one response.  What it cost stays in the key's budget."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Engine, func, select

from deferral.gateway.database import scrub
from deferral.gateway.dialects import adding, alone, delete_among
from deferral.gateway.rows import id_kept, plain
from deferral.gateway.schema import cascades, decisions, feedback, forgotten, shadows, texts
from deferral.gateway.windows import QUARTER

__all__ = ["Forgotten", "forget", "forget_some", "meant", "old_costs", "on_record"]

_AT_ONCE = 500
_NAMED = 10
# Windows of budgets last at most a month.
_LONGEST_WINDOW = 32 * 86400
_SCRUBBING = 5.0


@dataclass(frozen=True)
class Forgotten:
    """How many rows were deleted."""

    decisions: int = 0
    feedback: int = 0
    texts: int = 0

    def __str__(self) -> str:
        return f"{self.decisions} decisions, {self.feedback} judgements and {self.texts} texts are deleted"


def forget(
    engine: Engine,
    *,
    key: str | None = None,
    response: str | None = None,
    progress: Callable[[Forgotten], None] = lambda so_far: None,
) -> Forgotten:
    """Delete what is on record of a key (by its id), or of a response (by the gateway's id or the reply's own).

    In batches, with as much time between them as they take, so that a gateway that serves can write.  Whoever interrupts it
    begins again where it was.  SQLite overwrites what is deleted, in the journal too; PostgreSQL when it vacuums.  The key "" is
    that of requests without one; ValueError for a response with an empty id, or one that several replies had.
    """
    total = Forgotten()
    with engine.connect() as connection:
        wanted = _wanted(connection, key, response)
        connection.rollback()
        while True:
            began = time.monotonic()
            with alone(connection, "forget"):
                gone = forget_some(connection, wanted, _AT_ONCE)
            total = Forgotten(total.decisions + gone.decisions, total.feedback + gone.feedback, total.texts + gone.texts)
            progress(total)
            if gone.decisions < _AT_ONCE:
                break
            time.sleep(time.monotonic() - began)
        end = time.monotonic() + _SCRUBBING
        # Only for as long as readers need the journal; the gateway's own cleaning does the rest.
        while total.texts and not scrub(connection) and time.monotonic() < end:
            time.sleep(0.05)
    return total


def on_record(engine: Engine, *, key: str | None = None, response: str | None = None) -> int:
    """How many decisions `forget` would delete; ValueError as there."""
    with engine.connect() as connection:
        wanted = _wanted(connection, key, response)
        return int(connection.execute(select(func.count()).select_from(decisions).where(wanted)).scalar_one())


def _wanted(connection: Connection, key: str | None, response: str | None) -> ColumnElement[bool]:
    if (key is None) == (response is None):
        raise ValueError("forget: expected either a key or a response")
    # All replies without an id have the empty one.
    if response == "":
        raise ValueError("forget: expected the id of a response, got an empty one")
    # A database may refuse to look for a NUL.
    name = plain(response or key or "")
    return decisions.c.key == name if response is None else decisions.c.id == meant(connection, name)


def meant(connection: Connection, name: str) -> str:
    """The id of the decision that has it, else of the only one whose reply had it; ValueError where several had.

    An upstream may give one id to all its replies, whoever they are for.
    """
    d, name = decisions.c, plain(name)
    if connection.execute(select(d.id).where(d.id == name)).first() is not None:
        return name
    found = connection.execute(select(d.id).where(d.reply_id == id_kept(name)).limit(_NAMED + 1)).scalars().all()
    if len(found) > 1:
        listed = ", ".join(found[:_NAMED]) + (" and more" if len(found) > _NAMED else "")
        raise ValueError(f"{name[:200]!r} is the id of several replies; say which by its x-deferral-id: {listed}")
    return found[0] if found else name


def forget_some(connection: Connection, wanted: ColumnElement[bool], count: int) -> Forgotten:
    """Delete up to `count` such decisions, and all that hangs on them, in a transaction that is alone under "forget"."""
    d = decisions.c
    rows = connection.execute(select(d.id, d.key, d.time, d.price).where(wanted).limit(count).with_for_update()).all()
    if not rows:
        return Forgotten()
    costs: dict[tuple[str, float], float] = {}
    for row in rows:
        quarter = row.key, math.floor(row.time / QUARTER) * float(QUARTER)
        costs[quarter] = costs.get(quarter, 0.0) + row.price
    _keep_costs(connection, costs)
    ids = [row.id for row in rows]
    for table in (shadows, cascades):
        delete_among(connection, table.c.decision, ids)
    said, asked = (delete_among(connection, table.c.decision, ids) for table in (feedback, texts))
    return Forgotten(delete_among(connection, d.id, ids), said, asked)


def old_costs(now: float) -> ColumnElement[bool]:
    """Sums that no window of a budget reaches back to."""
    return forgotten.c.time < now - _LONGEST_WINDOW


def _keep_costs(connection: Connection, costs: dict[tuple[str, float], float]) -> None:
    oldest = time.time() - _LONGEST_WINDOW
    rows = [
        {"key": key, "time": quarter, "price": price}
        for (key, quarter), price in sorted(costs.items())
        if price and quarter >= oldest
    ]
    if rows:
        connection.execute(adding(connection, forgotten), rows)
