"""The operator's page: what it shows is true, who may see it, and that it works in a real browser."""

import json
import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np
import pytest
from sqlalchemy import select

from deferral.gateway.dashboard import FILES
from deferral.gateway.database import connect
from deferral.gateway.dialects import insert_rows
from deferral.gateway.experts_file import Expert
from deferral.gateway.first_answers import First, first_answers
from deferral.gateway.history import history, recent
from deferral.gateway.minutes import add_to_minutes
from deferral.gateway.preparing import prepare
from deferral.gateway.record import Record
from deferral.gateway.rows import CascadeRow, cascade_values, values
from deferral.gateway.schema import cascades, decisions, feedback, minutes, tables
from deferral.gateway.settings import Settings
from deferral.gateway.status import dollars
from deferral.gateway.what_if import what_if
from deferral.routing.decisions import AT_RANDOM
from tests.gateway_rows import row
from tests.running_gateway import RunningGateway, small_router

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request, Route

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
                reason=f"{chosen}: the <b>cheapest</b>" if chosen == best else f"{chosen}, {AT_RANDOM} to learn",
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
        insert_rows(connection, cascades, [cascade_values(one) for one in rows if one.cascade is not None])
        add_to_minutes(connection, [values(one) for one in rows])
        insert_rows(connection, feedback, said)
    engine.dispose()
    return str(path)


def test_the_history_adds_up_to_the_record(tmp_path: Path) -> None:
    rows, said = traffic(300, end=12_000.0)
    rows[7] = row(7, time=rows[7].time, expert="", chosen="small", outcome="error", price=0.0, latency_s=math.nan)
    rows[8], rows[9] = replace(rows[8], estimated=True), replace(rows[9], estimated=True, status=502)
    rows[10] = replace(rows[10], estimated=True, status=499, outcome="cancelled")
    engine = connect(stored(tmp_path / "g.db", rows, said))
    found = history(engine, since=11_700, until=12_000)
    assert found.estimated == 2, "an error has no price to be estimated, what a client left has one"
    assert (sum(found.requests), found.routed, found.width, len(found.requests)) == (300, 300, 60, 5)
    counts = {name: sum(one.expert == name for one in rows) for name in ("large", "small", "")}
    assert {name: sum(each) for name, each in found.experts.items()} == counts
    assert {name: each.requests for name, each in found.totals.items()} == counts
    assert {name: each.failed for name, each in found.totals.items()} == {"large": 0, "small": 0, "": 1}
    assert found.totals["small"].latency_s == pytest.approx(0.25)
    assert found.totals[""].latency_s is None
    assert sum(found.price) == pytest.approx(sum(one.price for one in rows))
    saved = [0.02 - one.price for one in rows if one.outcome == "ok"]
    assert found.compared == len(saved) == 298
    assert sum(found.saving) == pytest.approx(sum(saved))
    # The variance of a sum, up to the end of each step.
    for step, half in enumerate(found.saving_half):
        until = [0.02 - one.price for one in rows if one.time < 11_760 + 60 * step and one.outcome == "ok"]
        assert half == pytest.approx(1.96 * np.sqrt(len(until) * np.var(until, ddof=1)))
    assert history(engine, since=11_760, until=11_880).requests == [60, 60]


