"""The gateway's record, against a commit per row.  python -m benchmarks record

Claim: one writer in batches takes at least 5,000 rows a second on two cores with SQLite and 2,000 with PostgreSQL, and a row
costs a fraction of the CPU time that it costs with a commit of its own.  PostgreSQL is a server that the benchmark starts, where
its programs are found, with commits that are on disk; its own CPU time is not in the figures.  Every variant writes the same rows
into the same table with the same four indices, journal and pragmas; CPU time is that of the whole process, so for the record it
is the caller's `add`, the writer's thread and the driver (with SQLite, the database) together.  "sqlite3, batches" has nothing to
do but hand tuples that are ready to the driver: what no record can be faster than.  Rounds are interleaved; figures are medians
over them, with the lowest and the highest.  Feedback: each one is acknowledged when its commit is on disk, 64 wait at a time.
"""

import asyncio
import json
import os
import platform
import secrets
import sqlite3
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import click
import sqlalchemy

from deferral.gateway.database import connect, durable
from deferral.gateway.dialects import insert_rows
from deferral.gateway.preparing import prepare
from deferral.gateway.record import Record
from deferral.gateway.rows import DecisionRow, values
from deferral.gateway.schema import decisions
from tests.postgres_server import binaries, fresh_database, running

RESULTS = Path(__file__).parent / "results"
_WAITING = 2000


@click.command()
@click.option("--rows", default=20_000, show_default=True, help="Rows of a round; a commit per row gets a tenth of them.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="Where the databases are.  [default: temporary]")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS / "record-cpu.json", show_default=True)
def command(rows: int, rounds: int, folder: Path | None, out: Path) -> None:
    """Rows a second and CPU time a row."""
    by_name: dict[str, Callable[[str, list[DecisionRow]], tuple[float, float]]] = {
        "record": _by_record,
        "record, with text": _with_text,
        "a commit per row": _by_row,
        "sqlite3, batches": _by_driver,
        "feedback": _feedback,
    }
    variants = {name: ("sqlite", write) for name, write in by_name.items()}
    programs = binaries()
    if programs is None:
        click.echo("PostgreSQL is left out: initdb and postgres were not found", err=True)
    else:
        variants |= {f"{name}, PostgreSQL": ("postgresql", by_name[name]) for name in by_name if "sqlite3" not in name}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    with nullcontext("") if programs is None else running(programs, durable=True) as server:
        for number in range(rounds):
            for name, (kind, write) in variants.items():
                given = _rows(rows // 10 if "a commit per row" in name or "feedback" in name else rows)
                with _database(kind, server, folder) as url:
                    wall, cpu = write(url, given)
                taken[name].append((len(given) / wall, 1e6 * cpu / len(given)))
            click.echo(f"round {number + 1} of {rounds}", err=True)
    lines = {
        name: {"rows_per_second": _spread([rate for rate, _ in pairs]), "cpu_us_per_row": _spread([cpu for _, cpu in pairs])}
        for name, pairs in taken.items()
    }
    by_row = [cpu for _, cpu in taken["a commit per row"]]
    ratio = _spread([mine / other for (_, mine), other in zip(taken["record"], by_row, strict=True)])
    for name, line in lines.items():
        rate, cpu = line["rows_per_second"], line["cpu_us_per_row"]
        click.echo(
            f"{name:30} {rate[0]:9.0f} rows/s [{rate[1]:.0f}, {rate[2]:.0f}]  {cpu[0]:7.1f} us CPU [{cpu[1]:.1f}, {cpu[2]:.1f}]"
        )
    click.echo(f"CPU of the record over a commit per row: {ratio[0]:.3f} [{ratio[1]:.3f}, {ratio[2]:.3f}]")
    record = {
        "command": "python -m benchmarks record",
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "postgresql": None if programs is None else _version(programs),
        "sqlalchemy": sqlalchemy.__version__,
        "load_average": round(os.getloadavg()[0], 1),
        "rows": rows,
        "rounds": rounds,
        "figures": "median, lowest, highest over rounds",
        "lines": lines,
        "cpu_of_the_record_over_a_commit_per_row": ratio,
    }
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(f"wrote {out}")


def _version(programs: Path) -> str:
    return subprocess.run([programs / "postgres", "--version"], capture_output=True, text=True, check=True).stdout.split()[2]


@contextmanager
def _database(kind: str, server: str, folder: Path | None) -> Iterator[str]:
    if kind == "sqlite":
        with tempfile.TemporaryDirectory(dir=folder) as place:
            yield str(Path(place) / "gateway.db")
    else:
        with fresh_database(server, f"record_{secrets.token_hex(4)}") as url:
            yield url


def _by_record(url: str, rows: list[DecisionRow], *, text: bool = False) -> tuple[float, float]:
    record = Record(url, store_text=text, retention_days=30.0 if text else None)
    record.start()
    wall, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(rows), 100):
        for row in rows[start : start + 100]:
            record.add(row)
        # A gateway is not faster than its record for long: the queue stays short.
        while len(record._waiting) > _WAITING:
            time.sleep(0.001)
    while record._waiting:
        time.sleep(0.001)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    record.stop()
    return wall, cpu


def _with_text(url: str, rows: list[DecisionRow]) -> tuple[float, float]:
    return _by_record(url, rows, text=True)


def _by_row(url: str, rows: list[DecisionRow]) -> tuple[float, float]:
    engine = connect(url)
    prepare(engine)
    with engine.connect() as connection:
        durable(connection, False)
        wall, cpu = time.perf_counter(), time.process_time()
        for row in rows:
            insert_rows(connection, decisions, [values(row)])
            connection.commit()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    engine.dispose()
    return wall, cpu


def _by_driver(url: str, rows: list[DecisionRow]) -> tuple[float, float]:
    engine = connect(url)
    prepare(engine)
    engine.dispose()
    ready = [values(row) for row in rows]
    connection = sqlite3.connect(url)
    connection.execute("PRAGMA synchronous = NORMAL")
    marks = ", ".join("?" * len(ready[0]))
    wall, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(ready), 200):
        connection.executemany(f"INSERT INTO decisions VALUES ({marks})", ready[start : start + 200])
        connection.commit()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    connection.close()
    return wall, cpu


