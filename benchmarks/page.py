"""The operator's page: its size, the time to its first data, and its pictures in docs/.  python -m benchmarks page

Claim: the page and its files are under 200 kB, and its first data, the history of 24 hours and the experts' state, is there
within 100 ms with a million decisions in the database (SQLite, on two cores).  The traffic is made: a small and a large expert,
three queries in ten hard, one in twenty drawn at random, one in three answered by the small expert first, feedback on three in
ten.  Requests are made over loopback, one at a time; "from the decisions" is the same history summed from the decisions
themselves.  The pictures (--pictures, needs Chromium) are of 20,000 decisions up to the same moment, at which the clocks of the
gateway and of the browser stand, so that they are the same pictures every time; in them the small expert is judged worse than was
expected in the second half of the day, so that an alarm rings, and a candidate router, which asks the large expert for half of
the simple queries as well, has decided beside it.
"""

import http.client
import json
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

import click
import numpy as np
import sqlalchemy
import uvicorn
from sqlalchemy import func, select

from deferral.gateway.app import gateway
from deferral.gateway.dashboard import FILES
from deferral.gateway.database import connect
from deferral.gateway.dialects import insert_rows
from deferral.gateway.experts_file import Expert
from deferral.gateway.minutes import add_to_minutes
from deferral.gateway.preparing import prepare
from deferral.gateway.rows import CascadeRow, DecisionRow, cascade_values, values
from deferral.gateway.schema import cascades, decisions, feedback, shadows
from deferral.gateway.settings import Settings
from deferral.gateway.state import Gateway
from deferral.routing import Router, log_of_table
from deferral.routing.policies import Linear

RESULTS = Path(__file__).parent / "results" / "page-cpu.json"
DOCS = Path(__file__).parent.parent / "docs"
ADMIN = "the-admin-key-of-this-benchmark"
PRICE, LARGE, ERROR = {"small": 2e-4, "large": 3e-3}, 0.95, 0.01
SEED, DAY, BATCH = 0, 86400, 5000
MOMENT = 1_768_485_600  # of the pictures: a Thursday, 14:00 UTC
FALL, SIMPLE = 0.5, 0.87  # of the small expert's quality, in the pictures; what is expected of it on the mean of simple queries


def traffic(rows: int, end: float, fall: float) -> Iterator[tuple[DecisionRow, float | None]]:
    """Decisions spread over a day, oldest first, and the feedback on some; the small expert's falls in the second half."""
    generator = np.random.default_rng(SEED)
    learned = router().fitted
    kinds = np.random.default_rng(SEED + 1).choice(learned.kind_names, rows, p=learned.kinds[1]).tolist()
    for number in range(rows):
        small = float(np.clip(generator.normal(0.35 if generator.random() < 0.3 else SIMPLE, 0.05), 0, 1))
        quality = {"small": small, "large": LARGE}
        cost = {name: 1 - quality[name] + PRICE[name] / ERROR for name in PRICE}
        best = min(cost, key=lambda name: cost[name])
        curious = generator.random() < 0.05
        expert = ("small", "large")[int(generator.integers(2))] if curious else best
        paid = PRICE[expert] * float(generator.uniform(0.5, 1.5))
        when = end - DAY * (rows - number) / rows
        became = ("kept",) if expert == "small" else ("deferred", PRICE["small"])
        row = DecisionRow(
            id=f"made-{number}", time=when, key="", requested="auto", expert=expert, chosen=expert,
            reason=f"{expert}: expected quality {quality[expert]:.2f} for ${PRICE[expert]:.3g}, cost {cost[expert]:.3f} errors",
            propensity=0.975 if expert == best else 0.025, expected_quality=quality, expected_price=PRICE, expected_cost=cost,
            price_of_error=ERROR, price=paid, estimated=False, input_tokens=120, output_tokens=150, first_byte_s=0.1,
            latency_s=float(generator.exponential(0.4)), status=200, outcome="ok" if generator.random() < 0.99 else "error",
            attempts=1, streamed=False, fast_path=False, query=None,
            best_price=PRICE["large"] * float(generator.uniform(0.5, 1.5)), kind=kinds[number],
            cascade=None if number % 3 else CascadeRow("small", *became),
        )  # fmt: skip
        true = quality[expert] - (fall if expert == "small" and 2 * number >= rows else 0.0)
        said = float(generator.random() < true) if generator.random() < 0.3 else None
        yield row, said


def filled(path: Path, rows: int, *, drawn: bool = False) -> str:
    """A database with that much traffic up to now; to be `drawn`, with a quality that falls and a candidate router as well."""
    engine = connect(str(path))
    prepare(engine)
    waiting: list[tuple] = []
    first: list[tuple] = []
    judged: list[tuple] = []
    beside: list[tuple] = []

    def write() -> None:
        with engine.begin() as connection:
            insert_rows(connection, decisions, waiting)
            add_to_minutes(connection, waiting)
            insert_rows(connection, cascades, first)
            insert_rows(connection, feedback, judged)
            insert_rows(connection, shadows, beside)
        for written in (waiting, first, judged, beside):
            written.clear()

    with click.progressbar(
        traffic(rows, time.time(), FALL if drawn else 0.0), length=rows, label=f"writing {rows} decisions"
    ) as shown:
        for row, said in shown:
            waiting.append(values(row))
            if row.cascade is not None:
                first.append(cascade_values(row))
            if said is not None:
                judged.append((row.id, "", said, row.time))
            if drawn:
                beside.append((row.id, row.time, "made", "small" if row.expected_quality["small"] > SIMPLE else "large", "{}"))
            if len(waiting) == BATCH:
                write()
        write()
    engine.dispose()
    return str(path)