def test_rare_traffic_is_no_sure_saving(tmp_path: Path) -> None:
    """One answer in a step has no spread of its own; all of them together have."""
    rows = [row(number, time=12_000.0 + 600 * number, price=0.001 * number**2, best_price=0.002) for number in range(4)]
    found = history(connect(stored(tmp_path / "g.db", rows, [])), since=12_000, until=15_600)
    assert found.saving_half[0] is None
    saved = [0.002 - one.price for one in rows]
    assert sum(found.saving) == pytest.approx(-0.006) == pytest.approx(sum(saved))
    assert found.saving_half[-1] == pytest.approx(1.96 * np.sqrt(4 * np.var(saved, ddof=1)))


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
        for column in ("kind", "draw"):
            connection.exec_driver_sql(f"ALTER TABLE decisions DROP COLUMN {column}")
        for column in ("former", "former_until", "ends"):
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
    """Prices were twice, qualities a tenth above what the router expected; the corrected means find the truth.

    Also where one expert's answers are judged more often than the other's.
    """
    rows, said = traffic(3000, end=10_000.0)
    kept = [each for number, each in enumerate(said) if rows[number].expert == "small" or number % 4 == 0]
    found = what_if(connect(stored(tmp_path / "g.db", rows, kept)), since=0, until=10_000, present=0.03)
    assert (found.rows, found.judged, found.present) == (3000, len(kept), 0.03)
    assert found.explored == sum(one.chosen != ("large" if one.expected_quality["small"] < 0.5 else "small") for one in rows)
    truths = {1.0: (0.002, np.mean(SMALL)), 0.5: (0.011, (SMALL[0] + LARGE) / 2), 0.0: (0.02, LARGE)}
    seen = set()
    for point in found.points:
        share = min(truths, key=lambda one: abs(one - point.shares["small"]))
        price, quality = truths[share]
        assert (point.price_guessed, point.quality_guessed) == ([], [])
        assert point.price_half is not None
        assert point.quality_half is not None
        assert abs(point.price - price) < 2 * point.price_half + 3e-4
        assert abs(point.quality - quality) < 2 * point.quality_half + 0.01
        seen.add(share)
    assert seen == {0.0, 0.5, 1.0}
    assert 0.03 in [point.price_of_error for point in found.points]


def test_what_was_decided_before_exploration_began_is_known_at_the_present_setting_alone(tmp_path: Path) -> None:
    """The router expects a tenth too little of everybody, and only half of the rows can say so of whom it does not ask."""
    before, said = traffic(1500, end=5_000.0, explore=0.0)
    rows, more = traffic(1500, end=10_000.0, seed=1)
    before = [replace(one, id=f"before-{one.id}") for one in before]
    said = [(f"before-{name}", *rest) for name, *rest in said]
    found = what_if(connect(stored(tmp_path / "g.db", [*before, *rows], [*said, *more])), since=0, until=10_000, present=0.03)
    for point in found.points:
        present = 0 < point.shares["small"] < 1
        guessed = [] if present else [max(point.shares, key=lambda name: point.shares[name])]
        assert (point.price_guessed, point.quality_guessed) == (guessed, guessed)
        assert (point.price_half is None, point.quality_half is None) == (not present, not present)
    later = what_if(connect(str(tmp_path / "g.db")), since=5_000, until=10_000, present=0.03)
    assert all(point.quality_guessed == [] for point in later.points)


def test_the_means_of_another_setting_row_by_row(tmp_path: Path) -> None:
    """As the estimator is written in the paper, in plain loops."""
    rows, said = traffic(240, end=10_000.0, seed=1)
    said = [each for number, each in enumerate(said) if number % 3]
    found = what_if(connect(stored(tmp_path / "g.db", rows, said)), since=0, until=10_000, present=0.03)
    opinions = {name: quality for name, _, quality, _ in said}
    asked = {name: [one for one in rows if one.expert == name] for name in PRICES}
    heard = {name: sum(one.id in opinions for one in asked[name]) / len(asked[name]) for name in PRICES}
    for point in found.points[::5]:
        prices, qualities = [], []
        for one in rows:
            cost = {name: 1 - one.expected_quality[name] + PRICES[name] / point.price_of_error for name in PRICES}
            mine = min(cost, key=lambda name: cost[name])
            price, quality = PRICES[mine], one.expected_quality[mine]
            if one.chosen == mine:
                prices.append(price + (one.price - price) / one.propensity)
            else:
                prices.append(price)
            if one.chosen == mine and one.id in opinions:
                qualities.append(quality + (opinions[one.id] - quality) / (one.propensity * heard[mine]))
            else:
                qualities.append(quality)
        assert (point.price, point.quality) == pytest.approx((np.mean(prices), np.mean(qualities)))
        if point.quality_half is not None:
            # And of one more answer that failed, or was perfect.
            assert 1 <= point.quality_half / (1.96 * np.std(qualities, ddof=1) / np.sqrt(len(rows))) < 1.5


