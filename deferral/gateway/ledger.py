"""What several workers share of a key's budget and of its rate, in the database that they share.

A request must not wait for the database, and a limit must hold over all workers.  So a worker takes a part at a time: of a budget
a sixteenth of what is free, of a rate what it needs for a moment; the requests are then counted in its memory.  What is granted
to all workers together never exceeds the limit, whatever becomes of a worker.  Near the end the parts shrink, and a worker
that sets nothing aside gives back what it has.  Each exchange is one transaction under a lock on the key.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Delete, Engine, Row, delete, func, insert, select, union_all, update

from deferral.gateway.database import durable
from deferral.gateway.dialects import alone, clock, replacing
from deferral.gateway.schema import admissions, decisions, forgotten, grants

__all__ = ["LIFE", "SILENT", "Admission", "Ledger", "Part", "recorded", "recorded_by_key"]

_PART = 1 / 16
# In the place of a worker's name: all workers that have ended.
_ENDED = ""
# A worker that has not been heard of for so long is dead, or has nothing granted that it could spend.
SILENT = 30.0
_MINUTE = 60.0
# A request that was admitted is let through within so many seconds.
LIFE = 0.5
# A worker whose clock is fast opens the next window early, while others still spend in this one.
_FASTEST = 86400.0
_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Part:
    """Dollars: `added` to what the worker may spend, `free` for anyone, `elsewhere` granted to others and not spent.

    `lost`: the worker was taken for dead, and what it had not spent went back.
    """

    added: float
    free: float
    elsewhere: float
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Admission:
    """`count` requests may pass; if none, the next may in `wait` seconds."""

    id: str
    count: int
    wait: float


class Ledger:
    """One worker's door to what is shared."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.worker = engine, secrets.token_hex(8)

    def exchange(
        self,
        key: str,
        start: float,
        budget: float,
        *,
        granted: float,
        spent: float,
        unspent: float = 0.0,
        wanted: float = 0.0,
        known: bool,
        joins: bool = False,
    ) -> Part:
        """Tell what this worker was granted and has spent in the window that began at `start`, and ask for `wanted` dollars.

        Nothing is added where that and the `unspent` that it has would not do.  `known`: it has told of itself before.  `joins`:
        the record is looked at as well, since the key may have had no budget, or another window, for some of this one.
        """
        with self.engine.connect() as connection:
            durable(connection, False)
            with alone(connection, f"budget {key}"):
                now = clock(connection)
                rows = {row.worker: row for row in _grants(connection, key, start)}
                if any(row.seen > now + SILENT for row in rows.values()):
                    # The clock was set back: whoever is dead would be taken for alive for as long.
                    ahead = (grants.c.key == key) & (grants.c.start == start) & (grants.c.seen > now)
                    connection.execute(update(grants).where(ahead).values(seen=now))
                if _ENDED not in rows:
                    # The first of the window; what was spent before anyone shared it is on record.
                    connection.execute(delete(grants).where(grants.c.key == key, grants.c.start < start - _FASTEST))
                    before = recorded(connection, key, start)
                    self._write(connection, key, start, _ENDED, before, before, now)
                    rows = {row.worker: row for row in _grants(connection, key, start)}
                if known and self.worker not in rows:
                    return Part(0.0, 0.0, 0.0, lost=True)
                if rows.pop(self.worker, None) is not None and not known:
                    # It was written under another budget or window of the key: what was spent then is on record.
                    connection.execute(_of(key, start, [self.worker]))
                silent = [row for name, row in rows.items() if name != _ENDED and row.seen < now - SILENT]
                first = not known and len(silent) == len(rows) - 1
                joins |= first
                if silent or joins:
                    rows = self._bury(connection, rows, silent, 0.0 if joins else spent, now, joins=joins)
                others = sum(max(row.granted, row.spent) for row in rows.values())
                elsewhere = sum(max(row.granted - row.spent, 0.0) for row in rows.values())
                free = max(budget - others - granted, 0.0)
                added = min(free, max(wanted, _PART * free)) if 0 < wanted <= free + unspent else 0.0
                if known or granted or spent or added:
                    self._write(connection, key, start, self.worker, granted + added, spent, now)
        return Part(added, free - added, elsewhere)

    def retire(self, key: str, start: float, spent: float) -> None:
        """The worker ends; what it has spent stays spent."""
        with self.engine.connect() as connection:
            durable(connection, False)
            with alone(connection, f"budget {key}"):
                rows = {row.worker: row for row in _grants(connection, key, start)}
                if self.worker in rows and _ENDED in rows:
                    total = rows[_ENDED].spent + spent
                    self._write(connection, key, start, _ENDED, total, total, clock(connection))
                    connection.execute(_of(key, start, [self.worker]))

    def admit(self, key: str, per_minute: int, wanted: int, unused: tuple[str, int] | None) -> Admission:
        """Let up to `wanted` requests pass within `LIFE`; of an earlier admission so many were `used`, the rest comes back.

        Requests that are admitted count until a minute after the last moment at which they may pass, so that in any 60 seconds
        no more than `per_minute` do.
        """
        a = admissions.c
        with self.engine.connect() as connection:
            durable(connection, False)
            with alone(connection, f"rate {key}"):
                now = clock(connection)
                # None is for a time so far ahead; where the clock was set back, it would count for as long.
                over = (a.until <= now - _MINUTE) | (a.until > now + _MINUTE)
                connection.execute(delete(admissions).where(a.key == key, over))
                if unused is not None:
                    connection.execute(update(admissions).where(a.id == unused[0]).values(count=unused[1]))
                taken, oldest = connection.execute(
                    select(func.coalesce(func.sum(a.count), 0), func.min(a.until)).where(a.key == key, a.count > 0)
                ).one()
                count = min(wanted, per_minute - int(taken))
                if count <= 0:
                    return Admission("", 0, max(oldest + _MINUTE - now, 0.0))
                made = secrets.token_hex(16)
                connection.execute(insert(admissions).values(id=made, key=key, until=now + LIFE, count=count))
        return Admission(made, count, 0.0)

    def _bury(
        self, connection: Connection, rows: dict[str, Row], silent: Sequence[Row], mine: float, now: float, *, joins: bool
    ) -> dict[str, Row]:
        """Dead workers have spent what is on record and not another's: at least what they told, at most what they had.

        Where the worker `joins` the record alone says it: others may have spent who shared nothing.
        """
        ended, names = rows[_ENDED], [row.worker for row in silent]
        alive = mine + sum(row.spent for name, row in rows.items() if name not in (_ENDED, *names))
        told, had = sum(row.spent for row in silent), sum(max(row.granted, row.spent) for row in silent)
        on_record = recorded(connection, ended.key, ended.start) - alive
        total = max(on_record if joins else min(on_record, ended.spent + had), ended.spent + told)
        self._write(connection, ended.key, ended.start, _ENDED, total, total, now)
        connection.execute(_of(ended.key, ended.start, names))
        return {row.worker: row for row in _grants(connection, ended.key, ended.start) if row.worker != self.worker}

    @staticmethod
    def _write(connection: Connection, key: str, start: float, worker: str, granted: float, spent: float, now: float) -> None:
        row = {"key": key, "start": start, "worker": worker, "granted": granted, "spent": spent, "seen": now}
        connection.execute(replacing(connection, grants), [row])


