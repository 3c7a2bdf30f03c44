"""Workers on one database, each with connections of its own, and what is granted to all of them."""

from sqlalchemy import select

from deferral.gateway.keys import Key
from deferral.gateway.record import Record
from deferral.gateway.schema import grants
from deferral.gateway.shared_limits import SharedLimits
from deferral.gateway.windows import span, time_zone
from tests.limits_at_noon import NOON

__all__ = ["KEY", "NOON", "Workers", "at_noon", "granted", "granted_in"]

KEY = Key("k", "k", budget=1.0, window="month")


class Workers:
    """As many as are asked for; each has its own connections, as a process has."""

    def __init__(self, database: str) -> None:
        self.database, self.records, self.gates = database, [], []

    def __call__(self) -> SharedLimits:
        record = Record(self.database)
        record.start()
        gate = SharedLimits(record)
        self.records.append(record)
        self.gates.append(gate)
        return gate

    def end(self) -> None:
        for gate in self.gates:
            gate.close()
        for record in self.records:
            record.stop()


def granted(gate: SharedLimits) -> float:
    with gate.ledger.engine.connect() as connection:
        rows = connection.execute(select(grants)).all()
    return sum(max(row.granted, row.spent) for row in rows)


def granted_in(gate: SharedLimits, key: Key) -> float:
    """Of the key's window at noon; another may have the rows of its own."""
    start = span(key.window, NOON, time_zone(key.zone)).start
    with gate.ledger.engine.connect() as connection:
        rows = connection.execute(select(grants).where(grants.c.start == start)).all()
    return sum(max(row.granted, row.spent) for row in rows)


def at_noon(worker: Workers) -> SharedLimits:
    """Another worker, whose window does not end while the test runs."""
    gate = worker()
    gate._clock = lambda: NOON
    return gate
