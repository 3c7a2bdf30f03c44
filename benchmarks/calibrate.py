"""Certified against uncertified thresholds on real data, over 200 splits.  python -m benchmarks calibrate

Claim: a threshold fitted so that a risk is within its level on the calibration rows exceeds the level about every other time; a
certified one at delta = 0.05 does so in at most 5% of the calibrations, and pays for it with coverage.

UCI: out-of-fold predictions of gradient boosting, and of a second one for the logarithm of their squared error, which orders the
rows (10 folds each).  An answer is wrong where its error is among the set's largest fifth; the clipped loss is
min(1, (error / that bound)^2).  CIFAR-10H: the predictions of the demo's network, trained here on all 50,000 training images,
ordered by the largest probability; the expert is a random person, drawn once per image.  Levels: half of what keeping every row
costs for the errors among kept rows, three quarters of it for the clipped loss and the cost of the system, 0.3 for the deferral
rate.

Each split draws 20% of the rows for the candidates (50 thresholds of evenly spaced coverage, and their order) and 40% to
calibrate on.  A finite test set would add its own noise to a violation, so the rows outside of the first 20% are the population
whose risk is promised.  "violated": the calibration rows are a split of it, as in practice; they are half of it, so that they
know it better than rows of an endless law would.  "independent": as many rows drawn from it with replacement, which is what the
guarantee is about.  "on the rest": the last 40% alone lie above the level, with their own noise.

Fixed sequences go by rising threshold for a loss of kept answers, from twice as many rows as prove the level without an error, by
falling threshold for the deferral rate, and safest first on the first 20% for the cost of a system.  Without a certificate: the
boldest threshold within the level on the calibration rows, from the same coverage on.  Conformal risk control promises the mean
risk, not its violations.

All of this was fixed before any result was seen, but for three changes after a first run: the level of the clipped loss was half
of it too, which hardly any threshold reaches on most sets; the uncertified threshold was held to the 50 candidates; the
independent draws were not there.
"""

import json
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.stats import binomtest
from torch import Tensor

from benchmarks.harness.running import data_folder
from deferral.certified import (
    Certificate,
    DeferralRate,
    Risk,
    SelectiveRisk,
    SystemRisk,
    certify,
    conformal_risk_control,
    safest_first,
    threshold_grid,
)
from deferral.datasets import UCI, cifar10, cifar10h_counts, uci
from deferral.demo.convnet import EPOCHS, predict, trained
from deferral.experts import random_person
from deferral.printed import print_whole
from deferral.whole_files import written_whole

RESULTS = Path(__file__).parent / "results"
SEED = 0
SPLITS = 200
DELTA = 0.05
CANDIDATES = 50
SHARES = (0.2, 0.4)  # candidates, calibration
WRONG = 0.2  # the share of a UCI set's answers that count as wrong
RATE = 0.3
PRICE = 0.05  # of asking a person, in errors
UNCERTIFIED, SEQUENCE, BONFERRONI, CONFORMAL = "uncertified", "fixed sequence", "Bonferroni", "conformal risk control"


@dataclass(frozen=True)
class Case:
    """One risk of one data set: every row's margin, and the risk of any rows."""

    data: str
    name: str
    margin: Tensor
    risk: Risk
    monotone: bool = False

    def rows(self, rows: Tensor) -> tuple[Tensor, Risk]:
        if isinstance(self.risk, SelectiveRisk):
            return self.margin[rows], replace(self.risk, loss=self.risk.loss[rows])
        if isinstance(self.risk, SystemRisk):
            own, deferred = self.risk.own_cost[rows], self.risk.deferred_cost[rows]
            return self.margin[rows], replace(self.risk, own_cost=own, deferred_cost=deferred)
        return self.margin[rows], self.risk


def uci_cases(root: Path, work: Path, name: str) -> list[Case]:
    """What a regression set can promise of the answers that are kept."""
    predictions = cached(work / f"{name}.npz", lambda: boosted(root / "uci", name))
    error, margin = predictions["error"], predictions["log_squared_error"]
    bound = error.quantile(1 - WRONG)
    wrong, clipped = error > bound, (error / bound).square().clamp(max=1.0)
    return [
        Case(name, "wrong among kept", margin, SelectiveRisk(wrong, share_of(0.5, wrong))),
        Case(name, "clipped loss among kept", margin, SelectiveRisk(clipped, share_of(0.75, clipped))),
        Case(name, "kept and wrong", margin, SystemRisk(wrong, torch.zeros_like(wrong), share_of(0.5, wrong)), monotone=True),
    ]