def _feedback(url: str, rows: list[DecisionRow]) -> tuple[float, float]:
    async def judge() -> tuple[float, float]:
        record = Record(url)
        record.start()
        for row in rows:
            record.add(row)
        while record._waiting:
            await asyncio.sleep(0.001)
        left = iter(rows)

        async def one_after_another() -> None:
            for row in left:
                assert await record.feedback(row.id, 1.0, source_key="k")

        wall, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(one_after_another() for _ in range(64)))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        await record.close()
        return wall, cpu

    return asyncio.run(judge())


def _rows(count: int) -> list[DecisionRow]:
    now = time.time()
    return [
        DecisionRow(
            id=f"dfr-{int(1000 * now) + number:012x}{secrets.token_hex(6)}",
            time=now + 1e-3 * number,
            key="k",
            requested="auto",
            expert="small",
            chosen="small",
            reason="small: expected quality 0.83 for $0.0001, cost 0.175 errors, the next 0.31, at $0.02 an error",
            propensity=0.975,
            expected_quality={"small": 0.8312345, "large": 0.9312345},
            expected_price={"small": 1.234e-4, "large": 4.321e-3},
            expected_cost={"small": 0.1749, "large": 0.2848},
            price_of_error=0.02,
            price=1.1e-4,
            estimated=False,
            input_tokens=120,
            output_tokens=250,
            first_byte_s=0.21,
            latency_s=1.4,
            status=200,
            outcome="ok",
            attempts=1,
            streamed=False,
            fast_path=False,
            query=f"what is the sum of {number} and {number + 1}, and why? " * 4,
            reply_id=f"chatcmpl-{secrets.token_hex(12)}",
            best_price=4.321e-3,
        )
        for number in range(count)
    ]


def _spread(values: list[float]) -> list[float]:
    return [round(figure, 3) for figure in (statistics.median(values), min(values), max(values))]
