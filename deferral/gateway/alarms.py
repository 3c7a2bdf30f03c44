"""Alarms of drift: one of all gateways on a database looks for it, keeps what it saw there, and tells what rises and falls."""

import asyncio
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, delete, select
from sqlalchemy.exc import SQLAlchemyError

from deferral.gateway.database import durable, hang_up
from deferral.gateway.dialects import alone, clock, replacing
from deferral.gateway.drift import ALLOWED, EVERY, Expected, Seen, looked_at, rings
from deferral.gateway.notices import Notices, keep_notices
from deferral.gateway.schema import alarms, looks

__all__ = ["MEANINGS", "Alarm", "Alarms"]

_log = logging.getLogger("deferral.gateway.alarms")

_FIRST, _READ = 5.0, 30.0
_LONGEST_END = 5.0
_ROW = 1
# What each means; the runbook, docs/operating.md, has a section of this title.
MEANINGS = {
    "unlike": (
        "Queries unlike the log",
        "The queries are of other kinds, or in other shares, than those of the log.",
    ),
    "quality": ("Falling quality", "Answers are judged worse than the router expects of this expert."),
    "price": ("A price that moved", "Answers of this expert cost more or less than the router expects."),
}


@dataclass(frozen=True)
class Alarm:
    """What was seen last, and whether it rings, since when in seconds since 1970."""

    seen: Seen
    ringing: bool
    since: float

    def as_json(self) -> dict[str, Any]:
        """For the page."""
        seen = self.seen
        least, most = ALLOWED[seen.name]
        title, meaning = MEANINGS[seen.name]
        return {
            **{name: getattr(seen, name) for name in ("name", "expert", "rows", "found", "low", "high")},
            "least": least,
            "most": most if most < math.inf else None,
            "ringing": self.ringing,
            "since": self.since,
            "title": title,
            "meaning": meaning,
        }


class Alarms:
    """The alarms of a database, as one gateway on it knows them: `now`.  What rises and falls goes out by `notices` as well."""

    def __init__(self, engine: Engine, notices: Notices | None = None) -> None:
        self._engine, self._notices = engine, notices
        self._lock = threading.Lock()
        self._closed = False
        self.now: tuple[Alarm, ...] = ()

    async def follow(self, expected: Callable[[], Expected]) -> None:
        """Look whenever it is time, read what others have found, and send what is due, until cancelled."""
        await asyncio.sleep(_FIRST)
        while True:
            try:
                await asyncio.to_thread(self.look, expected())
                if self._notices is not None:
                    await self._notices.send()
            except SQLAlchemyError as error:
                # That the database fails is said by those who write to it.
                _log.debug("drift could not be looked for: %s", type(error).__name__)
            except Exception:
                _log.exception("drift could not be looked for")
            await asyncio.sleep(_READ)

    def close(self) -> None:
        """Whoever looks is waited for, for some seconds; nobody will again."""
        self._closed = True
        if self._lock.acquire(timeout=_LONGEST_END):
            self._lock.release()
        else:
            hang_up(self._engine)

    def look(self, expected: Expected, at: float | None = None) -> None:
        """Look for drift, if nobody else has in the last ten minutes; then read what is known.  `at` is the time, for tests."""
        with self._lock, self._engine.connect() as connection:
            if self._closed:
                return
            durable(connection, False)
            with alone(connection, "alarms"):
                now = clock(connection) if at is None else at
                mine = self._begun(connection, now)
            if mine:
                # Reading takes a moment, in which others may write.
                found = looked_at(connection, expected, now)
                connection.rollback()
                with alone(connection, "alarms"):
                    changed = _keep(connection, found, now)
                    if self._notices is not None:
                        keep_notices(connection, [_notice(alarm) for alarm in changed])
                for alarm in changed:
                    _log.warning("%s", _said(alarm))
            self.now = tuple(_known(connection).values())

    @staticmethod
    def _begun(connection: Connection, now: float) -> bool:
        last = connection.execute(select(looks.c.time)).scalar()
        # A clock that was set back must not end it for good.
        if last is not None and now - EVERY < last <= now:
            return False
        connection.execute(replacing(connection, looks), [{"id": _ROW, "time": now}])
        return True


def _keep(connection: Connection, found: Sequence[Seen], now: float) -> list[Alarm]:
    """-> those that have risen or fallen"""
    before, changed, rows = _known(connection), [], []
    for seen in found:
        known = before.get((seen.name, seen.expert))
        was = known is not None and known.ringing
        alarm = Alarm(seen, rings(seen, was), now)
        if alarm.ringing != was:
            changed.append(alarm)
        elif known is not None:
            alarm = Alarm(seen, was, known.since)
        rows.append(_row(alarm))
    for name, expert in before.keys() - {(seen.name, seen.expert) for seen in found}:
        if before[name, expert].ringing:
            changed.append(Alarm(Seen(name, expert, 0), False, now))
        connection.execute(delete(alarms).where(alarms.c.name == name, alarms.c.expert == expert))
    connection.execute(replacing(connection, alarms), rows)
    return changed


def _known(connection: Connection) -> Mapping[tuple[str, str], Alarm]:
    order = alarms.c.ringing.desc(), alarms.c.name.desc(), alarms.c.expert
    return {
        (row.name, row.expert): Alarm(Seen(row.name, row.expert, row.rows, row.found, row.low, row.high), row.ringing, row.since)
        for row in connection.execute(select(alarms).order_by(*order))
    }


def _row(alarm: Alarm) -> dict[str, Any]:
    return {**vars(alarm.seen), "ringing": alarm.ringing, "since": alarm.since}


def _said(alarm: Alarm) -> str:
    seen = alarm.seen
    least, most = ALLOWED[seen.name]
    title, meaning = MEANINGS[seen.name]
    what = ("alarm: " if alarm.ringing else "alarm over: ") + title + (f" of {seen.expert}" if seen.expert else "")
    if seen.found is None or seen.low is None or seen.high is None:
        return f"{what}; too few requests to say more"
    figures = f"{seen.found:.3f} [{seen.low:.3f}, {seen.high:.3f}] of {seen.rows}, allowed {least:.3g} to {most:.3g}"
    advice = f"; {meaning} See the section of that name in docs/operating.md" if alarm.ringing else ""
    return f"{what}: {figures}{advice}"


def _notice(alarm: Alarm) -> dict[str, Any]:
    """`text` is what chats show of it."""
    return {"text": _said(alarm), "status": "raised" if alarm.ringing else "over", **alarm.as_json()}
