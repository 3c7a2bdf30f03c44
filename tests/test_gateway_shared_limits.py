"""Several workers on one database: what is granted to all of them together never exceeds a budget or a rate."""

import asyncio
import threading
import time
from contextlib import suppress

import pytest
from sqlalchemy import select, update

from deferral.gateway import shared_limits as module
from deferral.gateway.accounts import Refused
from deferral.gateway.keys import ANYONE, Key
from deferral.gateway.ledger import Ledger
from deferral.gateway.limits import Limits
from deferral.gateway.record import Record
from deferral.gateway.schema import grants
from deferral.gateway.settings import Settings
from deferral.gateway.shared_limits import SharedLimits, limits_of
from tests.gateway_rows import row
from tests.several_workers import KEY, Workers, at_noon, granted


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


def test_who_asks_what_is_left_hears_of_the_others_also_where_nothing_is_spent(
    worker: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = at_noon(worker), at_noon(worker)
    assert asyncio.run(two.left_now(KEY)) == 1.0
    one.hold(KEY, 0.01).settle(0.6)
    one.tell()
    assert asyncio.run(two.left_now(KEY)) == 1.0, "who asks again and again does not reach the database each time"
    monkeypatch.setattr(module, "_TELL", 0.0)
    assert asyncio.run(two.left_now(KEY)) == pytest.approx(0.4)
    assert granted(two) == pytest.approx(0.6), "to ask takes no part"
    one.hold(KEY, 0.01).settle(0.0)
    assert granted(two) > 0.6
    assert asyncio.run(two.left_now(KEY)) == pytest.approx(0.4), "what another worker has and has not spent is left"
    assert asyncio.run(two.left_now(ANYONE)) is None


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


def test_at_the_start_nothing_is_asked_of_the_ledger(worker: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = worker()
    with monkeypatch.context() as patched:
        patched.setattr(gate.ledger, "exchange", lambda *_, **__: pytest.fail("thousands of keys may have a budget"))
        gate.load([KEY])
    gate.hold(KEY, 0.5).settle(0.5)
    assert gate.left(KEY) == 0.5


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


def test_what_those_that_ended_have_spent_counts_once_however_long_ago_that_was(worker: Workers) -> None:
    one = worker()
    one.hold(KEY, 0.25).settle(0.25)
    one.close()
    with one.ledger.engine.begin() as connection:
        connection.execute(update(grants).values(seen=time.time() - 31))
    assert worker().left(KEY) == pytest.approx(0.75)


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


def test_what_a_worker_told_before_it_was_taken_for_dead_counts_once(worker: Workers) -> None:
    one, two = worker(), worker()
    one.hold(KEY, 0.25).settle(0.25)
    one.tell()
    one._record.add(row(1, key="k", time=time.time(), price=0.25))
    one._record.stop()
    with one.ledger.engine.begin() as connection:
        connection.execute(update(grants).where(grants.c.worker == one.ledger.worker).values(seen=time.time() - 31))
    two.hold(KEY, 0.0).settle(0.0)
    one.hold(KEY, 0.125).settle(0.125)
    for gate in (one, two, one, two):
        gate.tell()
    assert granted(two) == pytest.approx(0.375)
    one.close()
    assert granted(two) == pytest.approx(0.375)


def test_a_worker_with_a_request_under_way_is_alive(worker: Workers) -> None:
    gate = worker()
    with gate.hold(KEY, 0.01):
        # The second gives back what it does not need; from then on there is no news.
        gate.tell()
        gate.tell()
        with gate.ledger.engine.begin() as connection:
            connection.execute(update(grants).values(seen=0.0))
        gate.tell()
        with gate.ledger.engine.connect() as connection:
            seen = dict(connection.execute(select(grants.c.worker, grants.c.seen)).all())
    assert seen[gate.ledger.worker] == pytest.approx(time.time(), abs=20)


def aged(gate: SharedLimits, *ledgers: Ledger) -> None:
    """These were not heard of for longer than a worker that lives."""
    with gate.ledger.engine.begin() as connection:
        for ledger in ledgers:
            connection.execute(update(grants).where(grants.c.worker == ledger.worker).values(seen=time.time() - 31))


def spend_unshared(gate: SharedLimits, dollars: float) -> None:
    gate._record.add(row(9, key="k", time=time.time(), price=dollars))
    gate._record.stop()


def test_whoever_comes_when_all_others_are_dead_believes_the_record(worker: Workers) -> None:
    gate = worker()
    dead, heir = gate.ledger, Ledger(gate.ledger.engine)
    dead.exchange("k", 0.0, 1.0, granted=0.05, spent=0.01, known=False)
    spend_unshared(gate, 0.5)
    aged(gate, dead)
    assert heir.exchange("k", 0.0, 1.0, granted=0.0, spent=0.0, known=False).free == 0.5


def test_a_worker_that_dies_has_not_spent_what_another_has(worker: Workers) -> None:
    gate = worker()
    dead, heir = gate.ledger, Ledger(gate.ledger.engine)
    heir.exchange("k", 0.0, 1.0, granted=0.25, spent=0.0, known=False)
    dead.exchange("k", 0.0, 1.0, granted=0.125, spent=0.0, known=False)
    # It is the heir's, who has not told of it yet.
    spend_unshared(gate, 0.25)
    aged(gate, dead)
    assert heir.exchange("k", 0.0, 1.0, granted=0.25, spent=0.0, known=True).free == 0.625
    # Should it live after all, what it has spent is not counted a second time at its end.
    dead.retire("k", 0.0, 0.125)
    assert heir.exchange("k", 0.0, 1.0, granted=0.25, spent=0.0, known=True).free == 0.625


def test_whoever_joins_has_spent_what_it_says_beside_what_is_on_record(worker: Workers) -> None:
    gate = worker()
    one, other = gate.ledger, Ledger(gate.ledger.engine)
    other.exchange("k", 0.0, 1.0, granted=0.0, spent=0.0, known=False)
    spend_unshared(gate, 0.5)
    assert one.exchange("k", 0.0, 1.0, granted=0.25, spent=0.25, known=False, joins=True).free == 0.25


def test_of_an_admission_what_was_used_counts_and_the_rest_comes_back(worker: Workers) -> None:
    ledger = worker().ledger
    first = ledger.admit("k", 10, 4, None)
    assert ledger.admit("k", 10, 10, (first.id, 3)).count == 7
    assert ledger.admit("k", 10, 1, None).count == 0


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


def test_limits_are_shared_wherever_another_worker_may_be(database: str) -> None:
    record = Record(database)
    kinds = [type(limits_of(record, Settings(database=database, workers=count))) for count in (1, 2)]
    assert kinds == [SharedLimits if "postgresql" in database else Limits, SharedLimits]
    with pytest.raises(ValueError, match="workers: expected 1 to 256"):
        Settings(workers=0)
