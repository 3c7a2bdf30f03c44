"""What a loss decides in the end: its minimisers over free scores, on random problems, beside the cheapest actions."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from deferral.testing.settings import E, K, Loss, Rows, Setting, draw_rows

__all__ = ["PROBLEMS", "bayes", "bayes_errors", "minimiser", "random_problems", "wrong_decisions"]

PROBLEMS = 60
_CLEAR = 0.02  # by which a wrong decision is dearer than the cheapest action


def random_problems(setting: Setting, *, deterministic_experts: bool = False) -> tuple[Tensor, Rows]:
    """A law over outcomes (N, M) per problem, and a row per outcome: labels, and whether each random expert is right."""
    generator = torch.Generator().manual_seed(0)
    patterns = 1 if deterministic_experts else 2**setting.random_experts
    outcomes = K * patterns
    sharpness = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64).repeat(PROBLEMS // 3).unsqueeze(-1)
    law = (sharpness * torch.randn(PROBLEMS, outcomes, generator=generator, dtype=torch.float64)).softmax(dim=-1)
    rows = draw_rows((PROBLEMS, outcomes), generator)
    number = torch.arange(outcomes)
    rows["targets"] = (number // patterns).expand(PROBLEMS, outcomes)
    if deterministic_experts:
        answers = torch.randint(K, (PROBLEMS, 1, E), generator=generator)
        rows["expert_correct"] = (answers == rows["targets"].unsqueeze(-1)).double()
    elif setting.random_experts:
        bits = torch.stack([(number % patterns) >> j & 1 for j in range(E)], dim=-1)
        rows["expert_correct"] = bits.double().expand(PROBLEMS, outcomes, E)
    rows["cost"] = rows["cost"][:, :1].expand(PROBLEMS, outcomes)  # the cost of abstaining is known beforehand
    rows["wrong"] = (rows["targets"] != 0).double()  # the fixed predictor answers class 0
    return law, rows


def minimiser(risk: Callable[[Tensor], Tensor], problems: int, width: int, *, starts: int = 12, steps: int = 400) -> Tensor:
    """Scores (problems, width) of lowest risk among several starts.  risk: (starts, problems, width) -> (starts, problems)

    Adam with a falling step: many members of the family are neither convex nor smooth.
    """
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(starts, problems, width, generator=generator, dtype=torch.float64)
    scores[0] = 0
    scores.requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=0.1, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-5 + 0.1 * (1 + math.cos(math.pi * step / steps)) / 2
        scores.grad = torch.autograd.grad(risk(scores).sum(), scores)[0]
        optimizer.step()
    with torch.no_grad():
        best = risk(scores).argmin(dim=0)
    return scores.detach()[best, torch.arange(problems)]


def wrong_decisions(actions: Tensor, expected_costs: Tensor) -> tuple[int, int]:
    """(wrong, judged): among the problems with an action that is dearer than the cheapest by 0.02, those that take such a one.

    Action -1 is wrong where one action alone is cheapest by 0.02.
    """
    dearer = expected_costs - expected_costs.amin(dim=-1, keepdim=True) > _CLEAR
    taken = dearer.gather(-1, actions.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    wrong = taken.where(actions >= 0, (~dearer).sum(dim=-1) == 1)
    return int(wrong.sum()), int(dearer.any(dim=-1).sum())


def bayes_errors(
    loss: Loss, setting: Setting, *, deterministic_experts: bool = False, starts: int | None = None, steps: int = 400
) -> tuple[int, int]:
    """(wrong, judged) decisions of the minimiser of the conditional risk, over free scores.

    To keep a prediction that is not the expected value is a wrong decision too.
    A loss with many flat places may need more `starts` than the 12 (6 with many outcomes) that find the minimum of most.
    """
    law, rows = random_problems(setting, deterministic_experts=deterministic_experts)
    outcomes = law.shape[1]
    starts = starts or (12 if outcomes == K else 6)
    # Each a table of its own, as a training loop has them: a loss may use `view`.
    every_start = {name: value.expand(starts, *value.shape).contiguous() for name, value in rows.items()}

    def risk(scores: Tensor) -> Tensor:
        return (law * loss(scores.unsqueeze(-2).repeat(1, 1, outcomes, 1), every_start)).sum(dim=-1)

    scores = minimiser(risk, PROBLEMS, setting.width, starts=starts, steps=steps)
    actions = setting.decide(scores)
    if setting.predicts:
        missed = (scores[:, 0] - (law * rows["value"]).sum(dim=-1)).abs() > 0.05
        actions = actions.where((actions != 0) | ~missed, -1)
    return wrong_decisions(actions, setting.expected_costs(law, rows))


def bayes(loss: Loss, setting: Setting) -> str | None:
    """The minimiser over free scores decides what the cheapest action is, on random laws and costs."""
    wrong, judged = bayes_errors(loss, setting)
    return f"the minimiser decides {wrong} of {judged} problems wrongly" if wrong else None