def cifar_cases(root: Path, work: Path, on_epoch: Callable[[int], None]) -> list[Case]:
    """What a network that may ask a person can promise."""
    outputs = cached(work / f"cifar10h-seed{SEED}.npz", lambda: network(root, work, on_epoch))
    probabilities = outputs["scores"].double().softmax(-1)
    wrong, person_wrong = probabilities.argmax(-1) != outputs["labels"], outputs["person"] != outputs["labels"]
    margin = -probabilities.amax(-1)  # against a constant score of asking
    nothing = torch.zeros_like(wrong)
    three_quarters = share_of(0.75, wrong)
    priced = SystemRisk(wrong.double(), person_wrong.double() + PRICE, three_quarters, ceiling=1 + PRICE)
    data = "CIFAR-10H"
    return [
        Case(data, "wrong among kept", margin, SelectiveRisk(wrong, share_of(0.5, wrong))),
        Case(data, "system's errors", margin, SystemRisk(wrong, person_wrong, three_quarters)),
        Case(data, f"system's cost, {PRICE} to ask", margin, priced),
        Case(data, "kept and wrong", margin, SystemRisk(wrong, nothing, share_of(0.5, wrong)), monotone=True),
        Case(data, "deferral rate", margin, DeferralRate(RATE), monotone=True),
    ]


def share_of(share: float, loss: Tensor) -> float:
    """The level: a share of the mean loss of keeping every row."""
    return share * float(loss.double().mean())


def boosted(folder: Path, name: str) -> dict[str, Tensor]:
    """The absolute error of out-of-fold predictions, and out-of-fold predictions of the logarithm of its square."""
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.model_selection import KFold, cross_val_predict

    table = uci(folder, name)
    x, y = table.features.numpy(), table.targets.numpy()
    folds = KFold(10, shuffle=True, random_state=SEED)
    answers = cross_val_predict(HistGradientBoostingRegressor(random_state=SEED), x, y, cv=folds)
    error = np.abs(answers - y)
    signal = np.log(np.square(error / y.std()) + 1e-6)
    inputs = np.column_stack([x, answers])
    expected = cross_val_predict(HistGradientBoostingRegressor(random_state=SEED), inputs, signal, cv=folds)
    return {"error": torch.from_numpy(error), "log_squared_error": torch.from_numpy(expected)}


def network(root: Path, work: Path, on_epoch: Callable[[int], None]) -> dict[str, Tensor]:
    """Scores on the test images, their labels, and the answers of a random person."""
    model = trained(cifar10(root, train=True), work / f"cifar10-50000-seed{SEED}.pt", seed=SEED, epochs=EPOCHS, on_epoch=on_epoch)
    test = cifar10(root, train=False)
    person = random_person(cifar10h_counts(root / "l2d"), seed=SEED)
    return {"scores": predict(model, test.images), "labels": test.labels, "person": person}


