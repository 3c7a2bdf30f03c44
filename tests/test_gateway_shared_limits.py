"""Several workers on one database: what is granted to all of them together never exceeds a budget or a rate."""

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from sqlalchemy import select, update

from deferral.gateway import ledger as ledger_module
from deferral.gateway import shared_limits as module
from deferral.gateway.dialects import insert_rows
from deferral.gateway.keys import ANYONE, Key
from deferral.gateway.ledger import LIFE, SILENT, Ledger, Part, recorded
from deferral.gateway.limits import Limits, Refused
from deferral.gateway.record import Record
from deferral.gateway.rows import values
from deferral.gateway.schema import decisions, grants
from deferral.gateway.settings import Settings
from deferral.gateway.shared_limits import SharedLimits, limits_of
from deferral.gateway.windows import span, time_zone
from tests.gateway_rows import row


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


@pytest.fixture
def worker(database: str) -> Iterator[Workers]:
    made = Workers(database)
    yield made
    made.end()


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


PRICE = 1 / 32
NUMBERS = itertools.count()
NOON = datetime(2026, 6, 17, 12, tzinfo=UTC).timestamp()
KEY = Key("k", "k", budget=1.0, window="month")


def test_threads_of_three_workers_overspend_by_what_is_in_flight(worker: Workers) -> None:
    """Every request costs twice what was expected."""
    gates, lock, bought, threads = [worker() for _ in range(3)], threading.Lock(), [], 6

    def ask(gate: SharedLimits) -> None:
        refused = 0
        while refused < 3:
            try:
                hold = gate.hold(KEY, 0.01)
            except Refused as refusal:
                assert (refusal.status, refusal.code) == (429, "insufficient_quota")  # noqa: PT017
                refused += 1
                gate.tell()
                time.sleep(0.1)
                continue
            with lock:
                bought.append(0.02)
            hold.settle(0.02)

    running = [threading.Thread(target=ask, args=[gates[number % 3]]) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert 1.0 - 0.02 <= sum(bought) <= 1.0 + threads * 0.02 + 1e-9
    for gate in gates:
        gate.tell()
    assert granted(gates[0]) == pytest.approx(sum(bought))
    with suppress(Refused):
        # What is left is known as of the last time that this worker asked.
        gates[0].hold(KEY, 0.01).settle(0.0)
    assert gates[0].left(KEY) == pytest.approx(max(1.0 - sum(bought), 0.0), abs=1e-9)


def test_a_request_whose_part_others_used_up_meanwhile_asks_for_another(worker: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = at_noon(worker)
    flying, real, calls = [gate.hold(KEY, 0.01) for _ in range(6)], gate.ledger.exchange, []

    def exchange(*arguments, **options):
        calls.append(arguments)
        part = real(*arguments, **options)
        if len(calls) == 1:
            # All of them cost more than was expected while the ledger is asked.
            for hold in flying:
                hold.settle(0.05)
        return part

    monkeypatch.setattr(gate.ledger, "exchange", exchange)
    gate.hold(KEY, 0.01).settle(0.01)
    assert len(calls) == 2
    assert gate.known([KEY]) == [(KEY, pytest.approx(0.31))]


def test_parts_are_small_and_come_back(worker: Workers) -> None:
    one, two = worker(), worker()
    one.hold(KEY, 0.01).settle(0.01)
    assert granted(one) == pytest.approx(1 / 16)
    assert two.left(KEY) == pytest.approx(15 / 16)
    assert [gate.known([KEY]) for gate in (one, two)] == [[(KEY, pytest.approx(spent))] for spent in (0.01, 0.0)]
    one.tell()
    two._exchange(KEY, two._accounts["k"])  # type: ignore[arg-type]
    assert two.known([KEY]) == [(KEY, pytest.approx(0.01))], "what another has and has not spent is not spent"
    # All that is left is wanted at once: what the first does not need comes back after two rounds without a request.
    with pytest.raises(Refused) as refused:
        two.hold(KEY, 0.98)
    assert refused.value.retry_after == 1.0
    one.tell()
    one.tell()
    assert granted(one) == pytest.approx(0.01)
    two._accounts["k"].no_better_until = 0.0  # type: ignore[attr-defined]
    two.hold(KEY, 0.98).settle(0.98)
    two.tell()
    with pytest.raises(Refused) as refused:
        one.hold(KEY, 0.02)
    assert refused.value.retry_after > 60
    one.hold(KEY, 0.005).settle(0.0)
    one.hold(ANYONE, 5.0).settle(7.0)
    assert one.left(ANYONE) is None


def test_workers_that_are_asked_all_the_time_do_not_keep_what_none_can_use(worker: Workers) -> None:
    gates = [worker() for _ in range(3)]
    for gate in gates:
        gate.hold(KEY, 0.3).settle(0.0)
    sold = 0
    for _ in range(4):
        for gate in gates:
            # Each has .3, together they have .9; nobody has the .4 that every request wants.
            with suppress(Refused):
                gate.hold(KEY, 0.4).settle(0.4)
                sold += 1
            gate._accounts["k"].no_better_until = 0.0  # type: ignore[attr-defined]
        for gate in gates:
            gate.tell()
    assert sold == 2


def test_most_requests_need_no_database(worker: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, exchanges = worker(), []
    exchange = gate.ledger.exchange
    monkeypatch.setattr(gate.ledger, "exchange", lambda *a, **k: (exchanges.append(1), exchange(*a, **k))[1])
    asked = 0
    while True:
        try:
            gate.hold(KEY, 1e-4).settle(1e-4)
            asked += 1
        except Refused:
            break
    assert asked == pytest.approx(10_000, abs=1)
    assert len(exchanges) < 150
    for _ in range(50):
        with pytest.raises(Refused):
            gate.hold(KEY, 1e-4)
    assert len(exchanges) < 152, "who is refused must not reach the database each time"


def test_what_was_spent_before_and_by_those_that_ended_counts(worker: Workers, database: str) -> None:
    before = Record(database)
    before.start()
    before.add(row(1, key="k", time=time.time(), price=0.25))
    before.stop()
    one = worker()
    assert one.left(KEY) == 0.75
    one.hold(KEY, 0.5).settle(0.5)
    one.close()
    two = worker()
    assert two.left(KEY) == pytest.approx(0.25)
    with two.ledger.engine.connect() as connection:
        [kept] = connection.execute(select(grants)).all()
    assert (kept.worker, kept.granted, kept.spent) == ("", 0.75, 0.75)


def test_a_worker_that_dies_has_spent_what_is_on_record(worker: Workers) -> None:
    dead, heir = worker(), worker()
    heir.hold(KEY, 0.001).settle(0.001)
    heir.tell()
    dead.hold(KEY, 0.04).settle(0.03)
    dead.tell()
    # It tells no more of the next, which is on record.
    dead.hold(KEY, 0.02).settle(0.02)
    for number, price in enumerate((0.001, 0.03, 0.02)):
        dead._record.add(row(number, key="k", time=time.time(), price=price))
    dead._record.stop()
    assert heir.left(KEY) is not None
    with heir.ledger.engine.begin() as connection:
        connection.execute(update(grants).where(grants.c.worker == dead.ledger.worker).values(seen=time.time() - 31))
    heir.tell()
    assert granted(heir) - heir._accounts["k"].unspent == pytest.approx(0.051)


def test_a_worker_that_was_taken_for_dead_spends_nothing_twice(worker: Workers) -> None:
    one, two = worker(), worker()
    flying = one.hold(KEY, 0.01)
    with one.ledger.engine.begin() as connection:
        connection.execute(update(grants).values(seen=time.time() - 31))
    two.hold(KEY, 0.001).settle(0.001)
    flying.settle(0.01)
    one.tell()
    one.hold(KEY, 0.01).settle(0.01)
    for gate in (one, two, one, two):
        gate.tell()
    assert granted(two) == pytest.approx(0.021, abs=0.0101)
    assert granted(two) >= 0.021 - 1e-9


def test_a_part_that_was_not_confirmed_for_long_is_not_spent(worker: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = worker()
    gate.hold(KEY, 0.001).settle(0.001)
    monkeypatch.setattr(module, "time", type("Later", (), {"monotonic": lambda: time.monotonic() + 20, "time": time.time}))
    monkeypatch.setattr(gate.ledger, "exchange", lambda *_, **__: (_ for _ in ()).throw(module.SQLAlchemyError()))
    with pytest.raises(Refused, match="the database fails") as refused:
        gate.hold(KEY, 0.001)
    assert refused.value.status == 503


@pytest.mark.parametrize("rate", [5, 2400])
def test_in_a_minute_all_workers_admit_what_a_key_may_ask(worker: Workers, rate: int) -> None:
    gates, key = [worker() for _ in range(3)], Key("k", "k", requests_per_minute=rate)
    began = time.monotonic()

    async def ask(gate: SharedLimits) -> int:
        async def one() -> int:
            admitted = 0
            for _ in range(rate):
                try:
                    await gate.admitted(key)
                except Refused as refused:
                    assert (refused.status, refused.code) == (429, "rate_limit_exceeded")  # noqa: PT017
                    assert 0 < refused.retry_after <= 61  # noqa: PT017
                    break
                admitted += 1
            return admitted

        return sum(await asyncio.gather(*(one() for _ in range(4))))

    admitted: list[int] = []
    threads = [threading.Thread(target=lambda gate=gate: admitted.append(asyncio.run(ask(gate)))) for gate in gates]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < 55
    # What one worker took for a moment and did not use is another's only when that is over.
    assert rate - 3 * (rate // 240) <= sum(admitted) <= rate


def test_a_key_that_asks_seldom_is_not_charged_for_what_it_does_not_ask(worker: Workers) -> None:
    gate, key = worker(), Key("k", "k", requests_per_minute=1200)
    for _ in range(40):
        gate.admit(key)
    later = gate._rates["k"]
    later.until = 0.0
    gate.admit(key)
    with gate.ledger.engine.connect() as connection:
        taken = connection.exec_driver_sql("SELECT sum(count) FROM admissions").scalar_one()
    assert taken <= 41 + later.left
    gate.admit(ANYONE)


def test_the_event_loop_does_not_wait_for_the_database(worker: Workers) -> None:
    gate, key = worker(), Key("k", "k", budget=1.0, requests_per_minute=60)
    asked: list[threading.Event] = []
    in_time: list[bool] = []
    exchange = gate.ledger.exchange

    def waiting(*arguments, **options):
        asked.append(seen := threading.Event())
        in_time.append(seen.wait(10))
        return exchange(*arguments, **options)

    async def ask() -> None:
        async def watch() -> None:
            while True:
                await asyncio.sleep(0.001)
                for seen in asked:
                    seen.set()

        watching = asyncio.create_task(watch())
        gate.ledger.exchange = waiting  # type: ignore[method-assign]
        await gate.admitted(key)
        (await gate.held(key, 0.01)).settle(0.01)
        watching.cancel()

    asyncio.run(ask())
    assert in_time, "the database was asked"
    assert all(in_time), "and meanwhile the loop went on"


def test_a_client_that_leaves_while_the_database_is_asked_holds_nothing(worker: Workers) -> None:
    gate = worker()
    slow = gate.ledger.exchange
    gate.ledger.exchange = lambda *a, **k: (time.sleep(0.1), slow(*a, **k))[1]  # type: ignore[method-assign]

    async def leave() -> None:
        await gate.admitted(KEY)
        asking = asyncio.create_task(gate.held(KEY, 0.01))
        await asyncio.sleep(0.03)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.sleep(0.2)

    asyncio.run(leave())
    account = gate._accounts["k"]
    assert (account.held, account.flying, account.spent) == (0.0, 0, 0.0)
    assert account.granted > 0


def test_a_database_that_does_not_answer_is_one_that_fails(worker: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST", 0.05)
    gate, answers = worker(), threading.Event()
    gate.load([KEY])
    for name in ("exchange", "admit"):
        asked = getattr(gate.ledger, name)
        monkeypatch.setattr(gate.ledger, name, lambda *a, asked=asked, **k: (answers.wait(10), asked(*a, **k))[1])

    async def ask() -> list[Refused]:
        rated = Key("r", "r", requests_per_minute=60)
        # More than there are threads.
        asking = [gate.held(KEY, 0.01) for _ in range(8)] + [gate.admitted(rated) for _ in range(8)]
        refused = await asyncio.gather(*asking, return_exceptions=True)
        answers.set()
        await asyncio.to_thread(gate._pool.shutdown)
        await asyncio.sleep(0.01)
        return refused  # type: ignore[return-value]

    refused = asyncio.run(ask())
    assert {(one.status, one.code) for one in refused} == {(503, "record_unavailable")}
    account = gate._accounts["k"]
    assert (account.held, account.flying, account.spent) == (0.0, 0, 0.0)


def test_a_worker_whose_clock_is_fast_takes_nothing_from_this_window(worker: Workers) -> None:
    key = replace(KEY, window="hour")
    one, fast, late = at_noon(worker), worker(), at_noon(worker)
    fast._clock = lambda: NOON + 3600
    one.hold(key, 0.75).settle(0.75)
    one.tell()
    fast.hold(key, 0.5).settle(0.5)
    with pytest.raises(Refused):
        late.hold(key, 0.5)
    assert granted_in(one, key) == pytest.approx(0.75, abs=1 / 16)


def spend(gate: SharedLimits, key: Key, dollars: float) -> None:
    """Of the account, where there is one, and on record at once."""
    gate.hold(key, dollars).settle(dollars)
    with gate.ledger.engine.begin() as connection:
        insert_rows(connection, decisions, [values(row(next(NUMBERS), key=key.id, time=NOON, price=dollars))])


def test_a_lower_budget_takes_back_what_was_granted(worker: Workers) -> None:
    gates = one, two = at_noon(worker), at_noon(worker)
    for gate in gates:
        gate.load([KEY])
        gate.hold(KEY, 0.3).settle(0.3)
    # Each has more than it spent; of 0.5 nothing is left.
    lower = replace(KEY, budget=0.5)
    for gate in gates:
        gate.follow([lower])
    for gate in gates:
        for key in (lower, KEY):  # a request may have begun before the change
            with pytest.raises(Refused):
                gate.hold(key, 0.001)
        assert gate.left(lower) == 0.0
    assert granted(one) == pytest.approx(0.6)
    higher = replace(KEY, budget=0.75)
    for gate in gates:
        gate.follow([higher])
    two.hold(higher, 0.14).settle(0.14)
    with pytest.raises(Refused):
        one.hold(higher, 0.02)


def test_another_window_counts_what_all_workers_spent(worker: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three workers hear of it one after the other, and spend in between; then it changes back."""
    monkeypatch.setattr("deferral.gateway.limits.WRITTEN_WITHIN", 0.0)
    gates = [at_noon(worker) for _ in range(3)]
    for gate in gates:
        gate.load([KEY])
        spend(gate, KEY, PRICE)
    # Twice what others spent and told nobody as yet, which is a second's, may count twice.
    for key, untold in ((replace(KEY, window="day"), 0), (KEY, 2)):
        for gate in gates:
            gate.follow([key])
            for each in gates:
                spend(each, key, PRICE)
                if not untold:
                    each.tell()
        for gate in gates:
            gate.tell()
            gate.tell()
        with gates[0].ledger.engine.connect() as connection:
            total = recorded(connection, "k", 0.0)
        assert total - 1e-9 <= granted_in(gates[0], key) <= total + untold * PRICE + 1e-9
    total = granted_in(gates[0], KEY)
    for gate in gates:
        with pytest.raises(Refused):
            gate.hold(KEY, 1 - total + 0.001)
    gates[1]._accounts["k"].no_better_until = 0.0  # type: ignore[attr-defined]
    gates[1].hold(KEY, 1 - total - 0.001).settle(0.0)


def test_what_no_worker_was_told_is_on_record(worker: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget ends and comes back: neither who counted before nor who comes new has what was spent in between."""
    monkeypatch.setattr("deferral.gateway.limits.WRITTEN_WITHIN", 0.0)
    one, two, free = at_noon(worker), at_noon(worker), replace(KEY, budget=None)
    for gate in (one, two):
        gate.load([KEY])
        spend(gate, KEY, 0.125)
        gate.tell()
        gate.follow([free])
        spend(gate, free, 0.125)
        gate.tell()
    one.hold(KEY, 0.001).settle(0.0)  # late: its account is there again
    spend(one, free, 0.125)
    three = at_noon(worker)
    for gate in (one, two, three):
        gate.load([KEY]) if gate is three else gate.follow([KEY])
    for gate in (one, two, three):
        assert 0.25 <= gate.left(KEY) <= 0.375 + 1e-9  # type: ignore[operator]
        with pytest.raises(Refused):
            gate.hold(KEY, 0.376)


def test_another_rate_holds_at_once(worker: Workers) -> None:
    gate, key = worker(), Key("k", "k", requests_per_minute=2)
    gate.admit(key)
    gate.admit(key)
    for refused in (key, replace(key, requests_per_minute=1)):
        with pytest.raises(Refused):
            gate.admit(refused)
    gate.admit(replace(key, requests_per_minute=3))
    with pytest.raises(Refused):
        gate.admit(replace(key, requests_per_minute=3))


def test_limits_are_shared_wherever_another_worker_may_be(database: str) -> None:
    record = Record(database)
    kinds = [type(limits_of(record, Settings(database=database, workers=count))) for count in (1, 2)]
    assert kinds == [SharedLimits if "postgresql" in database else Limits, SharedLimits]
    with pytest.raises(ValueError, match="workers: expected 1 to 256"):
        Settings(workers=0)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_rate_does_not_wait_for_a_clock_that_was_set_back(
    worker: Workers, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    key, ahead = Key("k", "r", requests_per_minute=3), [7200.0]
    monkeypatch.setattr(ledger_module, "clock", lambda connection: NOON + ahead[0])
    gates = [worker().ledger for _ in range(workers)]
    assert gates[0].admit(key.id, 3, 3, None).count == 3
    assert gates[-1].admit(key.id, 3, 1, None).wait == pytest.approx(60 + LIFE)
    ahead[0] = 0.0
    assert gates[-1].admit(key.id, 3, 3, None).count == 3
    assert gates[0].admit(key.id, 3, 1, None).wait == pytest.approx(60 + LIFE), "what is admitted now counts"


def test_a_dead_worker_is_known_as_one_after_a_clock_was_set_back(worker: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    at = [NOON + 7200.0]
    monkeypatch.setattr(ledger_module, "clock", lambda connection: at[0])
    dead, other = worker().ledger, worker().ledger

    def tell(who: Ledger, known: bool, spent: float = 0.0, granted: float = 0.0, wanted: float = 0.0) -> Part:
        return who.exchange("k", NOON, 1.0, granted=granted, spent=spent, wanted=wanted, known=known)

    had = tell(dead, False, wanted=0.5).added
    assert had >= 0.5
    at[0] = NOON
    assert tell(other, False, wanted=0.1).free < 0.5, "the first may be alive as well"
    at[0] += SILENT + 1
    assert tell(other, True, granted=0.1, wanted=0.8).added >= 0.8
    assert tell(dead, True, granted=had).lost