def router() -> Router:
    """One for the two experts; the page does not ask it anything."""
    texts = [f"{kind} question number {number}" for number in range(40) for kind in ("plain", "hard")]
    quality = np.array([[float(text.startswith("plain")), 1.0] for text in texts])
    return Router(ERROR, policies=(Linear,)).fit(
        log_of_table(texts, list(PRICE), quality, np.tile(list(PRICE.values()), (80, 1)))
    )


@contextmanager
def served(database: str) -> Iterator[tuple[int, Gateway]]:
    """A gateway on loopback.  -> its port, and its state"""
    experts = {name: Expert(name=name, base_url="http://127.0.0.1:9/v1") for name in PRICE}
    app = gateway(router(), experts, settings=Settings(database=database, admin_key=ADMIN))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False, lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1], app.state.gateway
    finally:
        server.should_exit = True
        thread.join()


def asked(port: int, path: str) -> tuple[float, int]:
    """Milliseconds, and bytes of the body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    begun = time.perf_counter()
    connection.request("GET", path, headers={"authorization": f"Bearer {ADMIN}"})
    reply = connection.getresponse()
    body = reply.read()
    taken = 1000 * (time.perf_counter() - begun)
    connection.close()
    if reply.status != 200:
        raise RuntimeError(f"{path}: {reply.status} {body[:200]!r}")
    return taken, len(body)


def from_decisions(database: str) -> float:
    """Milliseconds of the history without the sums by the minute."""
    engine, d = connect(database), decisions.c
    begun = time.perf_counter()
    with engine.connect() as connection:
        connection.execute(
            select(d.expert, func.count(), func.sum(d.price), func.sum(d.best_price - d.price))
            .where(d.time >= time.time() - DAY)
            .group_by(func.round(d.time / 1440), d.expert)
        ).all()
    engine.dispose()
    return 1000 * (time.perf_counter() - begun)


def pictures(port: int) -> None:
    """docs/gateway-page*.png: on a desk, in the dark, on a phone."""
    from playwright.sync_api import sync_playwright

    program = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if program is None:
        raise click.UsageError("the pictures need Chromium: install the package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for name, size, scheme in (("", (1200, 900), "light"), ("-dark", (1200, 900), "dark"), ("-phone", (390, 844), "light")):
            page = browser.new_page(
                viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, timezone_id="UTC", locale="en-GB"
            )
            page.clock.set_fixed_time(datetime.fromtimestamp(MOMENT, UTC))
            page.goto(f"http://127.0.0.1:{port}/dashboard")
            page.fill("#key", ADMIN)
            page.keyboard.press("Enter")
            for last in ("#grounds:not(:empty)", "#first-answers tr", "#alarms .bad", "#state.bad", "#pairs tr", "#decisions tr"):
                page.wait_for_selector(last)
            page.screenshot(path=DOCS / f"gateway-page{name}.png", full_page=True, animations="disabled", caret="hide")
            page.close()
        browser.close()


@click.command()
@click.option("--rows", type=click.IntRange(min=1000), default=1_000_000, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True)
@click.option("--pictures", "draw", is_flag=True, help="Draw the pictures in docs/ and measure nothing.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS, show_default=True)
def command(rows: int, rounds: int, draw: bool, out: Path) -> None:
    """Size and time of the page, or its pictures."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if draw:
            with patch("time.time", lambda: MOMENT):
                database = filled(Path(folder) / "drawn.db", 20_000, drawn=True)
                with served(database) as (port, state):
                    state.alarms.look(state.current.decider.expected)
                    pictures(port)
            return
        database = filled(Path(folder) / "gateway.db", rows)
        with served(database) as (port, _):
            sizes = {name or "dashboard": asked(port, f"/dashboard/{name}" if name else "/dashboard")[1] for name in FILES}
            paths = (
                "/admin/history?hours=24",
                "/admin/experts",
                "/admin/decisions",
                "/admin/what-if?hours=24",
                "/admin/first-answers?hours=24",
                "/admin/status?hours=24",
            )
            first = {path: asked(port, path)[0] for path in paths}
            taken = {path: [asked(port, path)[0] for _ in range(rounds)] for path in paths[:-1]}
        record = {
            "command": f"python -m benchmarks page --rows {rows}",
            "device": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
            "python": platform.python_version(),
            "sqlalchemy": sqlalchemy.__version__,
            "decisions": rows,
            "page_bytes": sum(sizes.values()),
            "first_ms": first,
            "median_ms": {path: statistics.median(each) for path, each in taken.items()},
            "most_ms": {path: max(each) for path, each in taken.items()},
            "first_data_ms": statistics.median(
                [one + other for one, other in zip(taken[paths[0]], taken[paths[1]], strict=True)]
            ),
            "history_from_the_decisions_ms": from_decisions(database),
        }
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(record, indent=1))
