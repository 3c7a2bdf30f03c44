"""Retention while requests are served.  python -m benchmarks retention

Claim: deleting a million rows whose time is over, of decisions (one in twenty judged) or of texts, does not stall requests:
their p99 meanwhile is at most twice that of without.  A gateway with one worker runs as a process on a database that holds the
rows, and begins to delete when it starts.  Clients ask at a steady rate, one answer in twenty is judged, and each request is put
with the phase in which it was sent: while there is something to delete, but for the first seconds, or afterwards.  The upstream
answers at once, on loopback.  Everything shares the cores of one machine.
"""

import asyncio
import json
import math
import os
import platform
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import click
import numpy as np
from sqlalchemy import ColumnElement, Engine, select

from deferral.gateway.database import connect
from deferral.gateway.dialects import insert_rows
from deferral.gateway.preparing import prepare
from deferral.gateway.rows import values
from deferral.gateway.schema import decisions, feedback, texts
from tests.faulty_upstream import Upstream
from tests.gateway_rows import row
from tests.postgres_server import binaries, fresh_database, running
from tests.running_gateway import EASY, small_router
from tests.serving_process import serving

RESULTS = Path(__file__).parent / "results"
_WARM_UP = 5.0
_GIVE_UP = 1500.0
_BLOCK = 10_000
OLD = {"decisions": (decisions.c.time < time.time() - 30.5 * 86400), "texts": texts.c.decision != ""}


@dataclass
class _Seen:
    """When requests and judgements were sent (monotonic), and how many seconds they took."""

    requests: list[tuple[float, float]] = field(default_factory=list)
    judgements: list[tuple[float, float]] = field(default_factory=list)
    failed: int = 0


