"""The operator's page: what it shows is true, who may see it, and that it works in a real browser."""

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from sqlalchemy import select

from deferral.gateway.dashboard import FILES
from deferral.gateway.database import connect, decisions, feedback, insert_rows, prepare
from deferral.gateway.experts_file import Expert
from deferral.gateway.history import history, recent
from deferral.gateway.minutes import add_to_minutes
from deferral.gateway.record import Record
from deferral.gateway.rows import values
from deferral.gateway.schema import minutes, tables
from deferral.gateway.settings import Settings
from deferral.gateway.what_if import what_if
from tests.gateway_rows import row
from tests.running_gateway import RunningGateway, small_router

ADMIN = "an-admin-key-of-some-length"
# What the experts really are like, which the router's estimates miss by a tenth.
SMALL, LARGE = (0.9, 0.4), 0.95
PRICES = {"small": 0.001, "large": 0.01}


def traffic(count: int, *, end: float, explore: float = 0.2, seed: int = 0) -> tuple[list, list[tuple]]:
    """Decisions of a router that explores, on easy and hard queries, one a second, and feedback on each."""
    generator = np.random.default_rng(seed)
    rows, said = [], []
    for number in range(count):
        hard = int(generator.random() < 0.5)
        quality = {"small": SMALL[hard] - 0.1, "large": LARGE - 0.1}
        best = min(quality, key=lambda name: 1 - quality[name] + PRICES[name] / 0.03)
        chosen = str(generator.choice(["small", "large"])) if generator.random() < explore else best
        when = end - count + number
        rows.append(
            row(
                number, time=when, expert=chosen, chosen=chosen, price_of_error=0.03, price=2 * PRICES[chosen], best_price=0.02,
                propensity=1 - explore / 2 if chosen == best else explore / 2,
                expected_quality=quality, expected_price=PRICES, expected_cost={name: 1 - quality[name] for name in quality},
                reason=f"{chosen}: the <b>cheapest</b>",
            )
        )  # fmt: skip
        truth = SMALL[hard] if chosen == "small" else LARGE
        said.append((f"id-{number}", "", float(generator.random() < truth), when))
    return rows, said


def stored(path: Path, rows: list, said: list[tuple]) -> str:
    engine = connect(str(path))
    prepare(engine)
    with engine.begin() as connection:
        insert_rows(connection, decisions, [values(one) for one in rows])
        add_to_minutes(connection, [values(one) for one in rows])
        insert_rows(connection, feedback, said)
    engine.dispose()
    return str(path)


def test_the_history_adds_up_to_the_record(tmp_path: Path) -> None:
    rows, said = traffic(300, end=12_000.0)
    rows[7] = row(7, time=rows[7].time, expert="", chosen="small", outcome="error", price=0.0, latency_s=math.nan)
    engine = connect(stored(tmp_path / "g.db", rows, said))
    found = history(engine, since=11_700, until=12_000)
    assert (sum(found.requests), found.routed, found.width, len(found.requests)) == (300, 300, 60, 5)
    counts = {name: sum(one.expert == name for one in rows) for name in ("large", "small", "")}
    assert {name: sum(each) for name, each in found.experts.items()} == counts
    assert {name: each.requests for name, each in found.totals.items()} == counts
    assert {name: each.failed for name, each in found.totals.items()} == {"large": 0, "small": 0, "": 1}
    assert found.totals["small"].latency_s == pytest.approx(0.25)
    assert found.totals[""].latency_s is None
    assert sum(found.price) == pytest.approx(sum(one.price for one in rows))
    saved = [0.02 - one.price for one in rows if one.outcome == "ok"]
    assert found.compared == len(saved) == 299
    assert sum(found.saving) == pytest.approx(sum(saved))
    # The variance of a sum, step by step.
    first = [one for one in rows if one.time < 11_760 and one.outcome == "ok"]
    spread = np.sqrt(len(first) * np.var([0.02 - one.price for one in first]))
    assert found.saving_half[0] == pytest.approx(1.96 * spread)
    assert history(engine, since=11_760, until=11_880).requests == [60, 60]


