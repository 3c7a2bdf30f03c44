"""Properties that a surrogate loss should have, for anyone's loss: `check_loss(loss, setting)`.

A loss is handed over as a function of packed scores and of rows, in one of the settings below.  A row holds whatever a loss of
that setting may ask for; the setting knows what every action is expected to cost and how scores decide, so one suite serves
all.  The suite must be seen to fail what it should: the library's own tests run it over planted defects.
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deferral.costs import single_stage_costs
from deferral.decision import decide, decide_pair

__all__ = [
    "ABSTENTION",
    "ACCEPT",
    "ONE_EXPERT",
    "PAIR",
    "PROPERTIES",
    "REGRESSION",
    "REGRESSION_ABSTENTION",
    "SINGLE_STAGE",
    "SINGLE_STAGE_BINARY",
    "TWO_STAGE",
    "Report",
    "Rows",
    "Setting",
    "autocast",
    "bayes",
    "bayes_errors",
    "bounded_below",
    "check_loss",
    "classes_are_alike",
    "draw_rows",
    "every_expert_counts",
    "example",
    "finite",
    "gradient",
    "half_precision",
    "leaves_its_input",
    "minimiser",
    "one_value_per_example",
    "pulls_when_wrong",
    "random_problems",
    "vmap",
    "wrong_decisions",
]

K, E, A = 3, 2, 3
CEILING = 1.3  # of the two-stage costs: a price stands on top of an error
_PRICES = torch.tensor([0.0] + (A - 1) * [CEILING - 1], dtype=torch.float64)
PROBLEMS = 60
_CLEAR = 0.02  # by which the cheapest action is cheaper than the next, where a decision is judged

Rows = dict[str, Tensor]
Loss = Callable[[Tensor, Rows], Tensor]


@dataclass(frozen=True)
class Setting:
    """What is decided: the packed scores, what each action is expected to cost under a law over outcomes, who decides how."""

    name: str
    width: int
    expected_costs: Callable[[Tensor, Rows], Tensor]  # law (N, M), rows (N, M, ..) -> (N, actions)
    decide: Callable[[Tensor], Tensor]  # (..., width) -> (...,)
    classes: range = range(0)  # the columns of the scores that belong to the classes
    experts: range = range(0)  # those that belong to the experts
    expert_rows: str = ""  # the entry of the rows whose last columns, one per expert, are permuted with them
    random_experts: int = 0  # how many experts are right at random given the label
    predicts: bool = False  # whether column 0 is a prediction of the value, whose expectation it is to be


@dataclass(frozen=True)
class Report:
    """The violated properties of a loss, each with what was seen."""

    violations: dict[str, str]

    @property
    def ok(self) -> bool:
        """True if nothing is violated."""
        return not self.violations

    def __str__(self) -> str:
        return "\n".join(f"{name}: {seen}" for name, seen in self.violations.items()) or "no property is violated"


def check_loss(loss: Loss, setting: Setting, *, properties: "Sequence[Property] | None" = None) -> Report:
    """Run the properties on a loss and report which it violates.

    `loss(scores, rows)` takes packed scores (..., width) and rows (`draw_rows`), and returns one value per row (...,).  In
    SINGLE_STAGE, for one, `lambda s, rows: my_loss(s, rows["targets"], rows["expert_costs"])`.  `properties` defaults to
    PROPERTIES, all of them; a loss that makes no claim of consistency leaves `bayes` out.

    The suite hands over no mask, no ignored rows and no targets that are probabilities: what a loss makes of them is for its own
    tests.  `bayes` looks for minimisers of scores of about unit size: divide those of a temperature far from 1 by it.  It judges
    60 random problems of 3 classes and 2 experts, where the best action is better by 0.02 at least: a loss that errs by less,
    or with more experts only, passes.
    """
    if properties is not None and not properties:
        raise ValueError("properties: expected at least one, got none; leave them out for all")
    violations = {}
    for check in PROPERTIES if properties is None else properties:
        try:
            seen = check(loss, setting)
        except Exception as error:  # a loss that raises violates the property, whatever it raises
            seen = f"raised {type(error).__name__}: {error}"
        if seen is not None:
            violations[check.__name__] = seen
    return Report(violations)


def draw_rows(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Rows:
    """Random rows of the given leading shape.

    targets (...,); cost (...,) of abstaining; expert_costs (..., E) in [0, 1]; expert_correct (..., E) in {0, 1}; costs (..., A)
    of a two-stage router, any in [0, 1.3] or, in half of the rows, errors and a price of 0.3 of asking an expert; wrong (...,) in
    {0, 1} of a fixed predictor; value (...,), the target of regression.
    """

    def uniform(*size: int) -> Tensor:
        return torch.rand(*shape, *size, generator=generator, dtype=dtype)

    return {
        "targets": torch.randint(K, shape, generator=generator),
        "cost": 0.05 + 0.55 * uniform(),
        "expert_costs": uniform(E),
        "expert_correct": (uniform(E) < 0.6).to(dtype),
        "costs": torch.where(uniform(1) < 0.5, CEILING * uniform(A), (uniform(A) < 0.5) + _PRICES.to(dtype)),
        "wrong": (uniform() < 0.5).to(dtype),
        "value": 3 * uniform() - 1.5,
    }


def _expectation(table: Callable[[Rows], Tensor]) -> Callable[[Tensor, Rows], Tensor]:
    return lambda law, rows: (law.unsqueeze(-1) * table(rows)).sum(dim=1)


def _abstention(rows: Rows) -> Tensor:
    return single_stage_costs(rows["targets"], rows["cost"].unsqueeze(-1), K)


def _variance(law: Tensor, rows: Rows) -> Tensor:
    mean = (law * rows["value"]).sum(dim=-1, keepdim=True)
    return (law * (rows["value"] - mean).square()).sum(dim=-1, keepdim=True)


def _regression(law: Tensor, rows: Rows) -> Tensor:
    return torch.cat([_variance(law, rows), (law.unsqueeze(-1) * rows["expert_costs"]).sum(dim=1)], dim=-1)


def _regression_abstention(law: Tensor, rows: Rows) -> Tensor:
    return torch.cat([_variance(law, rows), rows["cost"][:, :1]], dim=-1)


ABSTENTION = Setting("score-based abstention", K + 1, _expectation(_abstention), decide, classes=range(K))
PAIR = Setting(
    "predictor-rejector abstention",
    K + 1,
    _expectation(_abstention),
    lambda s: decide_pair(s[..., :K], s[..., K]),
    classes=range(K),
)
ACCEPT = Setting(
    "two-stage abstention",
    1,
    _expectation(lambda rows: torch.stack([rows["wrong"], rows["cost"]], dim=-1)),
    lambda s: (s[..., 0] <= 0).long(),
)
SINGLE_STAGE = Setting(
    "single-stage deferral",
    K + E,
    _expectation(lambda rows: single_stage_costs(rows["targets"], rows["expert_costs"], K)),
    decide,
    classes=range(K),
    experts=range(K, K + E),
    expert_rows="expert_costs",
)
SINGLE_STAGE_BINARY = Setting(
    "single-stage deferral to experts who are right or wrong",
    K + E,
    _expectation(lambda rows: single_stage_costs(rows["targets"], 1 - rows["expert_correct"], K)),
    decide,
    classes=range(K),
    experts=range(K, K + E),
    expert_rows="expert_correct",
    random_experts=E,
)
ONE_EXPERT = Setting(
    "single-stage deferral to one expert who is right or wrong",
    K + 1,
    _expectation(lambda rows: single_stage_costs(rows["targets"], 1 - rows["expert_correct"][..., :1], K)),
    decide,
    classes=range(K),
    random_experts=1,
)
TWO_STAGE = Setting(
    "two-stage deferral",
    A,
    _expectation(lambda rows: rows["costs"]),
    decide,
    experts=range(1, A),
    expert_rows="costs",
)
REGRESSION = Setting(
    "regression deferral: the prediction, then the scores",
    2 + E,
    _regression,
    lambda s: decide(s[..., 1:]),
    experts=range(2, 2 + E),
    expert_rows="expert_costs",
    predicts=True,
)
REGRESSION_ABSTENTION = Setting(
    "regression abstention: the prediction, then the rejector",
    2,
    _regression_abstention,
    lambda s: (s[..., 1] <= 0).long(),
    predicts=True,
)


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
    """(wrong, judged): among the problems whose cheapest action is cheaper by 0.02, those decided otherwise."""
    cheapest = expected_costs.sort(dim=-1)
    clear = cheapest.values[:, 1] - cheapest.values[:, 0] > _CLEAR
    return int((actions != cheapest.indices[:, 0])[clear].sum()), int(clear.sum())


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


def example(setting: Setting, shape: tuple[int, ...] = (7,), dtype: torch.dtype = torch.float64) -> tuple[Tensor, Rows]:
    """Random packed scores and rows; under half precision the rows stay in float32, as in a training loop."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(*shape, setting.width, generator=generator, dtype=torch.float64).to(dtype)
    return scores, draw_rows(shape, generator, torch.float32 if dtype.itemsize < 4 else dtype)


