"""What changes while several workers grant from one database: budgets, windows, rates, and the clocks they go by."""

import itertools
from dataclasses import replace

import pytest

from deferral.gateway import ledger as ledger_module
from deferral.gateway.accounts import Refused
from deferral.gateway.dialects import insert_rows
from deferral.gateway.keys import Key
from deferral.gateway.ledger import LIFE, SILENT, Ledger, Part, recorded
from deferral.gateway.rows import values
from deferral.gateway.schema import decisions
from deferral.gateway.shared_limits import SharedLimits
from tests.gateway_rows import row
from tests.several_workers import KEY, NOON, Workers, at_noon, granted, granted_in

PRICE = 1 / 32
NUMBERS = itertools.count()


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
