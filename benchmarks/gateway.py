"""The gateway beside a bare pass-through and beside LiteLLM's proxy, everything on loopback.  python -m benchmarks gateway

Claims: CPU time a request at most 1.5 times that of a bare Starlette and aiohttp pass-through, a stream of 40 events at most 1.3
times, with a weight-free router, keys, budgets and the record on; at least 20 times the throughput of LiteLLM's proxy; added
latency at one connection at most 1 ms (p50) and 4 ms (p99); p99 at most 10 ms at half of the highest throughput with 64 clients;
at most 120 MB of memory, which grows by less than 5% over 200,000 requests; 1,000 streams held at the same time, none dropped;
every cell of the fault matrix as specified.

CPU time is user and system time of the server's process, from /proc, over the requests that it answered; the proxies take turns,
and ratios are medians over the rounds.  Load comes from wrk (a compiled client: `apt-get install wrk`), except where it must
keep to a rate or hold streams open.  LiteLLM is installed into an environment of its own, once, in the user's cache.
"""

import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.serving.servers import CLIENTS, LITELLM, World
from deferral.demo.questions import questions
from deferral.routing import Log, Outcome, Router
from deferral.routing.held_out import POLICIES
from deferral.routing.policies import Linear, Policy

RESULTS = Path(__file__).parent / "results" / "gateway-cpu.json"
ROUTERS: dict[str, Sequence[Callable[[], Policy]]] = {"blend": POLICIES, "linear": (Linear,)}  # the default one, and its lightest


def cpu(world: World, *, stream: bool = False) -> dict[str, Any]:
    """CPU time a request and throughput with 64 clients, in turns: bare; the gateway asked by name, and by two routers."""
    gateway, light = world.gateway(), world.gateway("gateway, linear", router="linear")
    lines = {
        "bare": (world.passthrough(), "small"),
        "named": (gateway, "small"),
        "linear": (light, "auto"),
        "blend": (gateway, "auto"),
    }
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in lines}
    for server, model in lines.values():
        world.wrk(server.url, seconds=1, stream=stream, model=model)
    for number in range(world.rounds):
        for name in lines if number % 2 else reversed(lines):
            server, model = lines[name]
            before = server.cpu()
            load = world.wrk(server.url, stream=stream, model=model)
            each = (server.cpu() - before) / load["requests"]
            taken[name].append({"cpu_ms": 1000 * each, "per_second": load["per_second"]})

    def over_bare(rows: list[dict[str, float]]) -> dict[str, float]:
        return _spread([mine["cpu_ms"] / theirs["cpu_ms"] for mine, theirs in zip(rows, taken["bare"], strict=True)])

    return {
        name: {key: _spread([one[key] for one in rows]) for key in rows[0]} | {"cpu_ratio": over_bare(rows)}
        for name, rows in taken.items()
    }


def sse(world: World) -> dict[str, Any]:
    """The same with streams of 40 events."""
    return cpu(world, stream=True)


def latency(world: World) -> dict[str, Any]:
    """What is added at one connection, over the upstream itself; latencies at half of the gateway's highest throughput.

    The bare pass-through stands beside the gateway in both, at the same rate.
    """
    servers = {"gateway": world.gateway(), "bare": world.passthrough()}
    added: dict[str, dict[str, list[float]]] = {server: {"p50": [], "p99": []} for server in servers}
    for _ in range(world.rounds):
        direct = world.wrk(world.upstream(), clients=1)
        for name, server in servers.items():
            through = world.wrk(server.url, clients=1, model="auto" if name == "gateway" else "small")
            for share, values in added[name].items():
                values.append(through[share] - direct[share])
    most = world.wrk(servers["gateway"].url)["per_second"]
    half: dict[str, list[dict[str, float]]] = {server: [] for server in servers}
    for _ in range(world.rounds):
        for name, server in servers.items():
            half[name].append(world.load("rate", server.url, "--rate", str(most / 2), "--seconds", str(world.seconds)))
    return {
        "added_ms": {name: {share: _spread(values) for share, values in shares.items()} for name, shares in added.items()},
        "most_per_second": most,
        "half_ms": {
            name: {share: _spread([1000 * one[share] for one in runs]) for share in ("p50", "p90", "p99")}
            for name, runs in half.items()
        },
        "half_per_second": _spread([one["per_second"] for one in half["gateway"]]),
        "bad": sum(one["bad"] for runs in half.values() for one in runs),
    }


def memory(world: World) -> dict[str, Any]:
    """Resident memory after the start, after a tenth of the requests, and after all of them."""
    gateway = world.gateway("gateway for memory")
    started = gateway.memory()["now"]
    first, sent = 0.0, 0.0
    curve = []
    while sent < world.requests:
        load = world.wrk(gateway.url, seconds=max(world.seconds, 5))
        sent += load["requests"]
        curve.append([sent, gateway.memory()["now"]])
        if not first and sent >= world.requests / 10:
            first = gateway.memory()["now"]
    last = gateway.memory()
    return {
        "mb_started": started,
        "mb_after_a_tenth": first,
        "mb_after_all": last["now"],
        "mb_most": last["most"],
        "requests": sent,
        "growth": last["now"] / first - 1,
        "curve": curve,
    }


