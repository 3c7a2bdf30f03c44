"""Deferral to E experts from fixed features: the methods that multi-expert, two-stage and people have in common.

A method learns heads on the rows of the second stage, which the first stage's network did not see; its threshold is fitted on
the calibration rows.  Every head has 64 hidden units and the same steps, but for
those of losses that are not convex (q = 1, mu = 2): they start from the head of a convex one, and so take twice as many.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.heads import Head, fit
from benchmarks.harness.judging import Judged, Outputs, fixed, judge
from benchmarks.harness.stage1 import Rows
from deferral.baselines import compare_confidence as confidence_scores
from deferral.baselines import deferral_gains, post_hoc_scores, selective_prediction
from deferral.decision import decide
from deferral.losses import (
    asymmetric_softmax,
    mixture_of_experts,
    one_vs_all,
    picce,
    realizable_experts,
    realizable_router,
    realizable_surrogate,
    single_stage_deferral,
    two_stage_deferral,
)

__all__ = ["ALWAYS", "BASELINES", "CHOW", "METHODS", "NEVER", "Asked", "Task"]

NEVER, ALWAYS, CHOW = "never defer", "always defer", "Chow, fitted threshold"
BASELINES = (NEVER, ALWAYS, CHOW)


@dataclass(frozen=True)
class Asked:
    """Rows of one purpose, and what the experts answer on them (N, E)."""

    rows: Rows
    answers: Tensor

    @cached_property
    def correct(self) -> Tensor:
        """1 where an expert is right.  (N, E)"""
        return (self.answers == self.rows.labels.unsqueeze(-1)).float()


@dataclass(frozen=True)
class Task:
    """Whom one may ask, at what price, with how many steps for every head."""

    stage2: Asked
    calibration: Asked
    test: Asked
    price: float
    num_classes: int
    seed: int
    steps: int

    @property
    def ceiling(self) -> float:
        """The largest cost of asking."""
        return 1 + self.price

    @property
    def experts(self) -> int:
        """E."""
        return self.stage2.answers.shape[-1]

    def expert_costs(self, part: Asked) -> Tensor:
        """1[expert wrong] + price.  (N, E)"""
        return 1 - part.correct + self.price

    def costs(self, part: Asked) -> Tensor:
        """Own error first.  (N, 1+E)"""
        return torch.cat([part.rows.wrong.unsqueeze(-1), self.expert_costs(part)], dim=-1)

    def outputs(self, part: Asked, scores: Tensor, wrong: Tensor | None = None) -> Outputs:
        """Scores of keeping and asking (N, 1+E) with what they cost; `wrong` where the own answer is not the first stage's."""
        own = (part.rows.wrong if wrong is None else wrong).unsqueeze(-1)
        return Outputs(scores, torch.cat([own, self.expert_costs(part)], dim=-1), torch.cat([own, 1 - part.correct], dim=-1))

    def judged(self, outputs: Callable[[Asked], Outputs]) -> Judged:
        """Threshold from the calibration rows, figures on the test rows."""
        return judge(outputs(self.calibration), outputs(self.test))

    def learn(self, outputs: int, loss: Callable[[Tensor, Tensor], Tensor], *, start: Head | None = None) -> Head:
        """A head on the second stage's rows: `loss(its outputs (B, outputs), row numbers (B,)) -> (B,)`."""
        x = self.stage2.rows.inputs
        head = Head(x.unsqueeze(0), outputs, hidden=64, seed=self.seed)
        if start is not None:
            head = deepcopy(start).requires_grad_()
        fit(
            [head],
            lambda i: loss(_apply(head, x[i[0]]), i[0]).unsqueeze(0),
            1,
            len(x),
            steps=self.steps,
            seed=self.seed,
            learning_rate=1e-3,
            weight_decay=1.0,
        )
        return head

    def baselines(self) -> dict[str, Judged]:
        """The network alone; the expert that is best on the calibration rows; Chow's rule to that expert."""
        expected = self.expert_costs(self.calibration).mean(dim=0)
        best = int(expected.argmin())

        def chow(part: Asked) -> Outputs:
            return self.outputs(part, selective_prediction(_confidence(part), expected))

        test = self.outputs(self.test, torch.zeros(len(self.test.rows), 1 + self.experts))
        return {NEVER: fixed(test, 0), ALWAYS: fixed(test, best + 1), CHOW: self.judged(chow)}


Method = Callable[[Task], Judged]


