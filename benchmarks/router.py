"""How long a router takes: to decide, to route files, to learn, and how that grows.  python -m benchmarks router

Claims: on one thread, what a decision among 30 experts takes beyond the encoder is at most 10% of a sentence encoder's time
(--encoder FOLDER, or else a stand-in of MiniLM's size with random weights); the median of `route` without weights is at most
0.3 ms; a file is routed at 10,000 queries/s at least by two processes; 100,000 queries of 10 experts are learned from in at most
60 s and 3 GiB; the cost of a fit grows linearly to 1,000,000 queries (docs/router-scaling.png); a log of a million rows takes at
most 2 GiB.

Queries are made here: 8 to 39 words of a Zipf law, two fifths of them of one of 50 topics; an expert is good at some topics.
Each size is learned in a process of its own, whose peak of memory is reported.  Ratios are taken within one process.
"""

import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table as Printed
from threadpoolctl import threadpool_limits

from deferral.routing import Log, Outcome, Router, Table, read_log, write_log
from deferral.routing.batches import route_file

RESULTS = Path(__file__).parent / "results" / "router-cpu.json"
PICTURE = Path(__file__).parent.parent / "docs" / "router-scaling.png"
SEED = 0
WORDS, TOPICS = 20_000, 50
ROUNDS = 10
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)


