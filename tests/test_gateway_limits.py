"""How often a key may ask, and how much it may spend."""

import threading
from datetime import UTC
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deferral.gateway.accounts import LastMinute, Refused
from deferral.gateway.checking import _who_may_ask as who_may_ask
from deferral.gateway.keys import ANYONE, Key, Keys
from deferral.gateway.limits import Limits
from deferral.gateway.record import Record
from deferral.gateway.settings import Settings
from deferral.gateway.status import status
from deferral.gateway.windows import WINDOWS, span, time_zone
from tests.gateway_rows import row
from tests.limits_at_noon import NOON, Clock, NothingSpent, Spent, at, limits


def test_in_any_minute_at_most_so_many_requests() -> None:
    clock = Clock()
    gate, key = limits(clock), Key("k", "k", requests_per_minute=3)
    admitted, refusals = [], []
    for _ in range(400):
        try:
            gate.admit(key)
            admitted.append(clock.now)
        except Refused as refused:
            refusals.append((refused.status, refused.code, round(clock.now + refused.retry_after - admitted[-3], 3)))
        clock.now += 0.7
    assert set(refusals) == {(429, "rate_limit_exceeded", 60.0)}
    assert all(later - earlier >= 60 - 1e-6 for earlier, later in zip(admitted, admitted[3:], strict=False))
    assert len(admitted) == 3 * 5
    for back in (0.001, 30.0):
        clock.now -= back
        with pytest.raises(Refused):
            gate.admit(key)
    clock.now = NOON - 3600
    gate.admit(key)  # a clock that was set back locks nobody out
    gate.admit(ANYONE)


def test_a_clock_that_is_set_back_a_little_lets_nobody_ask_more_often() -> None:
    clock = Clock()
    gate, key = limits(clock), Key("k", "k", requests_per_minute=1)
    gate.admit(key)
    clock.now -= 30
    with pytest.raises(Refused):
        gate.admit(key)
    clock.now += 90
    gate.admit(key)  # a minute later, not a moment more


def test_of_the_requests_of_a_key_no_more_than_those_of_a_minute_are_remembered() -> None:
    minute = LastMinute()
    for second in range(1000):
        minute.move_to(second)
        minute.append(second)
    assert len(minute) == 60
    assert len(minute._times) <= 121


def test_a_budget_that_is_spent_refuses_what_is_expected_to_cost_nothing_too() -> None:
    gate, key = limits(Clock()), Key("k", "k", budget=1.0)
    gate.hold(key, 1.0).settle(1.0)
    with pytest.raises(Refused, match="does not cover this request"):
        gate.hold(key, 0.0)


def test_a_request_that_nobody_settles_has_cost_what_it_had_spent_by_then() -> None:
    gate, key = limits(Clock()), Key("k", "k", budget=1.0)
    with gate.hold(key, 0.5) as hold:
        hold.spent = 0.25
    assert gate.left(key) == 0.75


def test_no_request_is_taken_whose_row_could_not_be_kept() -> None:
    record = NothingSpent()
    record.full = True
    with pytest.raises(Refused, match="record") as refused:
        Limits(record, Clock()).admit(ANYONE)  # type: ignore[arg-type]
    assert refused.value.status == 503


def test_what_is_known_of_budgets_is_what_was_spent_or_set_aside_in_this_window() -> None:
    clock = Clock()
    gate, key, other = limits(clock), Key("k", "k", budget=1.0, window="day"), Key("o", "o", budget=2.0)
    assert gate.known([key, other, ANYONE]) == [], "nobody has asked yet"
    gate.hold(key, 0.25).settle(0.5)
    gate.hold(key, 0.25)
    assert gate.known([key, other, ANYONE]) == [(key, 0.75)]
    clock.now = NOON + 12 * 3600
    assert gate.known([key, other, ANYONE]) == []


