"""How long it takes to judge: bootstraps of 10,000 resamples of 10,000 rows, curves of a million points.

Claim: 10,000 resamples of 10,000 rows of the system accuracy in at most 10 s on 2 cores in at most 1 GiB, a curve of a million
points in at most 1 s.  python -m benchmarks judging

"peak": the most memory that the process has held so far, torch and NumPy included (before the first line: "imports").
"""

import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from deferral.curves import augrc, aurc, budget_curve, cost_coverage_curve, risk_coverage_curve, system_aurc
from deferral.intervals import metric_interval
from deferral.metrics import average, correct
from deferral.reliability import calibration_error

ROWS, RESAMPLES, POINTS = 10_000, 10_000, 1_000_000


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
def command(rounds: int) -> None:
    """Time bootstraps and curves."""
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(0, 3, (ROWS, 3), generator=generator)
    targets, actions = torch.randint(0, 3, (2, ROWS), generator=generator)
    confidence, asked = torch.rand(2, ROWS, generator=generator, dtype=torch.float64)
    wrong = (torch.rand(ROWS, generator=generator) < 0.2).double()
    order, own, deferred, price = torch.rand(4, POINTS, generator=generator, dtype=torch.float64)
    right = correct(answers, targets, actions)

    def interval(metric: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Any]:
        return lambda: metric_interval(metric, ROWS, resamples=RESAMPLES)

    work: dict[str, Callable[[], Any]] = {
        "bootstrap: system accuracy": interval(lambda weights: average(right, weights)),
        "bootstrap: AURC": interval(lambda weights: aurc(confidence, wrong, weights)),
        "bootstrap: AUGRC": interval(lambda weights: augrc(confidence, wrong, weights)),
        "bootstrap: system AURC": interval(lambda weights: system_aurc(confidence, wrong, asked, weights)),
        "bootstrap: ECE": interval(lambda weights: calibration_error(confidence, wrong, weights)),
        "risk-coverage curve": lambda: risk_coverage_curve(order, own),
        "the same, 1,000 levels": lambda: risk_coverage_curve((1000 * order).round(), own),
        "cost-coverage curve": lambda: cost_coverage_curve(order, own, deferred),
        "budget curve": lambda: budget_curve(order, own, deferred, price),
        "AURC": lambda: aurc(order, own),
    }
    table = Table(
        title=f"{RESAMPLES:,} resamples of {ROWS:,} rows; curves of {POINTS:,} points; median of {rounds} rounds",
        title_justify="left",
        box=None,
    )
    for heading in ("", "seconds", "slowest", "peak GiB"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("imports", "", "", f"{_peak():.2f}")
    for name, run in work.items():
        seconds = []
        for _ in range(rounds):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        table.add_row(name, f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}", f"{_peak():.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {np.__version__}"
    )


def _peak() -> float:
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
