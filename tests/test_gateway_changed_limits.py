"""Budgets, windows and rates of a key that are changed while it is in use."""

from dataclasses import replace

import pytest
from sqlalchemy.exc import SQLAlchemyError

from deferral.gateway.accounts import Refused
from deferral.gateway.keys import ANYONE, Key
from deferral.gateway.limits import Limits
from deferral.gateway.windows import span, time_zone
from tests.limits_at_noon import NOON, Clock, Spent, limits


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deferral.gateway.limits.WRITTEN_WITHIN", 0.0)


def test_another_budget_holds_for_what_was_spent_already() -> None:
    gate, key = limits(Clock()), Key("k", "k", budget=1.0)
    gate.load([key])
    flying = gate.hold(key, 0.25)
    gate.hold(key, 0.5).settle(0.5)
    lower = replace(key, budget=0.5)
    gate.follow([lower, ANYONE])
    assert gate.left(lower) == 0.0
    with pytest.raises(Refused, match=r"budget of \$0.5 a month"):
        gate.hold(lower, 0.0)
    # A request that began with the key as it was is refused as well.
    with pytest.raises(Refused):
        gate.hold(key, 0.0)
    higher = replace(key, budget=4.0)
    gate.follow([higher])
    assert gate.left(higher) == 3.25
    flying.settle(0.5)
    gate.hold(higher, 3.0).settle(3.0)
    assert gate.left(higher) == 0.0


def test_of_keys_that_are_gone_nothing_is_kept_but_for_requests_under_way() -> None:
    keys = [Key(name, name, budget=1.0, requests_per_minute=5) for name in ("done", "flying", "stays")]
    gate = limits(Clock())
    gate.load(keys)
    for key in keys:
        gate.admit(key)
    flying = gate.hold(keys[1], 0.25)
    gate.follow(keys[2:])
    assert gate._keys.keys() == gate._minutes.keys() == gate._accounts.keys() == {"flying", "stays"}
    flying.settle(0.5)
    gate.follow(keys[2:])
    assert gate._keys.keys() == gate._minutes.keys() == gate._accounts.keys() == {"stays"}


def test_another_window_counts_from_the_record(no_wait: None) -> None:
    """An account of a day, with a request in flight, goes to a month and back, and so to another time zone."""
    clock = Clock()
    record = Spent((NOON - 48 * 3600, 0.5), (NOON - 3 * 3600, 0.0625), (NOON - 3600, 0.125))
    gate, day = Limits(record, clock), Key("k", "k", budget=2.0, window="day")  # type: ignore[arg-type]
    gate.load([day])
    gate.hold(day, 0.25).settle(0.25)
    record.rows.append((NOON, 0.25))
    flying = gate.hold(day, 0.5)
    assert gate.left(day) == 2.0 - 0.4375 - 0.5
    month = replace(day, window="month")
    gate.follow([month])
    assert gate.left(month) == 2.0 - 0.9375 - 0.5
    assert gate.left(day) == gate.left(month), "a request that began before must not turn it back"
    flying.settle(0.25)
    record.rows.append((NOON, 0.25))
    assert gate.left(month) == 2.0 - 0.9375 - 0.25
    gate.follow([day])
    assert gate.left(day) == 2.0 - 0.4375 - 0.25
    # In Kiribati it is two in the morning of the next day, and nine o'clock was yesterday.
    kiribati = replace(day, zone="Pacific/Kiritimati")
    gate.follow([kiribati])
    assert gate.left(kiribati) == 2.0 - 0.125 - 0.25 - 0.25
    clock.now = span("day", NOON, time_zone("Pacific/Kiritimati")).end
    assert gate.left(kiribati) == 2.0


def test_what_is_spent_while_an_account_moves_to_another_window_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, day = Limits(Spent(), Clock()), Key("k", "k", budget=2.0, window="day")  # type: ignore[arg-type]
    gate.load([day])
    # Not on record yet when that is read.
    monkeypatch.setattr("deferral.gateway.limits.time.sleep", lambda seconds: gate.hold(day, 0.25).settle(0.25))
    month = replace(day, window="month")
    gate.follow([month])
    assert gate.left(month) == 1.75