def test_without_feedback_or_rows_it_says_so(tmp_path: Path) -> None:
    rows, _ = traffic(50, end=10_000.0, explore=0.0)
    # A conversation that stays where it is has drawn nothing, also where others explore.
    kept = {"small": "large", "large": "small"}[rows[0].chosen]
    rows[0] = replace(rows[0], chosen=kept, expert=kept)
    rows[2] = replace(rows[2], chosen=kept, expert=kept, propensity=0.95)
    path = stored(tmp_path / "g.db", rows, [])
    found = what_if(connect(path), since=0, until=10_000, present=0.03)
    assert (found.rows, found.judged, found.explored) == (50, 0, 0)
    assert max(point.quality for point in found.points) == pytest.approx(LARGE - 0.1)
    for point in found.points:
        assert point.quality_half is None
        assert point.quality_guessed == [name for name, share in point.shares.items() if share >= 0.02]
    assert found.points[-1].price_guessed == ["large"]  # of simple queries nobody asked it
    nothing = what_if(connect(path), since=0, until=1, present=0.03)
    assert (nothing.rows, nothing.points) == (0, [])
    assert sum(history(connect(path), since=0, until=1).requests) == 0
    assert [one["id"] for one in recent(connect(path), count=2)] == ["id-49", "id-48"]


@pytest.mark.parametrize("dollars", [0.0, 1e-9, 1e5])
def test_settings_reach_from_the_cheapest_to_the_best_whatever_the_prices_are(tmp_path: Path, dollars: float) -> None:
    rows = [
        row(number, expected_price={"small": dollars / 10, "large": dollars}, price=dollars, price_of_error=3 * dollars or 0.01)
        for number in range(30)
    ]
    found = what_if(connect(stored(tmp_path / "g.db", rows, [])), since=0, until=10_000, present=3 * dollars or 0.01)
    assert len({point.price_of_error for point in found.points}) == len(found.points) >= 25
    assert found.points[0].shares["small"] == (1.0 if dollars else 0.0)
    assert found.points[-1].shares["large"] == 1.0
    json.dumps(asdict(found), allow_nan=False)


def test_first_answers_by_what_became_of_them(tmp_path: Path) -> None:
    endings = ["kept", "kept", "deferred", "failed", "kept", "deferred"]
    extra = {"deferred": 0.25}
    rows = [row(number, cascade=CascadeRow("small", each, extra.get(each, 0.0))) for number, each in enumerate(endings)]
    rows += [row(6, cascade=CascadeRow("tiny", "silent")), row(7)]
    engine = connect(stored(tmp_path / "g.db", rows, []))
    found = first_answers(engine, since=1001, until=2000)
    assert found.looked == 7
    assert found.experts == [
        First("small", 5, {"deferred": 2, "failed": 1, "kept": 2}, 0.5), First("tiny", 1, {"silent": 1}, 0.0),
    ]  # fmt: skip
    assert asdict(first_answers(engine, since=0, until=1)) == {"looked": 0, "experts": []}


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
        assert "unsafe" not in headers["content-security-policy"]
        assert (headers["x-frame-options"], headers["referrer-policy"]) == ("DENY", "no-referrer")
        assert b"http://" not in body.replace(b"http://www.w3.org", b"")
        total += len(body)
    assert total < 200_000
    assert served.ask("GET", "/dashboard/uPlot-LICENSE.txt")[0] == 404
    for path in ("history", "what-if", "first-answers", "shadow", "decisions", "experts", "alarms"):
        assert served.ask("GET", f"/admin/{path}")[0] == 401
        assert served.ask("GET", f"/admin/{path}", key="x" * 20)[0] == 403
        status, headers, body = served.ask("GET", f"/admin/{path}", key=ADMIN)
        assert (status, headers["cache-control"]) == (200, "no-store")
        json.loads(body)
    assert served.ask("GET", "/admin/history?hours=-1", key=ADMIN)[0] == 400