def test_sums_by_the_minute_are_those_of_the_decisions_also_after_a_migration(database: str) -> None:
    """What the writer adds up in batches, a database of the first version is given in one statement."""
    rows, _ = traffic(200, end=12_000.5)
    rows[3] = row(3, time=rows[3].time, requested="small", estimated=True, outcome="truncated", best_price=math.nan)
    record = Record(database)
    record.start()
    for one in rows:
        record.add(one)
    record.stop()
    engine = connect(database)
    with engine.begin() as connection:
        written = connection.execute(select(minutes).order_by(minutes.c.minute, minutes.c.expert)).all()
        for table in set(tables.tables) - {"decisions", "feedback", "texts", "keys", "schema_version"}:
            connection.exec_driver_sql(f"DROP TABLE {table}")
        connection.exec_driver_sql("ALTER TABLE decisions DROP COLUMN kind")
        for column in ("former", "former_until"):
            connection.exec_driver_sql(f"ALTER TABLE keys DROP COLUMN {column}")
        connection.exec_driver_sql("UPDATE schema_version SET version = 1")
    prepare(engine)
    with engine.connect() as connection:
        migrated = connection.execute(select(minutes).order_by(minutes.c.minute, minutes.c.expert)).all()
    engine.dispose()
    assert len(written) == len({(int(one.time // 60), one.expert) for one in rows})
    assert sum(one.requests for one in written) == 200
    for one, other in zip(written, migrated, strict=True):
        assert one[:2] == other[:2]
        assert list(one[2:]) == pytest.approx(list(other[2:]))


def test_another_setting_is_judged_by_what_was_drawn_not_by_what_was_expected(tmp_path: Path) -> None:
    """Prices were twice, qualities a tenth above what the router expected; the corrected means find the truth."""
    rows, said = traffic(3000, end=10_000.0)
    found = what_if(connect(stored(tmp_path / "g.db", rows, said)), since=0, until=10_000)
    assert (found.rows, found.judged, found.present) == (3000, 3000, 0.03)
    assert found.explored == sum(one.chosen != ("large" if one.expected_quality["small"] < 0.5 else "small") for one in rows)
    truths = {1.0: (0.002, np.mean(SMALL)), 0.5: (0.011, (SMALL[0] + LARGE) / 2), 0.0: (0.02, LARGE)}
    seen = set()
    for point in found.points:
        share = min(truths, key=lambda one: abs(one - point.shares["small"]))
        price, quality = truths[share]
        assert abs(point.price - price) < 1.5 * point.price_half + 3e-4
        assert abs(point.quality - quality) < 1.5 * point.quality_half + 0.01
        seen.add(share)
    assert seen == {0.0, 0.5, 1.0}


def test_without_feedback_or_rows_it_says_so(tmp_path: Path) -> None:
    rows, _ = traffic(50, end=10_000.0, explore=0.0)
    # A conversation that stays where it is has drawn nothing, also where others explore.
    kept = {"small": "large", "large": "small"}[rows[0].chosen]
    rows[0] = replace(rows[0], chosen=kept, expert=kept)
    rows[2] = replace(rows[2], chosen=kept, expert=kept, propensity=0.95)
    path = stored(tmp_path / "g.db", rows, [])
    found = what_if(connect(path), since=0, until=10_000)
    assert (found.rows, found.judged, found.explored) == (50, 0, 0)
    assert max(point.quality for point in found.points) == pytest.approx(LARGE - 0.1)
    nothing = what_if(connect(path), since=0, until=1)
    assert (nothing.rows, nothing.points) == (0, [])
    assert sum(history(connect(path), since=0, until=1).requests) == 0
    assert [one["id"] for one in recent(connect(path), count=2)] == ["id-49", "id-48"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    path = tmp_path_factory.mktemp("page") / "g.db"
    database = stored(path, *traffic(400, end=time.time()))
    experts = {name: Expert(name=name, base_url="http://127.0.0.1:9/v1") for name in ("small", "large")}
    with RunningGateway(small_router(), experts, Settings(database=database, admin_key=ADMIN)) as gateway:
        yield gateway


def test_the_page_holds_nothing_and_its_data_wants_the_admin_key(served: RunningGateway) -> None:
    total = 0
    for name, (_, kind) in FILES.items():
        status, headers, body = served.ask("GET", f"/dashboard/{name}" if name else "/dashboard")
        assert (status, headers["content-type"]) == (200, kind)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert b"http://" not in body.replace(b"http://www.w3.org", b"")
        total += len(body)
    assert total < 200_000
    assert served.ask("GET", "/dashboard/uPlot-LICENSE.txt")[0] == 404
    for path in ("history", "what-if", "decisions", "experts", "alarms"):
        assert served.ask("GET", f"/admin/{path}")[0] == 401
        assert served.ask("GET", f"/admin/{path}", key="x" * 20)[0] == 403
        status, _, body = served.ask("GET", f"/admin/{path}", key=ADMIN)
        assert status == 200
        json.loads(body)
    assert served.ask("GET", "/admin/history?hours=-1", key=ADMIN)[0] == 400


@pytest.mark.ci_slow
def test_in_a_browser(served: RunningGateway, tmp_path: Path) -> None:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium: install the package chromium")
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        complaints: list[str] = []
        asked: set[str] = set()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.add(request.url))
        page.goto(f"http://127.0.0.1:{served.port}/dashboard")
        # By keyboard alone: the field has the focus.
        page.keyboard.type(ADMIN)
        page.keyboard.press("Enter")
        expect(page.locator("#sums")).to_contain_text("400 routed")
        expect(page.locator("#door")).to_be_hidden()
        expect(page.locator("#state")).to_have_text("in service")
        expect(page.locator("#experts tr")).to_have_count(2)
        expect(page.locator("#decisions tr")).to_have_count(50)
        served.state.alarms.look(served.state.current.decider.expected, time.time() + 601)
        page.select_option("#hours", "168")
        expect(page.locator("#alarms tr")).to_have_count(5)
        expect(page.locator("#alarms tr").first).to_contain_text("Queries unlike the log")
        # A reason is text, whatever is in it.
        expect(page.locator("#decisions tr").first).to_contain_text("the <b>cheapest</b>")
        before = page.inner_text("#said")
        page.focus("#setting")
        page.keyboard.press("End")
        expect(page.locator("#said")).to_contain_text("large 100.0%")
        assert page.inner_text("#said") != before
        served.state.record.add(row(9000, time=time.time(), reason="a new one"))
        expect(page.locator("#decisions tr").first).to_contain_text("a new one")
        page.set_viewport_size({"width": 390, "height": 800})
        page.emulate_media(color_scheme="dark")
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
        page.click("#leave")
        expect(page.locator("#page")).to_be_hidden()
        assert page.evaluate("sessionStorage.length") == 0
        assert complaints == []
        assert {urlsplit(url).netloc for url in asked if not url.startswith("data:")} == {f"127.0.0.1:{served.port}"}
        browser.close()