def recorded(connection: Connection, key: str, since: float) -> float:
    """Dollars that the requests of a key have cost that arrived at `since` or later, as far as they are on record."""
    spent, gone = (
        select(func.coalesce(func.sum(table.c.price), 0.0)).where(table.c.key == key, table.c.time >= since).scalar_subquery()
        for table in (decisions, forgotten)
    )
    # In one statement, so at one moment: what a deletion moves from one to the other would count twice, or not at all.
    return float(connection.execute(select(spent + gone)).scalar_one())


def recorded_by_key(connection: Connection, keys: Sequence[str], since: float) -> dict[str, float]:
    """`recorded` of many keys, in a few statements."""
    spent, names = dict.fromkeys(keys, 0.0), list(keys)
    for start in range(0, len(names), _AT_ONCE):
        some = names[start : start + _AT_ONCE]
        each = (
            select(table.c.key, func.sum(table.c.price)).where(table.c.key.in_(some), table.c.time >= since).group_by(table.c.key)
            for table in (decisions, forgotten)
        )
        for key, dollars in connection.execute(union_all(*each)).all():
            spent[key] += float(dollars)
    return spent


def _grants(connection: Connection, key: str, start: float) -> Sequence[Row]:
    return connection.execute(select(grants).where(grants.c.key == key, grants.c.start == start)).all()


def _of(key: str, start: float, workers: Sequence[str]) -> Delete:
    return delete(grants).where(grants.c.key == key, grants.c.start == start, grants.c.worker.in_(workers))