def test_a_budget_is_held_then_settled_then_refused_until_its_window_ends() -> None:
    clock = Clock()
    gate, key = limits(clock), Key("k", "k", budget=1.0, window="day")
    first = gate.hold(key, 0.375)
    assert gate.left(key) == 0.625
    with pytest.raises(Refused, match="budget of \\$1 a day") as refused:
        gate.hold(key, 0.7)
    assert (refused.value.status, refused.value.code) == (429, "insufficient_quota")
    assert refused.value.retry_after == 12 * 3600
    with pytest.raises(Refused, match=r"budget of \$0.5 an hour does not cover this request; the next hour begins"):
        gate.hold(Key("h", "h", budget=0.5, window="hour"), 0.7)
    first.settle(0.875)
    assert gate.left(key) == 0.125
    with pytest.raises(RuntimeError, match="settled once"):
        first.settle(0.875)
    with pytest.raises(ValueError, match="not negative"):
        gate.hold(key, -1.0)
    with gate.hold(key, 0.125):
        assert gate.left(key) == 0
    assert gate.left(key) == 0.125
    gate.hold(key, 0.05).settle(0.5)  # dearer than expected: spent is spent
    assert gate.left(key) == 0
    with pytest.raises(Refused):
        gate.hold(key, 0.0)
    clock.now = NOON + 12 * 3600 - 1e-3
    assert gate.left(key) == 0
    clock.now = NOON + 12 * 3600
    assert gate.left(key) == 1.0
    assert gate.left(ANYONE) is None
    gate.hold(ANYONE, 5.0).settle(7.0)


def test_what_was_held_before_midnight_is_of_the_day_before() -> None:
    clock = Clock(NOON + 12 * 3600 - 1)
    gate, key = limits(clock), Key("k", "k", budget=1.0, window="day")
    flying = gate.hold(key, 0.8)
    clock.now += 2
    assert gate.left(key) == 1.0
    flying.settle(0.8)
    assert gate.left(key) == 1.0


def test_thrift_stretches_what_is_left() -> None:
    clock = Clock(NOON - 12 * 3600)
    gate, key = limits(clock), Key("k", "k", budget=1.0, window="day")
    assert gate.thrift(key) == 1.0
    gate.hold(key, 0.5).settle(0.5)
    assert gate.thrift(key) == 1.0
    gate.hold(key, 0.25).settle(0.25)
    assert gate.thrift(key) == pytest.approx(0.5)
    clock.now += 12 * 3600
    assert gate.thrift(key) == pytest.approx(0.5)
    clock.now += 6 * 3600  # a quarter is left of both: as planned
    assert gate.thrift(key) == pytest.approx(1.0)
    gate.hold(key, 0.25).settle(0.25)
    assert 0 < gate.thrift(key) < 1e-3
    assert gate.thrift(ANYONE) == 1.0


