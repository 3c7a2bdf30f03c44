"""Who spent what, by whatever it is asked by: the sums are those of the rows, days are those of the zone."""

import csv
import io
import math
import time
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import event, insert

from deferral.cli import main
from deferral.gateway.history import history
from deferral.gateway.keys import Keys
from deferral.gateway.record import Record
from deferral.gateway.rows import CascadeRow
from deferral.gateway.schema import forgotten
from deferral.gateway.spending import DELETED, spending
from deferral.gateway.status import status
from tests.gateway_rows import row

BEGIN = datetime(2026, 10, 24, 21, 50, tzinfo=UTC).timestamp()  # in Berlin ten minutes before midnight, a day before winter


@pytest.fixture
def written(database: str) -> tuple[str, dict[str, str]]:
    """Two keys' rows of three days, a row without a key, one that nobody answered, and something deleted."""
    record, store = Record(database), Keys(database)
    record.start()
    ids = {name: store.create(name)[1].id for name in ("alice", "bob")}
    rows = [
        {"key": ids["alice"], "price": 1.0, "time": BEGIN},
        {"key": ids["alice"], "price": 2.0, "time": BEGIN + 899, "expert": "large", "estimated": True},
        {"key": ids["bob"], "price": 4.0, "time": BEGIN + 86400, "input_tokens": 1000},
        {"key": ids["bob"], "price": 0.0, "time": BEGIN + 86401, "expert": "", "outcome": "error", "estimated": True},
        {"key": "", "price": 8.0, "time": BEGIN + 2 * 86400, "expert": "large", "cascade": CascadeRow("small", "deferred", 3.0)},
    ]
    for number, values in enumerate(rows):
        record.add(row(number, **values))
    record.stop()
    with store.engine.begin() as connection:
        connection.execute(insert(forgotten), {"key": ids["alice"], "time": BEGIN - BEGIN % 900, "price": 16.0})
    store.close()
    return database, {key: name for name, key in ids.items()}


def prices(written: tuple[str, dict[str, str]], *by: str, since: float = 0.0, until: float = math.inf, zone=UTC) -> dict:
    database, names = written
    store = Keys(database)
    found = spending(store.engine, names, by, since=since, until=min(until, 1e300), zone=zone)
    store.close()
    return {group if len(group) > 1 else group[0]: spent.price for group, spent in found.items()}


def test_the_sums_are_those_of_the_rows(written) -> None:
    assert prices(written, "key") == {"alice": 19.0, "(no key)": 8.0, "bob": 4.0}
    assert set(prices((written[0], {}), "key")) == {*written[1], "(no key)"}, "a key that has no name any more goes by its id"
    # Of the last row, large took 5 and small, who answered first and in vain, 3.
    assert prices(written, "expert") == {DELETED: 16.0, "small": 8.0, "large": 7.0, "(nobody)": 0.0}
    assert prices(written, "key", "expert")["alice", "large"] == 2.0
    assert sum(prices(written, "month").values()) == 31.0
    assert prices(written, "key", since=BEGIN + 86400, until=BEGIN + 86401) == {"bob": 4.0}


def test_status_and_history_put_it_on_the_same_experts(written) -> None:
    store = Keys(written[0])
    try:
        shares = {share.expert: share.price for share in status(store.engine, [], since=BEGIN).shares}
        totals = history(store.engine, since=BEGIN, until=BEGIN + 3 * 86400).totals
    finally:
        store.close()
    assert shares == {name: total.price for name, total in totals.items()} == {"small": 8.0, "large": 7.0, "": 0.0}


def test_status_cuts_no_name(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"meta-llama/Meta-Llama-3.1-{size}B-Instruct-of-the-second-region" for size in (8, 70)]
    record = Record(database)
    record.start()
    for number, name in enumerate(names):
        record.add(row(number, time=time.time(), expert=name, price=0.000369))
    record.stop()
    main(["gateway", "status", "--database", database])
    said = capsys.readouterr().out
    assert all(name in said for name in names)
    assert said.count("$0.000369") == 2


def test_days_are_those_of_the_zone(written) -> None:
    assert prices(written, "day") == {"2026-10-24": 19.0, "2026-10-25": 4.0, "2026-10-26": 8.0}
    # The second row came after midnight, which there is no whole number of hours later; a day later it is winter.
    berlin = prices(written, "day", zone=ZoneInfo("Europe/Berlin"))
    assert berlin == {"2026-10-24": 17.0, "2026-10-25": 2.0 + 4.0, "2026-10-26": 8.0}
    assert prices(written, "day", zone=ZoneInfo("Asia/Kolkata")) == {"2026-10-25": 19.0, "2026-10-26": 4.0, "2026-10-27": 8.0}


def test_by_the_command(written, capsys: pytest.CaptureFixture[str]) -> None:
    database, _ = written
    main(["gateway", "spending", "--database", database, "--by", "key", "--by", "month", "--since", "2026-01-01", "--csv"])
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["key"] for line in table] == ["alice", "(no key)", "bob"]
    assert table[2] == {
        "key": "bob", "month": "2026-10", "requests": "2", "estimated": "0", "input_tokens": "1010", "output_tokens": "40",
        "dollars": "4.0",
    }  # fmt: skip
    main(["gateway", "spending", "--database", database, "--since", "2026-01-01", "--until", "2026-10-25"])
    said = capsys.readouterr().out
    assert "$19.00 in all" in said
    for options, message in ((("--zone", "Mars"), "time zone"), (("--by", "key", "--by", "key"), "expected different ones")):
        with pytest.raises(SystemExit):
            main(["gateway", "spending", "--database", database, *options])
        assert message in capsys.readouterr().err


def test_what_is_deleted_meanwhile_counts_once(written) -> None:
    database, names = written
    store, statements = Keys(database), []
    event.listen(store.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    spending(store.engine, names, ["key"], since=0.0, until=1e300)
    store.close()
    assert len([one for one in statements if "SELECT" in one]) == 1