def single(loss: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Method:
    """Single stage: K + E scores of one head.  `loss(scores, labels, expert costs, ceiling)`."""

    def method(task: Task) -> Judged:
        costs, labels = task.expert_costs(task.stage2), task.stage2.rows.labels
        return _judged_single(task, task.learn(_width(task), lambda s, i: loss(s, labels[i], costs[i], task.ceiling)))

    return method


def single_of_correct(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Method:
    """Single stage by a loss that knows whether an expert is right, but no price: `loss(scores, labels, correct)`."""

    def method(task: Task) -> Judged:
        correct, labels = task.stage2.correct, task.stage2.rows.labels
        return _judged_single(task, task.learn(_width(task), lambda s, i: loss(s, labels[i], correct[i])))

    return method


def realizable_q1(task: Task) -> Judged:
    """q = 1 is not convex: it starts from q = 0."""
    correct, labels = task.stage2.correct, task.stage2.rows.labels
    start = task.learn(_width(task), lambda s, i: realizable_experts(s, labels[i], correct[i], q=0.0))
    return _judged_single(task, task.learn(_width(task), lambda s, i: realizable_experts(s, labels[i], correct[i]), start=start))


def mixture(task: Task) -> Judged:
    """K class scores and a gate over 1 + E."""
    correct, labels, k = task.stage2.correct, task.stage2.rows.labels, task.num_classes
    head = task.learn(_width(task) + 1, lambda s, i: mixture_of_experts(s[:, :k], s[:, k:], labels[i], correct[i]))

    def outputs(part: Asked) -> Outputs:
        scores = _apply(head, part.rows.inputs)
        wrong = (scores[:, :k].argmax(dim=-1) != part.rows.labels).float()
        return task.outputs(part, scores[:, k:], wrong)

    return task.judged(outputs)


def two_stage(*, mu: float = 1.0, of_sum: bool = False) -> Method:
    """Two stages: a router over keep and E experts; `of_sum` weighs by the row's sum of costs, as in regression."""

    def method(task: Task) -> Judged:
        costs = task.costs(task.stage2)
        ceiling = costs.sum(dim=-1, keepdim=True) if of_sum else torch.full_like(costs[:, :1], task.ceiling)
        start = None
        if mu == 2.0:
            # Not convex: it starts from the realizable router, to which every cost below 1 is free.
            free = (costs >= 1).float()
            start = task.learn(1 + task.experts, lambda s, i: realizable_router(s, free[i]))
        return _judged_router(
            task,
            task.learn(1 + task.experts, lambda s, i: two_stage_deferral(s, costs[i], mu=mu, ceiling=ceiling[i]), start=start),
        )

    return method


def compare_confidence(task: Task) -> Judged:
    """Post hoc: the probability that each expert is right, minus its price, against the network's own confidence."""
    correct = task.stage2.correct
    skill = task.learn(task.experts, lambda s, i: F.binary_cross_entropy_with_logits(s, correct[i], reduction="none").sum(dim=-1))

    def outputs(part: Asked) -> Outputs:
        right = _apply(skill, part.rows.inputs).sigmoid()
        return task.outputs(part, confidence_scores(_confidence(part), right, price=task.price))

    return task.judged(outputs)


def post_hoc(task: Task) -> Judged:
    """Post hoc: what asking each expert instead of the network saves, regressed."""
    gains = deferral_gains(task.costs(task.stage2))
    head = task.learn(task.experts, lambda s, i: (s - gains[i]).square().sum(dim=-1))
    return task.judged(lambda part: task.outputs(part, post_hoc_scores(_apply(head, part.rows.inputs))))


# Losses of one expert take its column alone.
METHODS: dict[str, Method] = {
    "single-stage mu=1": single(lambda s, y, c, ceiling: single_stage_deferral(s, y, c, ceiling=ceiling)),
    "single-stage mu=1.7": single(lambda s, y, c, ceiling: single_stage_deferral(s, y, c, mu=1.7, ceiling=ceiling)),
    "one-vs-all": single_of_correct(one_vs_all),
    "PiCCE": single_of_correct(picce),
    "mixture of experts": mixture,
    "realizable q=1": realizable_q1,
    "asymmetric softmax": single_of_correct(lambda s, y, m: asymmetric_softmax(s, y, m[:, 0])),
    "RealizableSurrogate": single_of_correct(lambda s, y, m: realizable_surrogate(s, y, m[:, 0])),
    "two-stage mu=1": two_stage(),
    "two-stage mu=1, weights of the sum": two_stage(of_sum=True),
    "two-stage mu=1.7": two_stage(mu=1.7),
    "two-stage mu=2": two_stage(mu=2.0),
    "compare-confidence": compare_confidence,
    "post-hoc deferral": post_hoc,
}


def _judged_single(task: Task, head: Head) -> Judged:
    k = task.num_classes

    def outputs(part: Asked) -> Outputs:
        scores = _apply(head, part.rows.inputs)
        wrong = (decide(scores[:, :k]) != part.rows.labels).float()
        return task.outputs(part, torch.cat([scores[:, :k].amax(dim=-1, keepdim=True), scores[:, k:]], dim=-1), wrong)

    return task.judged(outputs)


def _judged_router(task: Task, head: Head) -> Judged:
    return task.judged(lambda part: task.outputs(part, _apply(head, part.rows.inputs)))


def _apply(head: Head, x: Tensor) -> Tensor:
    return head(x.unsqueeze(0)).squeeze(0)


def _width(task: Task) -> int:
    return task.num_classes + task.experts


def _confidence(part: Asked) -> Tensor:
    return part.rows.scores.exp().amax(dim=-1, keepdim=True)
