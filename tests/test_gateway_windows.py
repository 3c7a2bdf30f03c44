"""Hours, days, weeks and months of the calendar, in any time zone."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deferral.gateway.windows import WINDOWS, Span, span, time_zone
from tests.limits_at_noon import at


@pytest.mark.parametrize(
    ("window", "zone", "time", "start", "end", "hours"),
    [
        ("hour", "Asia/Kolkata", "2026-06-17T12:31", "2026-06-17T12:00", "2026-06-17T13:00", 1),
        ("day", "Europe/Berlin", "2026-03-29T12:00", "2026-03-29T00:00", "2026-03-30T00:00", 23),
        ("day", "Europe/Berlin", "2026-10-25T12:00", "2026-10-25T00:00", "2026-10-26T00:00", 25),
        # Clocks go from midnight to one: the day begins at one.
        ("day", "Asia/Beirut", "2026-03-29T12:00", "2026-03-29T01:00", "2026-03-30T00:00", 23),
        # Midnight comes twice: the day begins with the first.
        ("day", "America/Havana", "2026-11-01T12:00", "2026-11-01T00:00", "2026-11-02T00:00", 25),
        ("week", "America/New_York", "2026-03-08T12:00", "2026-03-02T00:00", "2026-03-09T00:00", 7 * 24 - 1),
        ("week", "UTC", "2026-06-15T00:00", "2026-06-15T00:00", "2026-06-22T00:00", 7 * 24),
        ("month", "UTC", "2026-01-31T23:59", "2026-01-01T00:00", "2026-02-01T00:00", 31 * 24),
        ("month", "UTC", "2028-02-29T23:59", "2028-02-01T00:00", "2028-03-01T00:00", 29 * 24),
        ("month", "Europe/Berlin", "2026-10-31T23:59", "2026-10-01T00:00", "2026-11-01T00:00", 31 * 24 + 1),
        ("month", "UTC", "2026-12-31T23:59", "2026-12-01T00:00", "2027-01-01T00:00", 31 * 24),
    ],
)
def test_windows_are_those_of_the_calendar(window, zone, time, start, end, hours) -> None:
    found = span(window, at(time, zone), time_zone(zone))
    assert found == Span(at(start, zone), at(end, zone))
    assert found.end - found.start == 3600 * hours


def test_an_hour_that_comes_twice_is_two_windows() -> None:
    zone = time_zone("Europe/Berlin")
    first = datetime(2026, 10, 25, 0, 30, tzinfo=UTC).timestamp()
    assert [span("hour", time, zone) for time in (first, first + 3600)] == [
        Span(first - 1800, first + 1800),
        Span(first + 1800, first + 5400),
    ]


@given(
    st.sampled_from(WINDOWS),
    st.sampled_from(["UTC", "Europe/Berlin", "America/Havana", "Asia/Kathmandu", "Asia/Beirut", "Pacific/Apia"]),
    st.floats(9.4e8, 2.1e9),
)
def test_windows_follow_each_other_without_gap_or_overlap(window, zone, time) -> None:
    zone = time_zone(zone)
    found = span(window, time, zone)
    assert time in found
    assert span(window, found.start, zone) == found
    after = span(window, found.end, zone)
    assert after.start == found.end
    assert span(window, found.start - 1, zone).end == found.start


def test_a_zone_that_is_none_is_named() -> None:
    for name in ("Europe/Berln", "", "../etc/passwd"):
        with pytest.raises(ValueError, match="time zone: expected a name such as UTC"):
            time_zone(name)
