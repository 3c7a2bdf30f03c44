"""Problems that some linear hypothesis decides without loss, over the sample size.  python -m benchmarks realizable

Claim: realizable losses go to zero there as the sample grows, and cross-entropy, one-vs-all and the like do not (Mozannar et al.
2023; Mao, Mohri, Zhong, "Realizable H-Consistent and Bayes-Consistent Loss Functions for Learning to Defer", NeurIPS 2024, Fig.
1a: q = 0.7 and q = 1 clearly above the others).  Published figures: a picture only, the numbers are not available to us.

one expert: Mozannar et al.'s synthetic problem.  A mixture of Gaussians in 30 dimensions and two random halfspaces; in one the
    expert is always right and the label a coin, in the other the label is a halfspace and the expert wrong on 30%.
three models: a router among frozen models, of which the one a linear rule names is right, and the others on 60%.

All models are linear.  The members q > 0 and mu = 2, which are not convex, start from q = 0, and so take twice the steps of the
others; mu = 1.7, not convex either, starts from nothing like those by other authors.  Thresholds are fitted on further rows, a
quarter of the training rows but 50 at least.  Judged on 10,000 fresh rows.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.cells import Cell
from benchmarks.harness.heads import Head, at, fit
from benchmarks.harness.judging import Judged, Outputs, fixed, judge, single_stage
from benchmarks.harness.running import Finding, Part, Run, options, running
from deferral.losses import (
    asymmetric_softmax,
    mozannar_sontag,
    one_vs_all,
    realizable_deferral,
    realizable_router,
    realizable_surrogate,
    single_stage_deferral,
    two_stage_deferral,
)

TABLE = "realizable"
SIZES = {"laptop": (100, 300, 1000, 3000, 10_000), "tiny": (100, 200)}  # training rows
STEPS = {"laptop": 2000, "tiny": 20}  # of every linear model
NEVER, ALWAYS, CHOW = "never defer", "always defer", "Chow, fitted threshold"
Loss = Callable[[Tensor, "Sample", Tensor], Tensor]


@dataclass(frozen=True)
class Sample:
    """Inputs (N, D), labels (N,), and what each action but the own classes costs (N, E)."""

    x: Tensor
    targets: Tensor
    costs: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "Sample":
        return Sample(self.x[rows], self.targets[rows], self.costs[rows])


def _correct(sample: Sample, i: Tensor) -> Tensor:
    return 1 - sample.costs[i, 0]


ONE_EXPERT: dict[str, Loss] = {
    "realizable q=0 (RealizableSurrogate)": lambda s, b, i: realizable_surrogate(s, b.targets[i], _correct(b, i)),
    "realizable q=0.7": lambda s, b, i: realizable_deferral(s, b.targets[i], b.costs[i, 0], q=0.7),
    "realizable q=1": lambda s, b, i: realizable_deferral(s, b.targets[i], b.costs[i, 0], q=1.0),
    "single-stage mu=1.7": lambda s, b, i: single_stage_deferral(s, b.targets[i], b.costs[i], mu=1.7),
    "single-stage mu=1 (Mozannar-Sontag)": lambda s, b, i: mozannar_sontag(s, b.targets[i], _correct(b, i)),
    "one-vs-all": lambda s, b, i: one_vs_all(s, b.targets[i], 1 - b.costs[i]),
    "asymmetric softmax": lambda s, b, i: asymmetric_softmax(s, b.targets[i], _correct(b, i)),
}
THREE_MODELS: dict[str, Loss] = {
    "realizable router": lambda s, b, i: realizable_router(s, b.costs[i]),
    "two-stage mu=2": lambda s, b, i: two_stage_deferral(s, b.costs[i], mu=2.0),
    "two-stage mu=1": lambda s, b, i: two_stage_deferral(s, b.costs[i], mu=1.0),
    "post-hoc": lambda s, b, i: (s + b.costs[i]).square().sum(dim=-1),
}
# Not convex: they start from the solution of another.
START = {"realizable q=0.7": "realizable q=0 (RealizableSurrogate)", "realizable q=1": "realizable q=0 (RealizableSurrogate)"}
START |= {"two-stage mu=2": "realizable router"}
METHODS = {"one expert": (NEVER, ALWAYS, CHOW, *ONE_EXPERT), "three models": (NEVER, ALWAYS, *THREE_MODELS)}


def one_expert(rows: int, seed: int, draw: int) -> Sample:
    """The problem of a seed; `draw` tells training, calibration and test apart."""
    law = torch.Generator().manual_seed(seed)
    dimensions, components = 30, 10
    label, region = torch.randn(2, dimensions, generator=law)
    means = 2 * torch.randn(components, dimensions, generator=law)
    generator = torch.Generator().manual_seed(1000 * (seed + 1) + draw)
    x = means[torch.randint(components, (rows,), generator=generator)] + torch.randn(rows, dimensions, generator=generator)
    deferred = x @ region > 0
    coin = torch.rand(rows, generator=generator) < 0.5
    wrong = (torch.rand(rows, generator=generator) < 0.3) & ~deferred
    return Sample(x, torch.where(deferred, coin, x @ label > 0).long(), wrong.float().unsqueeze(-1))


def three_models(rows: int, seed: int, draw: int) -> Sample:
    """The costs of three frozen models; the targets are not used."""
    law = torch.Generator().manual_seed(seed)
    weights = torch.randn(10, 3, generator=law)
    generator = torch.Generator().manual_seed(1000 * (seed + 1) + draw)
    x = torch.randn(rows, 10, generator=generator)
    lucky = torch.rand(rows, 3, generator=generator) < 0.6
    best = F.one_hot((x @ weights).argmax(dim=-1), 3).bool()
    return Sample(x, torch.zeros(rows, dtype=torch.long), 1 - (lucky | best).float())


PROBLEMS = {"one expert": one_expert, "three models": three_models}


def learned(problem: str, method: str, sample: Sample, steps: int) -> Head:
    """A linear model trained by the loss of that name."""
    loss = {**ONE_EXPERT, **THREE_MODELS}[method]
    if method in START:
        head = deepcopy(learned(problem, START[method], sample, steps)).requires_grad_()
    else:
        head = Head(sample.x.unsqueeze(0), 3, hidden=0, seed=0)
    x = sample.x.unsqueeze(0)
    _minimise(head, lambda i: loss(head(at(x, i)).squeeze(0), sample, i[0]).unsqueeze(0), len(sample.x), steps)
    return head


def outputs(problem: str, head: Head, sample: Sample) -> Outputs:
    """The head's scores as keep-or-ask."""
    scores = head(sample.x.unsqueeze(0)).squeeze(0)
    return single_stage(scores, sample.targets, 2, sample.costs) if problem == "one expert" else Outputs(scores, sample.costs)