def made(rows: int, experts: int, *, seed: int = SEED) -> Table:
    """A full table of made-up queries and outcomes."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlcumwfgypbvk"))
    words = np.array(["".join(generator.choice(letters, generator.integers(2, 10))) for _ in range(WORDS)], dtype=object)
    law = 1 / np.arange(1, WORDS + 1)
    cumulative = np.cumsum(law / law.sum())
    topic = generator.integers(0, TOPICS, rows)
    queries = []
    for start in range(0, rows, 50_000):
        some = topic[start : start + 50_000]
        drawn = np.searchsorted(cumulative, generator.random((len(some), 39)))
        own = generator.random(drawn.shape) < 0.4
        drawn = np.where(own, (37 * drawn + 389 * some[:, None]) % WORDS, drawn)
        lengths = generator.integers(8, 40, len(some))
        queries += [f"{' '.join(words[row[:length]])} {start + place}" for place, (row, length) in enumerate(zip(drawn, lengths))]  # noqa: B905
    chance = generator.random((TOPICS, experts))
    quality = (generator.random((rows, experts)) < chance[topic]).astype(np.float32)
    price = np.tile(np.geomspace(1e-4, 1e-2, experts), (rows, 1))
    unknown = np.full((rows, experts), np.nan, np.float32)
    names = [f"expert {number}" for number in range(experts)]
    return Table(queries, names, quality, price, np.ones((rows, experts), bool), unknown, unknown)


def milliseconds(*works: Callable[[str], object], queries: Sequence[str], rounds: int = ROUNDS) -> list[list[float]]:
    """Of each call, for each kind of work, after a few that warm up.  In turns, so that a busy neighbour slows all of them."""
    for work in works:
        for query in queries[:50]:
            work(query)
    found: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, times in zip(works, found, strict=True):
            for query in queries:
                begun = time.perf_counter()
                work(query)
                times.append(1000 * (time.perf_counter() - begun))
    return found


def deciding(experts: int, encoder: Path | None, rows: int) -> dict:
    """One query at a time: the encoder alone, the whole, and the medians of what is beyond it."""
    table = made(rows, experts)
    router = Router(0.01, encoder=encoder, seed=SEED).fit(table)
    queries = made(1000, experts, seed=SEED + 1).queries
    plan, vectors = router.plan(), {query: router.encoder([query]) for query in queries}
    alone, whole, beyond = milliseconds(
        lambda query: router.encoder([query]),
        router.route,
        lambda query: router.decide_one(plan, vectors[query], query),
        queries=queries,
        rounds=1 if encoder else ROUNDS,
    )
    return {
        "experts": experts,
        "logged_queries": rows,
        "policies": [policy.kind for policy in router.fitted.policies],
        "encoder_p50_ms": statistics.median(alone),
        "route_p50_ms": statistics.median(whole),
        "route_p99_ms": float(np.quantile(whole, 0.99)),
        "decision_p50_ms": statistics.median(beyond),
        "decision_over_encoder": statistics.median(beyond) / statistics.median(alone),
    }


def stand_in(folder: Path) -> Path:
    """An encoder of the size of MiniLM-L6 with random weights: its time is that of the real one, its vectors are noise."""
    from tokenizers import BertWordPieceTokenizer

    from deferral.routing.onnx_export import export
    from deferral.torchvision_compat import import_torchvision

    import_torchvision()
    from transformers import BertConfig, BertModel

    words = BertWordPieceTokenizer()
    words.train_from_iterator(made(2000, 1).queries, vocab_size=8000, show_progress=False)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    BertModel(BertConfig(vocab_size=words.get_vocab_size(), **sizes)).save_pretrained(folder / "bert")
    words.save(str(folder / "bert" / "tokenizer.json"))
    export(folder / "bert", folder / "onnx", int8=True, max_tokens=32)
    return folder / "onnx"


def batching(workers: int, count: int, logged: int = 20_000) -> dict:
    """Queries per second of a file, the start of the processes left out and counted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Router(0.01, seed=SEED).fit(made(logged, 10)).save(folder / "router")
        (folder / "queries.txt").write_text("\n".join(made(count, 1, seed=SEED + 1).queries) + "\n", encoding="utf-8")
        begun, marks = time.perf_counter(), [(0.0, 0)]
        route_file(
            folder / "router", folder / "queries.txt", folder / "out.jsonl", workers=workers,
            on_rows=lambda rows, read: marks.append((time.perf_counter(), rows)),
        )  # fmt: skip
        ended = time.perf_counter()
    # From a quarter of the file on, every process is at work.
    first = next(mark for mark in marks if mark[1] >= count // 4)
    return {
        "workers": workers,
        "queries": count,
        "queries_per_s": (marks[-1][1] - first[1]) / (marks[-1][0] - first[0]),
        "queries_per_s_with_start": count / (ended - begun),
    }


def learning(rows: int, experts: int) -> dict:
    table = made(rows, experts)
    before = _peak()
    begun, cpu = time.perf_counter(), time.process_time()
    router = Router(0.01, seed=SEED).fit(table)
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu
    queries = made(500, experts, seed=SEED + 1).queries
    return {
        "queries": rows,
        "experts": experts,
        "fit_s": seconds,
        "fit_cpu_s": cpu_seconds,
        "peak_gib": _peak(),
        "peak_before_gib": before,
        "route_p50_ms": statistics.median(milliseconds(router.route, queries=queries)[0]),
    }


def logging(rows: int, suffix: str, folder: Path) -> dict:
    """Reading a log of `rows` outcomes of 10 experts, from the file that `writing` left."""
    begun = time.perf_counter()
    log = read_log(folder / f"log{suffix}")
    seconds = time.perf_counter() - begun
    read_peak = _peak()
    log.table()
    return {"rows": rows, "file": suffix, "read_s": seconds, "peak_gib": read_peak, "peak_with_table_gib": _peak()}


def writing(rows: int, folder: Path) -> dict:
    table = made(rows // 10, 10)
    log = Log(
        Outcome(query, name, float(table.quality[i, j]), float(table.price[i, j]), input_tokens=40, output_tokens=150)
        for i, query in enumerate(table.queries)
        for j, name in enumerate(table.experts)
    )
    for suffix in (".jsonl", ".parquet"):
        write_log(log, folder / f"log{suffix}")
    return {"rows": len(log)}


def _peak() -> float:
    """GiB of this process alone; what `getrusage` says begins with the memory of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def _alone(job: Callable[..., dict], *arguments: object) -> dict:
    """The job in a process of its own, with one thread: its peak of memory is its own too."""
    with multiprocessing.get_context("spawn").Pool(1, _one_thread) as pool:
        return pool.apply(job, arguments)


def _one_thread() -> None:
    import scipy.linalg  # noqa: F401  # the limit binds libraries that are loaded

    torch.set_num_threads(1)
    threadpool_limits(1, user_api="blas")


def draw(lines: list[dict], path: Path) -> None:
    """Seconds and memory of a fit over the number of queries, with the straight line through the largest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    rows = np.array([line["queries"] for line in lines])
    for axes, key, label in zip(figure.subplots(1, 2), ("fit_cpu_s", "peak_gib"), ("CPU seconds", "peak GiB"), strict=True):
        values = np.array([line[key] for line in lines])
        axes.plot(rows, values, "o-", label="measured")
        axes.plot(rows, values[-1] * rows / rows[-1], ":", color="grey", label="in proportion to the largest")
        axes.set(xlabel="queries in the log, 10 experts", ylabel=label, xscale="log", yscale="log")
        axes.legend(frameon=False)
    figure.suptitle("Fitting a router without weights, one thread")
    figure.savefig(path, dpi=150)


@click.command()
@click.option("--encoder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A sentence encoder's folder.")
@click.option(
    "--largest", type=click.IntRange(min=10_000), default=SIZES[-1], show_default=True, help="Queries of the largest fit."
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS, show_default=True)
def command(encoder: Path | None, largest: int, out: Path) -> None:
    """Time decisions, files, fits and logs; the figures are kept after each step."""
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    record: dict = {
        "command": "python -m benchmarks router",
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "numpy", "scipy", "scikit-learn", "onnxruntime")},
        "seed": SEED,
    }

    def keep(**lines: list[dict]) -> None:
        record.update(lines)
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for name, rows in lines.items():
            show(name, rows)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keep(deciding_without_weights=[_alone(deciding, experts, None, 10_000) for experts in (2, 10, 30)])
        sentences = encoder or stand_in(folder)
        record["encoder"] = encoder.name if encoder else "random weights, 6 layers of 384, int8, 32 tokens"
        keep(deciding_with_a_sentence_encoder=[_alone(deciding, 30, sentences, 2000)])
        keep(batch=[batching(workers, 60_000) for workers in (1, 2)])
        writing(1_000_000, folder)
        keep(log=[_alone(logging, 1_000_000, suffix, folder) for suffix in (".jsonl", ".parquet")])
        fits: list[dict] = []
        for rows in (size for size in SIZES if size <= largest):
            fits.append(_alone(learning, rows, 10))
            keep(fit=fits)
        picture = PICTURE if out == RESULTS else out.with_suffix(".png")
        draw(fits, picture)
    record["load_after"] = os.getloadavg()
    keep()
    click.echo(f"wrote {out.name} and {picture.name}")


def show(title: str, lines: list[dict]) -> None:
    table = Printed(title=title.replace("_", " "), title_justify="left", box=None, header_style="bold")
    for key in lines[0]:
        table.add_column(key.replace("_", " "), justify="right")
    for line in lines:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in line.values()))
    Console(width=200).print(table)