def test_holds_of_many_threads_never_exceed_the_budget() -> None:
    """Every request costs twice what was expected, and only requests in flight overspend."""
    gate, key = limits(Clock()), Key("k", "k", budget=1.0)
    lock, bought, threads = threading.Lock(), [], 8

    def ask() -> None:
        for _ in range(300):
            try:
                hold = gate.hold(key, 0.01)
            except Refused:
                continue
            with lock:
                bought.append(0.02)
            hold.settle(0.02)

    running = [threading.Thread(target=ask) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert sum(bought) >= 1.0 - 1e-9
    assert sum(bought) <= 1.0 + threads * 0.02 + 1e-9
    account = gate._accounts["k"]
    assert account.spent == pytest.approx(sum(bought))
    assert (account.held, account.flying) == (0.0, 0)


def test_a_zone_that_this_machine_does_not_know_stops_nobody_elses_requests(
    database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def only_utc(name: str):
        if name != "UTC":
            raise ValueError(f"time zone: got {name!r}")
        return time_zone(name)

    abroad, here = (Key(name, name, budget=1.0, zone=zone) for name, zone in (("a", "Europe/Berlin"), ("h", "UTC")))
    for module in ("limits", "status", "checking"):
        monkeypatch.setattr(f"deferral.gateway.{module}.time_zone", only_utc)
    record = Record(database)
    record.start()
    gate = Limits(record)
    gate.load([abroad, here])
    assert "Europe/Berlin" in caplog.text
    gate.hold(here, 0.1).settle(0.1)
    with pytest.raises(Refused, match="the budget of this key cannot be kept") as refused:
        gate.hold(abroad, 0.1)
    assert refused.value.status == 503
    shown = {budget.key: budget for budget in status(record.engine, [abroad, here]).budgets}
    assert (shown["a"].spent, shown["a"].ends) == (None, None)
    assert shown["h"].ends is not None
    assert [table.row_count for table in status(record.engine, [abroad, here]).tables()] == [2]
    faults = [one.text for one in who_may_ask(Settings(), [(abroad, True), (here, True)], None) if one.kind == "fault"]
    assert len(faults) == 1
    assert "Europe/Berlin" in faults[0]
    record.stop()


def test_a_budget_in_a_zone_that_this_machine_does_not_know_can_be_lifted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = Keys(str(tmp_path / "gateway.db"))
    keys.start()
    _, key = keys.create("alice", budget=1.0, zone="Europe/Berlin")
    monkeypatch.setattr("deferral.gateway.keys.time_zone", lambda name: {"UTC": UTC}[name])
    with pytest.raises(KeyError):
        keys.change(key.id, budget=2.0)
    assert keys.change(key.id, requests_per_minute=5)[1].requests_per_minute == 5
    assert keys.change(key.id, budget=None)[1].budget is None
    keys.close()


def test_a_budget_holds_across_restarts(database: str) -> None:
    key = Key("k", "k", budget=1.0, window="day", zone="Europe/Berlin")
    midnight = at("2026-06-17T00:00", "Europe/Berlin")
    record = Record(database)
    record.start()
    for number, (time, name, price) in enumerate(
        [(midnight - 1, "k", 0.5), (midnight, "k", 0.25), (midnight + 5, "other", 0.5), (midnight + 9, "k", 0.125)]
    ):
        record.add(row(number, time=time, key=name, price=price))
    record.stop()
    again = Record(database)
    again.start()
    gate = Limits(again, Clock())
    gate.load([key, ANYONE])
    assert gate.left(key) == 0.625
    again.stop()
    assert gate.left(key) == 0.625  # counted from here on, without the database


def test_a_database_that_fails_refuses_and_does_not_guess(tmp_path: Path) -> None:
    record = Record(str(tmp_path / "nothing" / "gateway.db"))
    with pytest.raises(Refused, match="cannot be read") as refused:
        Limits(record, Clock()).hold(Key("k", "k", budget=1.0), 0.1)
    assert refused.value.status == 503


def test_with_nothing_in_flight_nothing_is_held() -> None:
    gate, key = limits(Clock()), Key("k", "k", budget=1.0)
    flying = [gate.hold(key, dollars) for dollars in (0.1, 0.2)]
    for hold in flying:
        hold.settle(0.0)
    assert gate._accounts["k"].held == 0.0


@settings(max_examples=50)
@given(
    st.sampled_from(WINDOWS),
    st.lists(st.tuples(st.floats(0, 40_000), st.floats(0, 0.6), st.floats(0, 1), st.booleans()), min_size=1, max_size=60),
)
def test_no_window_ever_spends_more_than_its_budget(window, requests) -> None:
    """Requests that cost at most what was expected, some of them settled long after; an own ledger of what was bought when."""
    clock = Clock()
    gate, key = limits(clock), Key("k", "k", budget=1.0, window=window, zone="America/New_York")
    zone, bought, flying = time_zone(key.zone), {}, []
    for wait, expected, share, at_once in requests:
        clock.now += wait
        try:
            hold = gate.hold(key, expected)
        except Refused as refused:
            assert refused.retry_after == span(window, clock.now, zone).end - clock.now  # noqa: PT017
            continue
        start = span(window, clock.now, zone).start
        bought[start] = bought.get(start, 0.0) + expected * share
        flying.append((hold, expected * share))
        if at_once:
            for one, price in flying:
                one.settle(price)
            flying.clear()
        left = gate.left(key)
        assert left is not None
        assert 0 <= left <= 1
    assert all(spent <= 1 + 1e-9 for spent in bought.values())


def test_a_clock_that_is_set_back_and_right_again_gives_no_budget_twice() -> None:
    clock, record = Clock(NOON + 1800), Spent()
    gate, key = Limits(record, clock), Key("k", "k", budget=10.0, window="hour")  # type: ignore[arg-type]
    for now, dollars in ((NOON + 1800, 9.0), (NOON - 100, 1.0)):
        clock.now = now
        gate.hold(key, dollars).settle(dollars)
        record.rows.append((now, dollars))
    clock.now = NOON + 1800
    assert gate.left(key) == 1.0
    clock.now = NOON + 3600
    assert gate.left(key) == 10.0