def _loss_and_gradient(loss: Loss, scores: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    leaf = scores.detach().clone().requires_grad_()
    value = loss(leaf, rows)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def _differs(actual: Tensor, expected: Tensor) -> str | None:
    try:
        torch.testing.assert_close(actual, expected)
    except AssertionError as error:
        return " ".join(str(error).split())
    return None


def one_value_per_example(loss: Loss, setting: Setting) -> str | None:
    """(..., width) scores give (...,) losses, and a row's loss depends on that row alone."""
    # Enough rows for a share of them to be at least one.
    shape = (3, 4)
    scores, rows = example(setting, shape)
    values = loss(scores, rows)
    if values.shape != shape:
        return f"expected losses of shape {shape}, got {tuple(values.shape)}"
    places = [(i, j) for i in range(shape[0]) for j in range(shape[1])]
    one_by_one = [loss(scores[place], {name: value[place] for name, value in rows.items()}) for place in places]
    return _differs(values, torch.stack(one_by_one).reshape(shape))


def leaves_its_input(loss: Loss, setting: Setting) -> str | None:
    """Scores and rows are the caller's, and stay as they are, with a gradient to take and without."""
    for trained in (False, True):
        scores, rows = example(setting, (40,), torch.float32)
        given = {"scores": scores.requires_grad_(trained), **rows}
        before = {name: value.detach().clone() for name, value in given.items()}
        values = loss(scores * 1 if trained else scores, rows)
        if trained:
            values.sum().backward()
        changed = [name for name, value in given.items() if not torch.equal(value, before[name])]
        if changed:
            return f"the caller's {', '.join(changed)} were changed in place"
    return None


def gradient(loss: Loss, setting: Setting) -> str | None:
    """The gradient equals finite differences, in double precision."""
    scores, rows = example(setting)
    # Kinks are hit with probability 0, but finite differences may step over one: keep off the integers.
    leaf = (scores * 0.37 + 0.011).requires_grad_()
    value, slope = _loss_and_gradient(loss, leaf, rows)
    # Of what is computed in single precision no finer differences can be taken.
    eps, atol = (1e-6, 1e-5) if value.dtype == torch.float64 else (1e-3, 1e-2)
    # A loss in cents or in thousands is held to the same digits, and so is a column that counts little.
    size = next((float(largest) for part in (slope, value) if (largest := part.abs().max()) > 0), 1.0)
    units = (size, 1.0) if value.dtype == torch.float64 else (size,)
    try:
        for unit in units:
            torch.autograd.gradcheck(lambda s, unit=unit: loss(s, rows) / unit, leaf, eps=eps, atol=atol)
    except RuntimeError as error:
        return textwrap.shorten(str(error), 300)  # of two whole Jacobians
    return None


def finite(loss: Loss, setting: Setting) -> str | None:
    """Value and gradient are finite at scores of 0 and of 1e4 either way; in float16, whose range ends at 65504, at 1."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        scores, rows = example(setting, (40,), dtype)
        for scale in (0.0, 1.0) if dtype == torch.float16 else (0.0, 50.0, 1e4, -1e4):
            value, slope = _loss_and_gradient(loss, scores * scale, rows)
            if not (value.isfinite().all() and slope.isfinite().all()):
                return f"scores x {scale:g} in {dtype}: loss or gradient is not finite"
    return None


def half_precision(loss: Loss, setting: Setting) -> str | None:
    """Half-precision scores give what the same numbers give in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        scores, rows = example(setting, dtype=dtype)
        seen = _differs(loss(scores, rows).float(), loss(scores.float(), rows).float())
        if seen:
            return f"{dtype}: {seen}"
    return None


def pulls_when_wrong(loss: Loss, setting: Setting) -> str | None:
    """Where the loss is large, so that it does not merely flatten out as bounded losses do, it has a gradient."""
    scores, rows = example(setting, (400,))
    at_zero = loss(0 * scores, rows)
    value, slope = _loss_and_gradient(loss, 50 * scores, rows)
    stuck = (value > 5 * at_zero.abs().clamp(min=1.0)) & (slope.abs().amax(dim=-1) < 1e-3)
    return (
        f"{int(stuck.sum())} of 400 badly wrong rows have a loss up to {float(value[stuck].max()):.3g} and no gradient"
        if stuck.any()
        else None
    )


def bounded_below(loss: Loss, setting: Setting) -> str | None:
    """No row's loss can be driven towards minus infinity, so no weight is negative."""
    scores, rows = example(setting, (400,))
    usual, large, larger = (loss(scale * scores, rows) for scale in (1.0, 1e3, 1e4))
    # In units of the loss itself; a bounded one has come to its end.
    size = usual.abs().max()
    falls = ((larger < -size) & (large - larger > size)) | (larger == -torch.inf)
    if not falls.any():
        return None
    return (
        f"a loss falls from {large[falls][0]:.3g} at scores x 1000 to {larger[falls][0]:.3g} at x 10000: some weight is negative"
    )


def every_expert_counts(loss: Loss, setting: Setting) -> str | None:
    """Every score has a gradient in some row, and permuting the experts permutes nothing else."""
    columns = list(setting.experts)
    if not columns:
        return None
    scores, rows = example(setting, (50,))
    value, slope = _loss_and_gradient(loss, scores, rows)
    dead = [column for column in range(setting.width) if not slope[:, column].any()]
    if dead:
        return f"scores in columns {dead} have no gradient in any of 50 rows"
    table = rows[setting.expert_rows]
    first = table.shape[-1] - len(columns)
    permuted = rows | {setting.expert_rows: torch.cat([table[:, :first], table[:, first:].flip(-1)], dim=-1)}
    return _differs(loss(_turned(scores, setting.experts), permuted), value)


def classes_are_alike(loss: Loss, setting: Setting) -> str | None:
    """Counting the classes from the other end changes nothing."""
    if not setting.classes:
        return None
    scores, rows = example(setting, (50,))
    turned = rows | {"targets": K - 1 - rows["targets"]}
    return _differs(loss(_turned(scores, setting.classes), turned), loss(scores, rows))


def _turned(scores: Tensor, columns: range) -> Tensor:
    """These columns in reverse order."""
    order = torch.arange(scores.shape[-1])
    order[list(columns)] = order[list(columns)].flip(0)
    return scores[:, order]


def vmap(loss: Loss, setting: Setting) -> str | None:
    """torch.vmap over the rows gives the batch."""
    scores, rows = example(setting)
    return _differs(torch.vmap(loss)(scores, rows), loss(scores, rows))


def autocast(loss: Loss, setting: Setting) -> str | None:
    """Under autocast the loss is computed as without it."""
    scores, rows = example(setting, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(scores, rows)
    return _differs(value, loss(scores, rows))


def bayes(loss: Loss, setting: Setting) -> str | None:
    """The minimiser over free scores decides what the cheapest action is, on random laws and costs."""
    wrong, judged = bayes_errors(loss, setting)
    return f"the minimiser decides {wrong} of {judged} problems wrongly" if wrong else None


Property = Callable[[Loss, Setting], str | None]
PROPERTIES: tuple[Property, ...] = (
    one_value_per_example,
    leaves_its_input,
    gradient,
    finite,
    half_precision,
    pulls_when_wrong,
    bounded_below,
    every_expert_counts,
    classes_are_alike,
    vmap,
    autocast,
    bayes,
)