def held(world: World) -> dict[str, Any]:
    """1,000 streams open at the same time, 40 events 0.25 s apart."""
    gateway = world.gateway("gateway of slow streams", "--chunk-delay", "0.25")
    before = gateway.memory()["now"]
    found = world.load("streams", gateway.url, "--clients", "1000", stream=True)
    upstream = world.upstream("--chunk-delay", "0.25")
    with urllib.request.urlopen(upstream.removesuffix("/v1") + "/streams", timeout=5) as reply:
        most = json.load(reply)["most"]
    return found | {"open_at_once": most, "mb_before": before, "mb_most": gateway.memory()["most"]}


def litellm(world: World) -> dict[str, Any]:
    """Throughput and CPU time a request of LiteLLM's proxy, and of the gateway, on the same upstream.

    LiteLLM looks a name up; the gateway does the same by name, and, routed, decides as well.
    """
    lines = {"litellm": (world.litellm(), "auto"), "named": (world.gateway(), "small"), "routed": (world.gateway(), "auto")}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in lines}
    for server, model in lines.values():
        # LiteLLM loads much of itself with its first request.
        world.one(server.url)
        world.wrk(server.url, seconds=2, model=model)
    for _ in range(world.rounds):
        for name, (server, model) in lines.items():
            before = server.cpu()
            load = world.wrk(server.url, seconds=max(world.seconds, 5), model=model)
            each = (server.cpu() - before) / max(load["requests"], 1)
            taken[name].append({"cpu_ms": 1000 * each, "per_second": load["per_second"]})

    def over(name: str, figure: str, *, inverse: bool = False) -> dict[str, float]:
        pairs = [(mine[figure], theirs[figure]) for mine, theirs in zip(taken[name], taken["litellm"], strict=True)]
        return _spread([theirs / mine if inverse else mine / theirs for mine, theirs in pairs])

    return {
        **{name: {key: _spread([one[key] for one in rows]) for key in rows[0]} for name, rows in taken.items()},
        "throughput_ratio": {name: over(name, "per_second") for name in ("named", "routed")},
        "cpu_ratio": {name: over(name, "cpu_ms", inverse=True) for name in ("named", "routed")},
        "litellm_mb": world.servers["litellm"].memory()["now"],
    }


def faults(world: World) -> dict[str, Any]:
    """The fault matrix: what was specified, what happened."""
    from dataclasses import asdict

    from tests.fault_matrix import CASES, bench, seen_by_the_client

    cells = []
    place = world.folder / "faults"
    place.mkdir()
    with bench(place) as running:
        for path, fault, model, stream, expected in CASES:
            found, details = seen_by_the_client(running, path, fault, model, stream)
            # Of the chosen one: whoever answers in its place is asked once.
            cell = {
                "path": path,
                "fault": fault,
                "model": model,
                "stream": stream,
                "retries": found.attempts - 1 - (found.expert == "large"),
            }
            cell |= {"rows": details["rows"], "specified": asdict(expected), "found": asdict(found)}
            cells.append(cell | {"as_specified": found == expected and details["rows"] == 1})
    return {"cells": cells, "as_specified": sum(cell["as_specified"] for cell in cells), "of": len(cells)}


PARTS: dict[str, Callable[[World], dict[str, Any]]] = {
    "cpu": cpu,
    "sse": sse,
    "latency": latency,
    "litellm": litellm,
    "held": held,
    "faults": faults,
    "memory": memory,
}


