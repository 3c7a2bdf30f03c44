"""A table of methods on the same test rows: every figure with its bootstrap interval, differences paired."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deferral.costs import error_costs, pick
from deferral.decision import decide, deferral_margin
from deferral.intervals import Interval, bootstrap_means, interval
from deferral.metrics import CostCurve, cost_coverage_curve, deferral_cost, kept, load

__all__ = ["OURS", "Comparison", "Figures", "Method", "System"]

OURS = "two-stage deferral"


@dataclass(frozen=True)
class Method:
    """What one method does on the test rows, one value per row.  `correct` is NaN where it abstains."""

    name: str
    actions: Tensor
    cost: Tensor
    correct: Tensor
    kept: Tensor
    load: Tensor
    curve: CostCurve | None = None


@dataclass(frozen=True)
class Figures:
    """A method's means with their intervals; `accuracy` is None where it answers nothing."""

    cost: Interval
    accuracy: Interval | None
    coverage: Interval
    loads: list[Interval]
    difference: Interval  # cost of two-stage deferral minus this method's cost, paired over the rows


@dataclass(frozen=True)
class System:
    """What each action costs and answers on some rows: the own answer, E experts and, where offered, abstaining (answer -1)."""

    costs: Tensor
    answers: Tensor
    targets: Tensor
    num_experts: int

    @staticmethod
    def of(own: Tensor, experts: Tensor, targets: Tensor, prices: Sequence[float], abstain_cost: float | None = None) -> "System":
        """Own answers (N,), the experts' (N, E), and what asking each expert costs."""
        answers = torch.cat([own.unsqueeze(-1), experts], dim=-1)
        costs = error_costs(answers, targets, price=[0.0, *prices], ceiling=1 + max(prices))
        if abstain_cost is not None:
            costs = torch.cat([costs, torch.full_like(costs[:, :1], abstain_cost)], dim=-1)
            answers = torch.cat([answers, torch.full_like(answers[:, :1], -1)], dim=-1)
        return System(costs, answers, targets, experts.shape[-1])

    def take(self, name: str, actions: Tensor, scores: Tensor | None = None) -> Method:
        """The figures of taking these actions; the scores behind them give the curve over all thresholds as well."""
        answer = pick(self.answers, actions)
        right = (answer == self.targets).float()
        curve = None
        if scores is not None:
            asked = decide(scores[:, 1:]) + 1
            curve = cost_coverage_curve(deferral_margin(scores, 1), self.costs[:, 0], pick(self.costs, asked))
        return Method(
            name=name,
            actions=actions.cpu(),
            cost=deferral_cost(self.costs, actions).cpu(),
            correct=right.where(answer >= 0, torch.nan).cpu(),
            kept=kept(actions).cpu(),
            load=load(actions, 1, self.num_experts).cpu(),
            curve=curve,
        )

    def always(self, name: str, action: int) -> Method:
        """The same action on every row."""
        return self.take(name, torch.full_like(self.targets, action))


@dataclass(frozen=True)
class Comparison:
    """Methods side by side, all compared with two-stage deferral, and what is needed to get them again."""

    name: str  # of its files
    title: str
    methods: list[Method]
    experts: list[str]
    classes: list[str]
    targets: Tensor
    settings: dict[str, Any]
    notes: list[str]

    def __getitem__(self, name: str) -> Method:
        return next(method for method in self.methods if method.name == name)

    @cached_property
    def figures(self) -> dict[str, Figures]:
        """Every method's figures by name, from one set of resamples."""
        columns = torch.stack(
            [
                torch.cat([torch.stack([m.cost, m.correct.nan_to_num(0), (~m.correct.isnan()).float(), m.kept], -1), m.load], -1)
                for m in self.methods
            ],
            dim=1,
        )
        means, resampled = columns.double().mean(dim=0), bootstrap_means(columns)
        ours = [m.name for m in self.methods].index(OURS)
        figures = {}
        for number, method in enumerate(self.methods):
            mean, samples = means[number], resampled[:, number]
            answers_any = bool((samples[:, 2] > 0).all())
            figures[method.name] = Figures(
                cost=interval(mean[0], samples[:, 0]),
                accuracy=interval(mean[1] / mean[2], samples[:, 1] / samples[:, 2]) if answers_any else None,
                coverage=interval(mean[3], samples[:, 3]),
                loads=[interval(mean[4 + j], samples[:, 4 + j]) for j in range(len(self.experts))],
                difference=interval(means[ours, 0] - mean[0], resampled[:, ours, 0] - samples[:, 0]),
            )
        return figures