def cached(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` returns, from the file where an earlier run left it."""
    if not path.exists():
        made = {name: value.numpy() for name, value in make().items()}
        with written_whole(path) as partial, partial.open("wb") as file:
            np.savez(file, **made)
    with np.load(path) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


def thresholds_of(case: Case, candidates: Tensor, calibration: Tensor) -> Iterator[tuple[str, float, bool]]:
    """(method, threshold, whether it promises something) of one split."""
    margin, risk = case.rows(calibration)
    other_margin, other_risk = case.rows(candidates)
    lowest = 0.1
    if isinstance(risk, SelectiveRisk):
        proving = math.log(DELTA) / math.log(1 - risk.at_most)
        lowest = min(max(lowest, 2 * proving / len(margin)), 0.9)
    grid = threshold_grid(other_margin, CANDIDATES, coverage=(lowest, 1.0))
    if isinstance(risk, DeferralRate):
        order = grid.flip(0)
    elif isinstance(risk, SystemRisk):
        order = safest_first(other_margin, other_risk, grid)
    else:
        order = grid
    every = certify(margin, risk, threshold_grid(margin, len(margin), coverage=(lowest, 1.0)))
    yield UNCERTIFIED, boldest(every, risk), False
    sequence = certify(margin, risk, order, delta=DELTA)
    yield SEQUENCE, sequence.threshold, sequence.holds
    scattered = certify(margin, risk, grid, delta=DELTA, method="bonferroni")
    yield BONFERRONI, scattered.threshold, scattered.holds
    if case.monotone and not isinstance(risk, SelectiveRisk):
        yield CONFORMAL, *conformal_risk_control(margin, risk)


def boldest(tested: Certificate, risk: Risk) -> float:
    """What one would take without a certificate; where no candidate is within the level, the same end as with one."""
    within = tested.thresholds[tested.estimates[:, 0] <= risk.at_most]
    if isinstance(risk, DeferralRate):
        return float(within.amin()) if len(within) else torch.inf
    return float(within.amax()) if len(within) else -torch.inf


def judge(case: Case) -> Iterator[dict[str, float | str | list[float]]]:
    """One line per method: how often its promise was broken, and what it kept."""
    rows = len(case.margin)
    first, second = (round(share * rows) for share in SHARES)
    outcomes: dict[str, list[tuple[float, ...]]] = {}
    for split in range(SPLITS):
        generator = torch.Generator().manual_seed(1000 * SEED + split)
        candidates, calibration, rest = torch.randperm(rows, generator=generator).split([first, second, rows - first - second])
        population = torch.cat([calibration, rest])
        redrawn = population[torch.randint(len(population), (second,), generator=generator)]

        def above(rows: Tensor, threshold: float, made: bool) -> bool:
            # NaN, where nothing is kept, lies above nothing; where nothing was certified nothing was promised.
            return made and measured(case, rows, threshold)[0] > case.risk.at_most + 1e-12

        independent = {
            method: above(population, threshold, method == UNCERTIFIED or holds)
            for method, threshold, holds in thresholds_of(case, candidates, redrawn)
        }
        for method, threshold, holds in thresholds_of(case, candidates, calibration):
            made = method == UNCERTIFIED or holds
            risk, coverage = measured(case, population, threshold)
            outcome = (above(population, threshold, made), independent[method], above(rest, threshold, made), holds, coverage)
            outcomes.setdefault(method, []).append((*outcome, risk if math.isfinite(risk) else 0.0))
    for method, values in outcomes.items():
        violated, independently, on_rest, holds, coverage, risk = torch.tensor(values, dtype=torch.float64).unbind(-1)
        yield {
            "data": case.data,
            "rows": rows,
            "risk": case.name,
            "level": round(case.risk.at_most, 5),
            "method": method,
            "violated": share_with_interval(violated),
            "violated_independent": share_with_interval(independently),
            "violated_on_the_rest": share_with_interval(on_rest),
            "promised": float(holds.mean()),
            "coverage": round(float(coverage.mean()), 4),
            "coverage_sd": round(float(coverage.std()), 4),
            "mean_risk_over_level": round(float(risk.mean()) / case.risk.at_most, 4),
        }


def share_with_interval(happened: Tensor) -> list[float]:
    """The share of splits, and its exact 95% interval (Clopper and Pearson)."""
    interval = binomtest(int(happened.sum()), len(happened)).proportion_ci(method="exact")
    return [round(number, 4) for number in (float(happened.mean()), interval.low, interval.high)]


def measured(case: Case, rows: Tensor, threshold: float) -> tuple[float, float]:
    """(risk, coverage) of a threshold on some rows; a selective risk is NaN where nothing is kept."""
    margin, risk = case.rows(rows)
    found = certify(margin, risk, torch.tensor([threshold], dtype=torch.float64))
    return float(found.estimates[0, 0]), float(found.coverage[0])


def show(lines: list[dict]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    headings = (
        "level",
        "violated % [95%]",
        "independent % [95%]",
        "on the rest %",
        "promised %",
        "coverage % ± sd",
        "mean risk / level",
    )
    for heading in ("data", "risk", "method"):
        table.add_column(heading, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for line in lines:
        case = (line["data"], line["risk"])
        table.add_row(
            *(case if case != before else ("", "")),
            line["method"],
            f"{line['level']:.4f}",
            *(
                f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
                for share, low, high in (line["violated"], line["violated_independent"])
            ),
            f"{100 * line['violated_on_the_rest'][0]:.1f}",
            "" if line["method"] == UNCERTIFIED else f"{100 * line['promised']:.1f}",
            f"{100 * line['coverage']:.1f} ± {100 * line['coverage_sd']:.1f}",
            f"{line['mean_risk_over_level']:.3f}",
        )
        before = case
    print_whole(table)
    Console().print(
        f"violated: splits whose promise was made and broken ({SPLITS} splits, delta = {DELTA}).  mean risk: what conformal risk "
        "control bounds by the level; 0 where nothing is kept.",
        highlight=False,
    )


@click.command()
@click.option("--root", type=click.Path(file_okay=False, path_type=Path), envvar="DEFERRAL_DATA", help="Folder of the data.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS / "calibrate-cpu.json")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS / "work" / "calibrate",
    help="Folder of predictions and checkpoints; a second run takes them from there.",
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPU threads of torch.")
def command(root: Path | None, out: Path, work: Path, threads: int) -> None:
    """Violation rate and coverage of certified and uncertified thresholds."""
    root = data_folder(root)
    torch.set_num_threads(threads)
    # Before the work: a folder that cannot be made is told at once.
    for folder in (work, out.parent):
        folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict] = []
    with Progress(console=Console(stderr=True)) as progress:
        sets = progress.add_task("", total=len(UCI) + 1)
        for name in UCI:
            progress.update(sets, description=name)
            for case in uci_cases(root, work, name):
                lines.extend(judge(case))
            progress.advance(sets)
        epochs = progress.add_task("  epochs of the network", total=EPOCHS)
        progress.update(sets, description="CIFAR-10H")
        for case in cifar_cases(root, work, lambda done: progress.update(epochs, completed=done)):
            lines.extend(judge(case))
        progress.update(epochs, completed=EPOCHS)
        progress.advance(sets)
    show(lines)
    record = {
        "command": "python -m benchmarks calibrate",
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "numpy", "scipy", "scikit-learn")},
        "seed": SEED,
        "splits": SPLITS,
        "delta": DELTA,
        "candidates": CANDIDATES,
        "shares": {"candidates": SHARES[0], "calibration": SHARES[1]},
        "lines": lines,
    }
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(f"\nwrote {out}")