def claims(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What was promised, what was measured, and whether that is enough."""

    def claim(text: str, part: str, figure: Callable[[Any], float], most: float, *, least: bool = False) -> None:
        if part in found:
            value = figure(found[part])
            met = value >= most if least else value <= most
            result.append(
                {"claim": text, "target": f"{'>=' if least else '<='} {most:g}", "measured": round(value, 4), "met": met}
            )

    result: list[dict[str, Any]] = []
    for name in ("blend", "linear", "named"):
        claim(f"CPU a request / bare, {name}", "cpu", lambda part, name=name: part[name]["cpu_ratio"]["median"], 1.5)
        claim(f"CPU a stream of 40 / bare, {name}", "sse", lambda part, name=name: part[name]["cpu_ratio"]["median"], 1.3)
    for name in ("named", "routed"):
        claim(
            f"throughput / LiteLLM's, {name}",
            "litellm",
            lambda part, name=name: part["throughput_ratio"][name]["median"],
            20,
            least=True,
        )
    claim("added p50 at one connection, ms", "latency", lambda part: part["added_ms"]["gateway"]["p50"]["median"], 1)
    claim("added p99 at one connection, ms", "latency", lambda part: part["added_ms"]["gateway"]["p99"]["median"], 4)
    claim("p99 at half of the highest throughput, ms", "latency", lambda part: part["half_ms"]["gateway"]["p99"]["median"], 10)
    claim("resident memory, MB", "memory", lambda part: part["mb_most"], 120)
    claim("growth of memory", "memory", lambda part: part["growth"], 0.05)
    claim("streams whole of 1,000", "held", lambda part: part["whole"], 1000, least=True)
    claim("streams open at once", "held", lambda part: part["open_at_once"], 1000, least=True)
    claim("cells of the fault matrix that are not as specified", "faults", lambda part: part["of"] - part["as_specified"], 0)
    return result


def fault_table(cells: list[dict[str, Any]]) -> str:
    """Fault by fault, what the client got, who answered, after how many retries and attempts, and what is on record; Markdown."""
    lines = ["| path | fault | auto | auto, stream | by name | by name, stream |", "|---|---|---|---|---|---|"]
    for path, fault in dict.fromkeys((cell["path"], cell["fault"]) for cell in cells):
        row = []
        for cell in (each for each in cells if (each["path"], each["fault"]) == (path, fault)):
            found = cell["found"]
            who = f"{found['expert'] or 'nobody'}, {cell['retries']} retries, {found['attempts']} attempts"
            mark = "" if cell["as_specified"] else " NOT AS SPECIFIED"
            row.append(f"{found['status']}: {who}; {found['ending']}; {cell['rows']} row, {found['outcome']}{mark}")
        lines.append(f"| {path} | {fault} | {' | '.join(row)} |")
    return "\n".join(lines)


@click.command()
@click.option(
    "--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="Only this part; may be given several times."
)
@click.option("--seconds", type=click.FloatRange(min=1), default=6.0, show_default=True, help="Of load, each time.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--requests", default=200_000, show_default=True, help="Of the part memory.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help=f"JSON file.  [default with all parts: {RESULTS.name}]"
)
def command(parts: tuple[str, ...], seconds: float, rounds: int, requests: int, out: Path | None) -> None:
    """Measure, print, and write the results."""
    if shutil.which("wrk") is None:
        raise click.ClickException("this benchmark needs wrk, a compiled load generator: apt-get install wrk")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="deferral-benchmark-") as folder, ExitStack() as processes:
        for name, policies in ROUTERS.items():
            _fitted(policies).save(Path(folder) / name)
        world = World(Path(folder), seconds, rounds, requests, processes)
        world.gateway()
        found: dict[str, Any] = {}
        for name in parts or PARTS:
            click.echo(f"{name}: {PARTS[name].__doc__}", err=True)
            found[name] = PARTS[name](world)
            click.echo(json.dumps({key: value for key, value in found[name].items() if key not in ("cells", "curve")}, indent=1))
        processes.close()
    if "faults" in found:
        click.echo(fault_table(found["faults"]["cells"]))
    checked = claims(found)
    for line in checked:
        click.echo(f"{'met   ' if line['met'] else 'MISSED'} {line['claim']}: {line['measured']:g} ({line['target']})")
    record = {
        "versions": _versions(),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "load_before": os.getloadavg()[2]},
        "settings": {"seconds": seconds, "rounds": rounds, "clients": CLIENTS},
        "minutes": (time.monotonic() - began) / 60,
        "claims": checked,
        "parts": found,
    }
    out = out or (None if parts else RESULTS)
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n")
        click.echo(f"wrote {out}")


def _fitted(policies: Sequence[Callable[[], Policy]]) -> Router:
    """A router without weights, from outcomes by the kind of question."""
    torch.set_num_threads(1)
    draw = random.Random(0)
    outcomes = []
    for question in questions(1000, seed=0):
        easy = question.kind in ("first letter", "last letter", "weekday", "small sum")
        for name, chance, price in (("small", 0.9 if easy else 0.2, 1e-5), ("large", 0.95, 3e-4)):
            outcomes.append(Outcome(question.text, name, float(draw.random() < chance), price * (1 + draw.random())))
    return Router(0.001, policies=policies).fit(Log(outcomes))


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _versions() -> dict[str, str]:
    names = ("deferral", "starlette", "uvicorn", "uvloop", "httptools", "aiohttp", "sqlalchemy", "numpy")
    found = {name: version(name) for name in names} | {"python": platform.python_version(), "litellm": LITELLM.partition("==")[2]}
    said = subprocess.run(["wrk", "-v"], capture_output=True, text=True).stdout
    return found | {"wrk": said.split()[1] if said else ""}


def _processor() -> str:
    text = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*:\s*(.+)", text)
    return name[1] if name else platform.machine()