@click.command()
@click.option("--database", type=click.Choice(["sqlite", "postgresql"]), default="sqlite", show_default=True)
@click.option("--of", "kind", type=click.Choice(["decisions", "texts"]), default="decisions", show_default=True)
@click.option("--rows", default=1_000_000, show_default=True, help="Decisions or texts to be deleted.")
@click.option("--rate", default=100.0, show_default=True, help="Requests a second.")
@click.option("--after", default=60.0, show_default=True, help="Seconds after the last deletion, to compare with.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="[default: results/retention-OF-DATABASE.json]")
def command(database: str, kind: str, rows: int, rate: float, after: float, out: Path | None) -> None:
    """Latencies during the deletion and after it."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = str(folder / "gateway.db")
        if database == "postgresql":
            programs = binaries()
            if programs is None:
                raise click.ClickException("initdb and postgres were not found; as with `apt-get install postgresql`")
            server = stack.enter_context(running(programs, durable=True))
            url = stack.enter_context(fresh_database(server, "retention"))
        click.echo(f"writing {rows} {kind}", err=True)
        engine = connect(url)
        prepare(engine)
        (_fill_texts if kind == "texts" else _fill_decisions)(engine, rows)
        upstream = stack.enter_context(Upstream())
        small_router().save(folder / "router")
        experts = "".join(f'[experts.{name}]\nbase_url = "{upstream.url}"\n' for name in ("small", "large"))
        (folder / "experts.toml").write_text(experts, encoding="utf-8")
        gateway = stack.enter_context(serving(folder, "--database", url, "--record-days", "30"))
        seen, began, ended = asyncio.run(_load(engine, OLD[kind], gateway.url, rate, after))
        engine.dispose()
    busy = {name: _spread(pairs, began + _WARM_UP, ended) for name, pairs in _named(seen).items()}
    calm = {name: _spread(pairs, ended + _WARM_UP, math.inf) for name, pairs in _named(seen).items()}
    record = {
        "command": f"python -m benchmarks retention --database {database} --of {kind} --rows {rows} --rate {rate:g}",
        "device": platform.processor() or platform.machine(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "seconds_of_deletion": round(ended - began, 1),
        "failed_requests": seen.failed,
        "milliseconds": {"during": busy, "after": calm},
        "p99_of_requests_during_over_after": round(busy["requests"]["p99"] / calm["requests"]["p99"], 2),
    }
    text = json.dumps(record, indent=1)
    click.echo(text)
    out = out or RESULTS / f"retention-{kind}-{database}.json"
    out.write_text(text + "\n", encoding="utf-8")
    click.echo(f"wrote {out}", err=True)


def _fill_decisions(engine: Engine, rows: int) -> None:
    """A hundred a second, until 31 days ago; the keys of twenty clients."""
    first = time.time() - 31 * 86400 - rows / 100
    for start in range(0, rows, _BLOCK):
        block = [
            row(number, time=first + number / 100, key=f"k{number % 20}") for number in range(start, min(start + _BLOCK, rows))
        ]
        with engine.begin() as connection:
            insert_rows(connection, decisions, [values(one) for one in block])
            insert_rows(connection, feedback, [(one.id, one.key, 1.0, one.time) for one in block[::20]])


def _fill_texts(engine: Engine, rows: int) -> None:
    query, now = "what is the sum of these two numbers, and why? " * 4, time.time()
    for start in range(0, rows, _BLOCK):
        block = [(f"old-{number}", f"{number} {query}", now, now) for number in range(start, min(start + _BLOCK, rows))]
        with engine.begin() as connection:
            insert_rows(connection, texts, block)


async def _load(engine: Engine, old: ColumnElement[bool], url: str, rate: float, after: float) -> tuple[_Seen, float, float]:
    """-> what was seen, and when it began and the deletion ended"""
    seen, tasks = _Seen(), set()
    start = looked = time.monotonic()
    ended = math.inf
    connector = aiohttp.TCPConnector(limit=64)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as session:
        number = 0
        while time.monotonic() < ended + after:
            number += 1
            await asyncio.sleep(max(0.0, start + number / rate - time.monotonic()))
            task = asyncio.create_task(_ask(session, url, seen, number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            # The deletion is watched at a rate that costs little.
            if ended == math.inf and time.monotonic() - looked > 0.5:
                looked = time.monotonic()
                if not await asyncio.to_thread(_left, engine, old):
                    ended = time.monotonic()
                elif looked > start + _GIVE_UP:
                    raise click.ClickException(f"there is still something to delete after {_GIVE_UP:.0f} s")
        await asyncio.gather(*tasks)
    return seen, start, ended


async def _ask(session: aiohttp.ClientSession, url: str, seen: _Seen, number: int) -> None:
    body = {"model": "auto", "messages": [{"role": "user", "content": f"{EASY} {number}"}]}
    sent = time.monotonic()
    async with session.post(f"{url}/chat/completions", json=body) as reply:
        await reply.read()
    seen.requests.append((sent, time.monotonic() - sent))
    seen.failed += reply.status != 200
    if number % 20 == 10 and reply.status == 200:
        sent = time.monotonic()
        async with session.post(f"{url}/feedback", json={"id": reply.headers["x-deferral-id"], "quality": 1}) as judged:
            await judged.read()
        seen.judgements.append((sent, time.monotonic() - sent))
        seen.failed += judged.status != 200


def _left(engine: Engine, old: ColumnElement[bool]) -> bool:
    """Whether there is one; counting them would be work of its own."""
    with engine.connect() as connection:
        return connection.execute(select(1).where(old).limit(1)).first() is not None


def _named(seen: _Seen) -> dict[str, list[tuple[float, float]]]:
    return {"requests": seen.requests, "judgements": seen.judgements}


def _spread(pairs: list[tuple[float, float]], start: float, end: float) -> dict[str, float]:
    took = np.array([seconds for sent, seconds in pairs if start <= sent < end]) * 1e3
    if not len(took):
        raise click.ClickException("no request in one of the phases: expected more rows, or more seconds after")
    p50, p99 = np.quantile(took, [0.5, 0.99])
    return {"count": len(took), "p50": round(float(p50), 2), "p99": round(float(p99), 2), "highest": round(float(took.max()), 2)}