def test_a_request_that_began_before_its_key_was_changed_opens_no_window_with_the_earlier_budget() -> None:
    clock, key = Clock(), Key("k", "k", budget=1.0, window="hour")
    gate, lower = limits(clock), replace(key, budget=0.25)
    gate.load([key])
    gate.follow([lower])
    clock.now += 3600
    with pytest.raises(Refused, match="does not cover this request"):
        gate.hold(key, 0.5)


def test_what_was_spent_without_a_budget_counts_when_there_is_one_again(no_wait: None) -> None:
    record = Spent()
    gate, key = Limits(record, Clock()), Key("k", "k", budget=1.0)  # type: ignore[arg-type]
    gate.load([key])
    gate.hold(key, 0.25).settle(0.25)
    record.rows.append((NOON, 0.25))
    free = replace(key, budget=None)
    gate.follow([free])
    assert gate.left(free) is None
    gate.hold(free, 5.0).settle(0.5)
    record.rows.append((NOON, 0.5))
    # Of before the change, and late: an account comes back, which nobody tells of what is spent beside it.
    gate.hold(key, 0.125).settle(0.0)
    gate.hold(free, 5.0).settle(0.125)
    record.rows.append((NOON, 0.125))
    gate.follow([key])
    assert gate.left(key) == 0.125


def test_what_is_in_flight_when_a_key_first_gets_a_budget_counts_in_it(no_wait: None) -> None:
    record = Spent()
    gate, free = Limits(record, Clock()), Key("k", "k")  # type: ignore[arg-type]
    gate.load([free])
    stream, other = gate.hold(free, 0.0), gate.hold(free, 0.0)
    other.settle(0.125)
    record.rows.append((NOON, 0.125))
    key = replace(free, budget=1.0)
    gate.follow([key])
    assert gate.left(key) == 0.875
    stream.settle(0.5)
    assert gate.left(key) == 0.375
    # Without a budget nothing is counted, then or later.
    gate.follow([free])
    late = gate.hold(free, 0.0)
    late.settle(0.5)
    assert gate.left(free) is None


def test_what_is_in_flight_while_a_key_has_no_budget_counts_when_it_has_one_again(no_wait: None) -> None:
    gate, key = Limits(Spent(), Clock()), Key("k", "k", budget=1.0)  # type: ignore[arg-type]
    gate.load([key])
    stream = gate.hold(key, 0.5)
    gate.follow([replace(key, budget=None)])
    gate.follow([key])
    assert gate.left(key) == 0.5
    stream.settle(0.5)
    assert gate.left(key) == 0.5


def test_a_window_that_cannot_be_read_is_tried_again(no_wait: None, caplog: pytest.LogCaptureFixture) -> None:
    record = Spent((NOON - 48 * 3600, 0.5))
    gate, day = Limits(record, Clock()), Key("k", "k", budget=1.0, window="day")  # type: ignore[arg-type]
    gate.load([day])
    month = replace(day, window="month")
    record.trouble = "the disk is full"
    gate.follow([month])
    assert gate.left(month) == 1.0
    record.trouble, read = "", record.spent
    record.spent = lambda *_: (_ for _ in ()).throw(SQLAlchemyError())  # type: ignore[method-assign]
    gate.follow([month])
    assert gate.left(month) == 1.0
    # It is the same reason, and said once.
    assert [line.levelname for line in caplog.records] == ["ERROR"]
    record.spent = read  # type: ignore[method-assign]
    gate.follow([month])
    assert gate.left(month) == 0.5
    # A zone that this machine does not know keeps no other key from its change.
    gate.follow([replace(month, zone="Mars/Olympus"), ANYONE])
    gate.follow([replace(month, budget=2.0)])
    assert gate.left(month) == 1.5


def test_another_rate_holds_for_what_was_asked_already() -> None:
    clock = Clock()
    gate, key = limits(clock), Key("k", "k", requests_per_minute=3)
    for _ in range(3):
        gate.admit(key)
        clock.now += 1
    gate.admit(replace(key, requests_per_minute=4))
    clock.now += 1
    with pytest.raises(Refused) as refused:
        gate.admit(replace(key, requests_per_minute=1))
    # Four were asked at seconds 0 to 3: one may be when the last of them is a minute old.
    assert refused.value.retry_after == 59