def test_texts_and_lines_stand_out_from_what_is_behind_them() -> None:
    """Contrast as in WCAG 2.2: 4.5 for text, 3 for lines and the edges of fields, by day and in the dark."""
    day, dark = (files("deferral.gateway") / "page" / "page.css").read_text().split("@media (forced-colors")[0].split("@media")

    def luminance(colour: str) -> float:
        digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
        parts = np.array([int(digits[place : place + 2], 16) for place in (0, 2, 4)]) / 255
        return float(np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    for scheme in (day, dark):
        found = {name: luminance(colour) for name, colour in re.findall(r"--(\w+): #(\w+);", scheme)}
        for behind in ("paper", "panel"):
            for name in found.keys() - {"paper", "panel", "line"}:
                low, high = sorted((found[name], found[behind]))
                assert (high + 0.05) / (low + 0.05) >= (4.5 if name in ("ink", "quiet", "bad", "accent") else 3), (name, behind)
        assert len(found) == 16


@pytest.fixture
def browser() -> "Iterator[Browser]":
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium: install the package chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(page: "Page", gateway: RunningGateway) -> None:
    page.goto(f"http://127.0.0.1:{gateway.port}/dashboard")
    page.keyboard.type(ADMIN)
    page.keyboard.press("Enter")


@pytest.mark.ci_slow
def test_in_a_browser(served: RunningGateway, browser: "Browser") -> None:
    from playwright.sync_api import expect

    page = browser.new_page(viewport={"width": 1200, "height": 900})
    complaints: list[str] = []
    asked: set[str] = set()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.add(request.url))
    page.goto(f"http://127.0.0.1:{served.port}/dashboard")
    # By keyboard alone: the field has the focus.
    page.keyboard.type("no key of this gateway")
    page.keyboard.press("Enter")
    expect(page.locator("#refused")).to_contain_text("no spaces")
    token, key = served.state.keys.create("the page", admin=True)
    page.keyboard.type(token)
    page.keyboard.press("Enter")
    expect(page.locator("#sums")).to_contain_text("400 routed")
    expect(page.locator("#door")).to_be_hidden()
    expect(page.locator("#state")).to_have_text("in service")
    expect(page.locator("#experts tr")).to_have_count(2)
    expect(page.locator("#decisions tr")).to_have_count(50)
    expect(page.locator("#firsts")).to_be_hidden()
    # What comes from outside is text, whatever is in it.
    strange = "<img src=x onerror=alert(1)>\u202e" + "W" * 150
    served.state.record.add(
        row(9000, time=time.time(), requested=strange, reason=strange, cascade=CascadeRow("small", "deferred", 0.5))
    )
    expect(page.locator("#decisions tr").first).to_contain_text("<img src=x onerror=alert(1)>")
    expect(page.locator("#decisions img")).to_have_count(0)
    # An answer that comes late does not take the place of what was asked for after it.
    late: list[Route] = []
    page.route("**/history?hours=1", lambda route: late.append(route))
    page.select_option("#hours", "1")
    served.state.alarms.look(served.state.current.decider.expected, time.time() + 601)
    page.select_option("#hours", "168")
    expect(page.locator("#alarms tr")).to_have_count(5)
    expect(page.locator("#alarms tr").first).to_contain_text("Queries unlike the log")
    expect(page.locator("#first-answers tr")).to_have_text(re.compile(r"small.*1 \(100\.0%\).*\$0\.5"))
    expect(page.locator("#sums")).to_contain_text("requests401")
    late.pop().fulfill(json={})
    before = page.inner_text("#said")
    assert "(now $0.05)" in before
    page.focus("#setting")
    page.keyboard.press("End")
    expect(page.locator("#said")).to_contain_text("large 100.0%")
    assert page.inner_text("#said").startswith(page.get_attribute("#setting", "aria-valuetext"))
    assert page.inner_text("#said") != before
    for width in (390, 320):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        cells = "[...document.querySelectorAll('td')].map((each) => each.getBoundingClientRect().right)"
        assert page.evaluate(f"Math.max(...{cells})") <= width
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert complaints == []
    assert page.evaluate("sessionStorage.length + localStorage.length") == 1
    # Away, it says so, and what is there stays; when it is back, it is asked again: for a key that is none any more.
    page.context.set_offline(True)
    expect(page.locator("#state")).to_contain_text("what is shown is of then")
    expect(page.locator("#decisions tr")).to_have_count(50)
    served.state.keys.revoke(key.id)
    page.context.set_offline(False)
    expect(page.locator("#refused")).to_have_text("the key is no admin key of this gateway")
    expect(page.locator("#page")).to_be_hidden()
    assert page.evaluate("document.querySelectorAll('#page td').length + sessionStorage.length") == 0
    assert {urlsplit(url).netloc for url in asked if not url.startswith("data:")} == {f"127.0.0.1:{served.port}"}
    assert not any(secret in url for url in asked for secret in (token, ADMIN))


