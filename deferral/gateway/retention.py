"""What is over its time is deleted, a little at a time: texts, and decisions with the feedback on them."""

import time
from collections.abc import Callable

from sqlalchemy import ColumnElement, Connection, Engine, Table, delete, literal, select

from deferral.gateway.database import durable, scrub
from deferral.gateway.dialects import if_alone, writing
from deferral.gateway.forgetting import forget_some, old_costs
from deferral.gateway.schema import decisions, feedback, forgotten, shadows, texts

__all__ = ["Retention"]

_AT_ONCE = 400
_EVERY = 60.0
_SCRUB_AGAIN = 1.0
# A pause of so many times what a batch took: requests want the core, and other workers the database.
_PAUSE = 3.0
_DAY = 86400.0


class Retention:
    """Texts are kept until they expire and at most `text_days`, decisions and feedback `record_days`; None is no limit.

    What deleted decisions have cost stays in the budgets, and in the sums by the minute, which hold no keys.
    """

    def __init__(
        self, engine: Engine, *, text_days: float | None, record_days: float | None, clock: Callable[[], float] = time.time
    ) -> None:
        self._engine, self._text_days, self._record_days, self._clock = engine, text_days, record_days, clock
        self.to_scrub = False

    def step(self) -> float:
        """Delete some of it.  -> seconds until there is more to do"""
        began = time.monotonic()
        with self._engine.connect() as connection:
            durable(connection, False)
            more = self._texts(connection)
            if self._record_days is not None:
                more |= self._decisions(connection, self._clock() - _DAY * self._record_days)
            if not more:
                connection.rollback()
                self._clear(connection, forgotten, old_costs(self._clock()))
                # Also of what others have deleted, a command or a process that was killed.
                self.to_scrub &= not scrub(connection)
        if more:
            return _PAUSE * (time.monotonic() - began)
        return _SCRUB_AGAIN if self.to_scrub else _EVERY

    def _texts(self, connection: Connection) -> bool:
        """Whether there may be more."""
        now = self._clock()
        over = [texts.c.expires <= now]
        if self._text_days is not None:
            # A retention time that was shortened holds for older texts too.
            over.append(texts.c.time <= now - _DAY * self._text_days)
        # Each condition by its own index.
        return any(self._some_texts(connection, one) for one in over)

    def _some_texts(self, connection: Connection, over: ColumnElement[bool]) -> bool:
        if connection.execute(select(texts.c.decision).where(over).limit(1)).first() is None:
            return False
        connection.rollback()
        # Several workers delete: each takes what no other is at.
        some = select(texts.c.decision).where(over).limit(_AT_ONCE).with_for_update(skip_locked=True)
        with writing(connection):
            gone = connection.execute(delete(texts).where(texts.c.decision.in_(some))).rowcount
        self.to_scrub = True
        return gone == _AT_ONCE

    def _decisions(self, connection: Connection, until: float) -> bool:
        """Whether there may be more."""
        d = decisions.c
        if connection.execute(select(d.id).where(d.time <= until).limit(1)).first() is None:
            connection.rollback()
            self._left_behind(connection, until)
            return False
        connection.rollback()
        with if_alone(connection, "forget") as mine:
            # Another worker is at it.
            if not mine:
                return False
            gone = forget_some(connection, d.time <= until, _AT_ONCE)
        self.to_scrub |= gone.texts > 0
        return gone.decisions == _AT_ONCE

    def _left_behind(self, connection: Connection, until: float) -> None:
        """What was written about a decision in the very moment of its deletion."""
        for table in (feedback, shadows):
            self._clear(connection, table, table.c.time <= until)

    @staticmethod
    def _clear(connection: Connection, table: Table, over: ColumnElement[bool]) -> None:
        if connection.execute(select(literal(1)).where(over).limit(1)).first() is not None:
            connection.rollback()
            with writing(connection):
                connection.execute(delete(table).where(over))
        connection.rollback()
