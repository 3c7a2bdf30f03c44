"""Methods side by side on the same test rows: every figure with its bootstrap interval, differences paired."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deferral.costs import error_costs
from deferral.curves import Curve, cost_coverage_curve, own_and_asked
from deferral.intervals import Interval, bootstrap, interval
from deferral.metrics import average, correct, deferral_cost, kept, load

__all__ = ["ABSTAIN", "GRID", "MODEL", "OWN", "RESAMPLES", "Comparison", "Figures", "Method", "System"]

MODEL = "the model"  # in tables and pictures
OWN, ABSTAIN = "own", "abstain"  # in files
RESAMPLES = 2_000  # of areas and curves; the table of methods has those of `bootstrap`
GRID = torch.linspace(0.02, 1, 50, dtype=torch.float64)  # coverages at which curves have their intervals


@dataclass(frozen=True)
class Method:
    """What one method does on the test rows, one value per row.  `correct` is NaN where nobody answers."""

    name: str
    actions: Tensor
    cost: Tensor
    correct: Tensor
    kept: Tensor
    load: Tensor
    curve: Curve | None = None
    drawn: bool = True  # on one axis with the others


@dataclass(frozen=True)
class Figures:
    """A method's means with their intervals; `accuracy` is None where it answers nothing."""

    cost: Interval
    accuracy: Interval | None
    coverage: Interval
    loads: list[Interval]
    difference: Interval  # cost of the reference minus this method's cost, paired over the rows


@dataclass(frozen=True)
class System:
    """What each action costs and answers on some rows: the own answer, E experts and, where offered, abstaining (answer -1).

    `mask` (N, A) says which actions can be taken; the cost of one that cannot is never read.
    """

    costs: Tensor
    answers: Tensor
    targets: Tensor
    num_experts: int
    mask: Tensor | None = None

    @staticmethod
    def of(own: Tensor, experts: Tensor, targets: Tensor, prices: Sequence[float], abstain_cost: float | None = None) -> "System":
        """Own answers (N,), the experts' (N, E), and what asking each expert costs."""
        answers = torch.cat([own.unsqueeze(-1), experts], dim=-1)
        costs = error_costs(answers, targets, price=[0.0, *prices], ceiling=1 + max(prices))
        if abstain_cost is not None:
            costs = torch.cat([costs, torch.full_like(costs[:, :1], abstain_cost)], dim=-1)
            answers = torch.cat([answers, torch.full_like(answers[:, :1], -1)], dim=-1)
        return System(costs, answers, targets, experts.shape[-1])

    def take(self, name: str, actions: Tensor, scores: Tensor | None = None, *, drawn: bool = True) -> Method:
        """The figures of taking these actions; the scores behind them give the curve over all thresholds as well."""
        curve = None if scores is None else cost_coverage_curve(*own_and_asked(scores, self.costs, mask=self.mask, num_own=1))
        # A number is close to its target or far from it; only a class is right or wrong.
        right = (
            torch.full_like(self.targets, torch.nan)
            if self.answers.is_floating_point()
            else correct(self.answers, self.targets, actions, mask=self.mask)
        )
        return Method(
            name=name,
            actions=actions.cpu(),
            cost=deferral_cost(self.costs, actions, mask=self.mask).cpu(),
            correct=right.cpu(),
            kept=kept(actions, num_own=1).cpu(),
            load=load(actions, num_own=1, num_experts=self.num_experts).cpu(),
            curve=curve,
            drawn=drawn,
        )

    def always(self, name: str, action: int) -> Method:
        """The same action on every row."""
        return self.take(name, torch.full_like(self.targets, action, dtype=torch.long))


@dataclass(frozen=True)
class Comparison:
    """Methods side by side, all compared with the one called `reference`, and what is needed to get them again."""

    name: str  # of its files
    title: str
    reference: str
    methods: list[Method]
    experts: list[str]
    classes: list[str]
    targets: Tensor
    settings: dict[str, Any]
    notes: list[str]
    level: float = 0.95  # of the intervals

    def __getitem__(self, name: str) -> Method:
        for method in self.methods:
            if method.name == name:
                return method
        raise KeyError(f"no method is called {name!r}; there are {', '.join(method.name for method in self.methods)}")

    @cached_property
    def figures(self) -> dict[str, Figures]:
        """Every method's figures by name, from one set of resamples."""
        columns = torch.stack(
            [torch.cat([torch.stack([m.cost, m.correct, m.kept], -1), m.load], -1).double() for m in self.methods], dim=1
        )
        # Where one of the two has no cost the pair has none.
        differences = self[self.reference].cost.double().unsqueeze(-1) - columns[..., 0]
        columns = torch.cat([columns, differences.unsqueeze(-1)], dim=-1)
        means, resampled = average(columns), bootstrap(lambda weights: average(columns, weights), rows=len(columns))

        def of(mean: Tensor, samples: Tensor) -> Interval:
            return interval(mean, samples, level=self.level)

        figures = {}
        for number, method in enumerate(self.methods):
            mean, samples = means[number], resampled[:, number]
            figures[method.name] = Figures(
                cost=of(mean[0], samples[:, 0]),
                accuracy=None if bool(mean[1].isnan()) else of(mean[1], samples[:, 1]),
                coverage=of(mean[2], samples[:, 2]),
                loads=[of(mean[3 + j], samples[:, 3 + j]) for j in range(len(self.experts))],
                difference=of(mean[-1], samples[:, -1]),
            )
        return figures