def baselines(problem: str, train: Sample, calibration: Sample, test: Sample, steps: int) -> dict[str, Judged]:
    """One expert: a linear classifier, the expert, Chow's rule.  Three models: the first, the better of the others."""
    if problem == "three models":
        both = Outputs(test.costs, test.costs)
        better = int(calibration.costs[:, 1:].mean(dim=0).argmin()) + 1
        return {NEVER: fixed(both, 0), ALWAYS: fixed(both, better)}
    head = Head(train.x.unsqueeze(0), 2, hidden=0, seed=0)
    x = train.x.unsqueeze(0)

    def loss(i: Tensor) -> Tensor:
        return F.cross_entropy(head(at(x, i)).squeeze(0), train.targets[i[0]], reduction="none").unsqueeze(0)

    _minimise(head, loss, len(train.x), steps)

    def chow(sample: Sample) -> Outputs:
        p = head(sample.x.unsqueeze(0)).squeeze(0).softmax(dim=-1)
        accuracy = (1 - train.costs.mean()).expand(len(p), 1)
        return single_stage(torch.cat([p, accuracy], dim=-1), sample.targets, 2, sample.costs)

    seen = chow(test)
    return {NEVER: fixed(seen, 0), ALWAYS: fixed(seen, 1), CHOW: judge(chow(calibration), seen)}


def run_cells(run: Run) -> None:
    """Every open cell; a cell is a curve over the sample size."""
    sizes, steps = SIZES[run.preset_name], STEPS[run.preset_name]
    cells = [
        Cell(TABLE, problem, method, "error", seed, run.preset_name)
        for problem, methods in METHODS.items()
        for seed in range(run.seeds)
        for method in methods
    ]

    @cache
    def samples(problem: str, seed: int, size: int) -> tuple[Sample, Sample, Sample]:
        draw = partial(PROBLEMS[problem], seed=seed)
        return draw(size, draw=0), draw(max(50, size // 4), draw=1), draw(10_000, draw=2)

    @cache
    def references(problem: str, seed: int, size: int) -> dict[str, Judged]:
        return baselines(problem, *samples(problem, seed, size), steps)

    def work(cell: Cell) -> Finding:
        parts = []
        for size in sizes:
            train, calibration, test = samples(cell.data, cell.seed, size)
            others = dict(references(cell.data, cell.seed, size))
            if cell.method in others:
                found = others.pop(cell.method)
            else:
                head = learned(cell.data, cell.method, train, steps)
                found = judge(outputs(cell.data, head, calibration), outputs(cell.data, head, test))
            parts.append(Part(found, others, {"training rows": size}))
        return Finding(parts)

    run.each(cells, work, lambda cell: {"steps": steps})


@click.command()
@options(presets=tuple(SIZES), seeds=5, device=False, root=False)
def command(**given) -> None:
    """Realizable and other losses on realizable problems."""
    with running(**given) as run:
        run_cells(run)


def _minimise(head: Head, loss: Callable[[Tensor], Tensor], rows: int, steps: int) -> None:
    fit([head], loss, 1, rows, steps=steps, seed=0, batch=1000, learning_rate=0.05)