@pytest.mark.ci_slow
def test_a_part_that_does_not_answer_keeps_no_other_waiting(served: RunningGateway, browser: "Browser") -> None:
    from playwright.sync_api import expect

    page = browser.new_page()
    # Ten times as fast.
    page.add_init_script("""
        const [timeout, wait] = [AbortSignal.timeout.bind(AbortSignal), setTimeout];
        AbortSignal.timeout = (time) => timeout(time / 10);
        window.setTimeout = (work, time, ...more) => wait(work, time / 10, ...more);
    """)
    asked: Counter[str] = Counter()
    under_way: Counter[str] = Counter()
    most: Counter[str] = Counter()  # under way at once
    held: list[Route] = []

    def part(request: "Request") -> str:
        return urlsplit(request.url).path.rpartition("/admin/")[2]

    def begins(request: "Request") -> None:
        asked[part(request)] += 1
        under_way[part(request)] += 1
        most[part(request)] = max(most[part(request)], under_way[part(request)])

    def ends(request: "Request") -> None:
        under_way[part(request)] -= 1

    page.on("request", begins)
    page.on("requestfinished", ends)
    page.on("requestfailed", ends)
    page.route("**/admin/what-if*", lambda route: held.append(route))
    opened(page, served)
    expect(page.locator("#sums")).to_contain_text("routed")
    expect(page.locator("#state")).to_have_text("in service; what-if: no answer within 30 s", timeout=20_000)
    while len(held) < 2:
        page.wait_for_timeout(50)
    expect(page.locator("#decisions tr")).to_have_count(50)
    assert asked["decisions"] > 5
    assert min(asked[name] for name in ("history", "experts", "alarms", "first-answers", "shadow")) > 1
    assert most["what-if"] == 1
    held.pop().continue_()
    expect(page.locator("#said")).to_contain_text("per 1,000 queries")
    expect(page.locator("#state")).to_have_text("in service")


@pytest.mark.ci_slow
def test_a_thousand_experts_of_which_half_are_not_asked(served: RunningGateway, browser: "Browser") -> None:
    from playwright.sync_api import expect

    names = [f"provider-{number}" for number in range(1000)]
    page = browser.new_page(viewport={"width": 360, "height": 700})
    standings = [{"name": name, "breaker": ("closed", "open")[place % 2], "queued": 0} for place, name in enumerate(names)]
    standings[0] |= {"addresses": 3, "away": 1}
    page.route("**/admin/experts", lambda route: route.fulfill(json={"data": standings, "trouble": "", "record": ""}))
    opened(page, served)
    five = "provider-1, provider-3, provider-5, provider-7, provider-9"
    expect(page.locator("#state")).to_have_text(f"in service; not asked at present: {five} and 495 more")
    expect(page.locator("#experts tr")).to_have_count(1002)
    expect(page.locator("#experts")).to_contain_text("closed, 1 of 3 addresses not asked")
    assert page.evaluate("document.documentElement.scrollHeight") < 6000
    tables = "[...document.querySelectorAll('.scroll')].map((each) => each.clientHeight)"
    assert 100 < page.evaluate(f"Math.max(...{tables})") < 700


@pytest.mark.ci_slow
def test_dollars_end_where_those_of_the_terminal_do_and_without_scripts_it_is_named(
    served: RunningGateway, browser: "Browser"
) -> None:
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{served.port}/dashboard")
    sizes = [0.0, 1.7e-16, 4.9e-10, 1.2345e-8, 0.000123456, 0.05, 0.5, 0.9996]
    texts = page.evaluate("async (sizes) => sizes.map((await import('./dashboard/texts.js')).dollars)", sizes)
    read = [float(text.removeprefix("$")) for text in texts]
    assert read == [float(dollars(value).removeprefix("$")) for value in sizes]
    page = browser.new_page(java_script_enabled=False)
    page.goto(f"http://127.0.0.1:{served.port}/dashboard")
    assert "deferral gateway status" in page.inner_text("body")
    assert not page.is_visible("#key")
