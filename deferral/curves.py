"""Judge: figures over every threshold.  Risk, accuracy, cost and spending against coverage, and the areas under them.

Rows are ordered by a confidence (keep the highest first) or by the deferral margin (keep the lowest first).  A threshold cannot
tell rows of equal confidence apart, nor margins that differ by float64 rounding alone, so within such a tie every curve is the
one of picking from it at random: the mean over all orders of the tied rows, whatever the order they came in.  Weights count
rows, as in `deferral.metrics`; leading dimensions of the weights become leading dimensions of the result, which makes
`deferral.intervals.bootstrap` quick.  All are O(N log N), in float64, NumPy or torch in and out.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deferral.arrays import numpy_or_torch, tensor_of
from deferral.costs import pick
from deferral.decision import decide, deferral_margin, margin_levels
from deferral.validation import action_mask, check_weights, require_actions

__all__ = [
    "BudgetCurve",
    "Curve",
    "accuracy_area",
    "accuracy_coverage_curve",
    "accuracy_gap",
    "augrc",
    "aurc",
    "budget_curve",
    "cost_coverage_curve",
    "coverage_at_risk",
    "excess_aurc",
    "excess_system_aurc",
    "generalized_risk_coverage_curve",
    "own_and_asked",
    "risk_coverage_curve",
    "system_augrc",
    "system_aurc",
]


@dataclass(frozen=True)
class Curve:
    """N + 1 points by rising coverage, the share of the rows that are kept.  (..., N+1) each"""

    coverage: Tensor
    value: Tensor

    def at(self, coverage: Tensor | float) -> Tensor:
        """The value at coverages in [0, 1], on the straight line between two points.  number or (G,) -> (...) or (..., G)"""
        places = _places("coverage", coverage)
        if not ((places >= 0) & (places <= 1)).all():
            raise ValueError(f"coverage: expected shares of the rows in [0, 1], got {coverage}")
        return _line(self.coverage, self.value, places)


@dataclass(frozen=True)
class BudgetCurve:
    """N + 1 points, from deferring no row to deferring all, in order of the deferral margin.  (..., N+1) each"""

    spend: Tensor
    value: Tensor

    def at(self, budget: Tensor | float) -> Tensor:
        """The value when the budget is spent as far as it goes, per row.  number or (G,) -> (...) or (..., G)

        On the straight line between two points, after all rows that cost nothing more; a budget for more than all rows changes
        nothing.  ValueError for a budget below what never deferring spends; NaN where that is so under some weights of many.
        """
        places = _places("budget", budget)
        if self.spend.ndim == 1 and not bool(_covered(self.spend, places).all()):
            raise ValueError(f"budget: never deferring already spends {float(self.spend[0]):g} a row, got {budget}")
        return _where_covered(self.spend, self.value, places)


@numpy_or_torch
def risk_coverage_curve(confidence: Tensor, loss: Tensor, weights: Tensor | None = None) -> Curve:
    """Mean loss of the most confident rows, at every number of rows kept.  (N,), (N,), (..., N) -> (..., N+1)

    At coverage 0, where the selective risk is not defined, the curve starts with the value of its first rows.
    El-Yaniv and Wiener, "On the Foundations of Noise-free Selective Classification" (JMLR 2010), section 2.
    """
    return _mean_of_kept(confidence, weights, loss=loss)


@numpy_or_torch
def accuracy_coverage_curve(confidence: Tensor, right: Tensor, weights: Tensor | None = None) -> Curve:
    """Accuracy on the most confident rows: the risk-coverage curve of `right`, which is 1 or 0.  -> (..., N+1)"""
    return _mean_of_kept(confidence, weights, right=right)


@numpy_or_torch
def generalized_risk_coverage_curve(confidence: Tensor, loss: Tensor, weights: Tensor | None = None) -> Curve:
    """Loss of the rows that are kept, per row of the whole set: coverage times selective risk.  -> (..., N+1)

    Traub et al., "Overcoming Common Flaws in the Evaluation of Selective Classification Systems" (NeurIPS 2024), section 3.
    """
    steps, (loss,) = _steps(-_row("confidence", confidence), weights, loss=loss)
    mass, total = _cumulative(steps), _cumulative(steps * loss)
    return Curve(coverage=mass / mass[..., -1:], value=total / mass[..., -1:])


@numpy_or_torch
def cost_coverage_curve(margin: Tensor, own_cost: Tensor, deferred_cost: Tensor, weights: Tensor | None = None) -> Curve:
    """Mean cost of the system when the rows of smallest deferral margin are kept and the others deferred.  -> (..., N+1)

    Costs may be errors (the curve is the system risk) or 1 and 0 for right and wrong (the system accuracy).  Where nobody would
    answer a deferred row its `deferred_cost` is NaN: it counts in neither sum nor number of rows (in a tie with others, the
    ratio of the two means over all orders).  If that leaves no row, the curve starts with the value of the first rows kept.
    """
    share, total, mass = _system(margin, own_cost, deferred_cost, weights)
    return Curve(coverage=share, value=_ratio(total, mass))


@numpy_or_torch
def budget_curve(
    margin: Tensor,
    own_cost: Tensor,
    deferred_cost: Tensor,
    price: Tensor,
    *,
    own_price: Tensor | float = 0.0,
    weights: Tensor | None = None,
) -> BudgetCurve:
    """Mean cost against mean spending when rows are deferred from the largest margin down.  (N,) x 4 -> (..., N+1)

    `price` is what deferring the row costs, in any currency, `own_price` what keeping it does.  A row of margin -inf, which
    nobody can be asked about, is kept throughout.
    """
    _require_one_per_row(margin, own_cost=own_cost, deferred_cost=deferred_cost, price=price)
    alone = margin.isneginf()
    deferred_cost = deferred_cost.double().where(~alone, own_cost.double())
    own_price = torch.as_tensor(own_price, dtype=torch.float64, device=margin.device)
    own_price = own_price.expand(margin.shape) if own_price.dim() == 0 else own_price
    _require_one_per_row(margin, own_price=own_price)
    price = price.double().where(~alone, own_price)
    if bool((price < own_price).any()):
        raise ValueError("price: expected at least the own price in every row; spending would fall as rows are deferred")
    steps, (own, deferred, own_price, price) = _steps(
        margin_levels(_row("margin", margin)),
        weights,
        own_cost=own_cost,
        deferred_cost=deferred_cost,
        own_price=own_price,
        price=price,
    )
    rows = steps.sum(-1, keepdim=True)
    spend = _cumulative(steps * (price - own_price)) + (steps * own_price).sum(-1, keepdim=True)
    cost = _cumulative(steps * (deferred - own)) + (steps * own).sum(-1, keepdim=True)
    return BudgetCurve(spend=spend / rows, value=cost / rows)


@numpy_or_torch
def aurc(confidence: Tensor, loss: Tensor, weights: Tensor | None = None) -> Tensor:
    """Area under the risk-coverage curve: the mean over k = 1..N of the mean loss of the k most confident rows.  -> (...)

    torch-uncertainty joins the N points by trapezoids from coverage 1/N to 1 and divides by 1 - 1/N: on few rows another number.

    With ties, the mean over all orders of the tied rows, exactly: in a tie of W rows of mean loss m, after c rows of total loss
    L, `sum_{i=1..W} (L + m i) / (c + i) = m W + (L - m c) (digamma(c + W + 1) - digamma(c + 1))`.
    Geifman, Uziel, El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers" (ICLR 2019), section 2.
    """
    return _area(confidence, weights, loss=loss)


@numpy_or_torch
def excess_aurc(confidence: Tensor, loss: Tensor, weights: Tensor | None = None) -> Tensor:
    """AURC minus the AURC of the best order there is, by the loss itself; 0 for a perfect confidence.  -> (...)

    Geifman, Uziel, El-Yaniv (ICLR 2019), section 2.
    """
    return aurc(confidence, loss, weights) - aurc(-loss.double(), loss, weights)


@numpy_or_torch
def coverage_at_risk(confidence: Tensor, loss: Tensor, at_most: float, weights: Tensor | None = None) -> Tensor:
    """The largest coverage of a threshold whose selective risk is `at_most` or less; 0 where there is none.  -> (...)

    A threshold keeps rows of equal confidence together or not at all; torch-uncertainty parts them, and says NaN for 0.  The best
    threshold is chosen on the rows that it is judged on: to serve one that keeps its risk on others, see `deferral.certified`.
    C@R of Whitehead et al., "Reliable Visual Question Answering: Abstain Rather Than Answer Incorrectly" (ECCV 2022).
    """
    if not math.isfinite(at_most):
        raise ValueError(f"at_most: expected a finite risk, in the unit of the loss, got {at_most}")
    _, mass, (total, size) = _groups(-_row("confidence", confidence), weights, loss=loss, size=loss.double().abs())
    rows, losses = _cumulative(mass), _cumulative(total)
    # 29 errors in 100 are a risk of .29, which times 100 is a little less than 29.
    within = losses <= at_most * rows + 1e-12 * _cumulative(size)
    return (rows / rows[..., -1:]).where(within, 0.0).amax(dim=-1)


@numpy_or_torch
def accuracy_area(confidence: Tensor, right: Tensor, weights: Tensor | None = None) -> Tensor:
    """Area under the accuracy-coverage curve, the mean over k = 1..N as in `aurc`; `right` is 1 or 0.  -> (...)"""
    return _area(confidence, weights, right=right)


@numpy_or_torch
def accuracy_gap(confidence: Tensor, right: Tensor, weights: Tensor | None = None) -> Tensor:
    """What the oracle's order, which puts all right answers first, has more area under its accuracy-coverage curve.  -> (...)

    Equal to `excess_aurc` of the errors.
    """
    area = _area(confidence, weights, right=right)
    return _area(right.double(), weights, right=right) - area


@numpy_or_torch
def augrc(confidence: Tensor, loss: Tensor, weights: Tensor | None = None) -> Tensor:
    """Area under the generalized risk-coverage curve, by trapezoids.  -> (...)

    For a 0/1 loss of mean e it equals (1 - AUROC) e (1 - e) + e^2 / 2, with the AUROC of the confidence, right against wrong.
    torch-uncertainty leaves the first trapezoid out, up to coverage 1/N, and divides by 1 - 1/N: on few rows another number.

    Traub et al. (NeurIPS 2024), section 3.
    """
    curve = generalized_risk_coverage_curve(confidence, loss, weights)
    return torch.trapezoid(curve.value, curve.coverage, dim=-1)


@numpy_or_torch
def system_aurc(margin: Tensor, own_cost: Tensor, deferred_cost: Tensor, weights: Tensor | None = None) -> Tensor:
    """Area under the system's cost-coverage curve, by trapezoids: the mean cost over all coverages.  -> (...)

    With 1 and 0 for right and wrong it is the area under the system's accuracy-coverage curve.  A row of weight w makes w
    trapezoids, as w rows do: with the cost (T + t i) / (N + n i) after i of them,
    `sum_{i=1..w} (T + t i) / (N + n i) = w t/n + (T - N t/n) (digamma(N/n + w + 1) - digamma(N/n + 1)) / n`.
    """
    share, total, number = _system(margin, own_cost, deferred_cost, weights)
    value = _ratio(total, number)
    if not bool(deferred_cost.isnan().any()):
        return torch.trapezoid(value, share, dim=-1)
    rows = check_weights(weights, margin).sum(-1, keepdim=True)
    width, more = share.diff(dim=-1) * rows, number.diff(dim=-1)
    before = number[..., :-1]
    # Where the number of answers stays, or there was none, the cost is a straight line or one value.
    bent = (more > 1e-9 * rows) & (before > 0)
    step = (more / width).where(bent, 1.0)
    slope = total.diff(dim=-1) / width / step
    place = before / step
    inverse = torch.digamma(place + width + 1) - torch.digamma(place + 1)
    ends = (value[..., 1:] + value[..., :-1]) / 2 * width
    curved = slope * width + (total[..., :-1] - slope * before) * inverse / step - (value[..., 1:] - value[..., :-1]) / 2
    return curved.where(bent, ends).sum(-1) / rows[..., 0]


@numpy_or_torch
def excess_system_aurc(margin: Tensor, own_cost: Tensor, deferred_cost: Tensor, weights: Tensor | None = None) -> Tensor:
    """System AURC minus that of the oracle's order, which keeps first where keeping saves most.  -> (...)

    Every deferred row must have an answer: ValueError where `deferred_cost` is NaN.
    """
    _require_one_per_row(margin, own_cost=own_cost, deferred_cost=deferred_cost)
    if bool(deferred_cost.isnan().any()):
        raise ValueError("deferred_cost: expected a cost for every row, got NaN; leave out the rows that nobody would answer")
    oracle = own_cost.double() - deferred_cost.double()
    return system_aurc(margin, own_cost, deferred_cost, weights) - system_aurc(oracle, own_cost, deferred_cost, weights)


@numpy_or_torch
def system_augrc(margin: Tensor, own_cost: Tensor, deferred_cost: Tensor, weights: Tensor | None = None) -> Tensor:
    """Area under the system's generalized risk: cost of the answers given, per row of the whole set.  -> (...)

    Differs from `system_aurc` only where nobody answers some deferred row (its `deferred_cost` is NaN); where nobody answers
    any, it is the AUGRC of abstaining.
    """
    share, total, _ = _system(margin, own_cost, deferred_cost.where(~deferred_cost.isnan(), 0.0), weights)
    rows = check_weights(weights, margin).sum(-1, keepdim=True)
    return torch.trapezoid(total / rows, share, dim=-1)


@numpy_or_torch
def own_and_asked(scores: Tensor, costs: Tensor, *, num_own: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What a curve over the threshold needs: (margin, own_cost, deferred_cost), (N,) each, from (N, A) scores and costs.

    The own action and the expert are those that `decide` prefers on each side.  A row whose experts are all masked has margin
    -inf and deferred_cost NaN, and so has one whose experts all score -inf.
    """
    require_actions(scores, costs)
    margin = deferral_margin(scores.double(), num_own=num_own, mask=mask)
    experts = None if mask is None else action_mask(scores, mask, num_own)[..., num_own:]
    asked = decide(scores[..., num_own:], mask=experts)
    own_cost = pick(costs, decide(scores[..., :num_own]))
    deferred_cost = pick(costs, asked.clamp(min=0) + num_own).where(~margin.isneginf(), torch.nan)
    return margin, own_cost, deferred_cost


def _mean_of_kept(confidence: Tensor, weights: Tensor | None, **column: Tensor) -> Curve:
    """The mean of the one column over the most confident rows, at every number of them."""
    steps, (values,) = _steps(-_row("confidence", confidence), weights, **column)
    mass, total = _cumulative(steps), _cumulative(steps * values)
    return Curve(coverage=mass / mass[..., -1:], value=_ratio(total, mass))


def _area(confidence: Tensor, weights: Tensor | None, **column: Tensor) -> Tensor:
    """The mean of that curve over its points from the first row on, as `aurc` has it."""
    _, mass, (total,) = _groups(-_row("confidence", confidence), weights, **column)
    rows, totals = _cumulative(mass), _cumulative(total)
    mean = (total / mass).where(mass > 0, 0.0)
    steps = torch.digamma(rows + 1).diff(dim=-1)
    area = total + (totals[..., :-1] - mean * rows[..., :-1]) * steps
    return area.sum(-1) / rows[..., -1]


def _row(name: str, order: Tensor) -> Tensor:
    if order.dim() != 1 or len(order) == 0:
        raise ValueError(f"{name}: expected a non-empty vector with one number per row, got shape {tuple(order.shape)}")
    if bool(order.isnan().any()):
        raise ValueError(f"{name}: expected numbers, got NaN in {int(order.isnan().sum())} rows")
    return order if order.is_floating_point() else order.double()


def _groups(order: Tensor, weights: Tensor | None, **columns: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Ties by rising order: the tie of each sorted row (N,), each tie's weight and weighted sums of the columns, (..., G)."""
    _require_one_per_row(order, **columns)
    for name, column in columns.items():
        bad = ~column.isfinite()
        if bool(bad.any()):
            raise ValueError(f"{name}: expected numbers, got NaN or infinity in {int(bad.sum())} rows; leave those rows out")
    values, rows = order.sort()
    tie = torch.cat([values.new_zeros(1, dtype=torch.long), (values[1:] != values[:-1]).long().cumsum(0)])
    weights = check_weights(weights, order)[..., rows]
    terms = [weights, *(weights * column.double()[rows] for column in columns.values())]
    count = int(tie[-1]) + 1
    if count < len(order):
        terms = [term.new_zeros(*term.shape[:-1], count).index_add(-1, tie, term) for term in terms]
    return tie, terms[0], terms[1:]


def _require_one_per_row(order: Tensor, **columns: Tensor) -> None:
    for name, column in columns.items():
        if column.shape != order.shape:
            raise ValueError(f"{name}: expected one number per row, {tuple(order.shape)}, got shape {tuple(column.shape)}")


def _steps(order: Tensor, weights: Tensor | None, **columns: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Row by row in rising order, with the rows of a tie replaced by their mean: weights (..., N), columns (..., N)."""
    tie, mass, totals = _groups(order, weights, **columns)
    size = torch.bincount(tie).double()
    means = [(total / mass).where(mass > 0, 0.0)[..., tie] for total in totals]
    return (mass / size)[..., tie], means


def _system(margin: Tensor, own_cost: Tensor, deferred_cost: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Share of the rows kept, total cost of those answered, their number: at every number of rows kept.  (..., N+1) each"""
    answered = ~deferred_cost.isnan()
    steps, (own, deferred, answered) = _steps(
        -margin_levels(_row("margin", margin)),
        weights,
        own_cost=own_cost,
        deferred_cost=deferred_cost.double().where(answered, 0.0),
        answered=answered,
    )
    mass = _cumulative(steps)
    total = _cumulative(steps * (own - deferred)) + (steps * deferred).sum(-1, keepdim=True)
    number = _cumulative(steps * (1 - answered)) + (steps * answered).sum(-1, keepdim=True)
    return mass / mass[..., -1:], total, number


def _cumulative(steps: Tensor) -> Tensor:
    sums = steps.new_zeros((*steps.shape[:-1], steps.shape[-1] + 1))
    torch.cumsum(steps, -1, out=sums[..., 1:])
    return sums


def _ratio(total: Tensor, mass: Tensor) -> Tensor:
    """total / mass; before the first mass, the first ratio there is."""
    some = mass > 0
    first = some.int().argmax(-1, keepdim=True)
    ratio = total / mass
    return ratio.where(some, ratio.gather(-1, first))


def _places(name: str, given: Tensor | float) -> np.ndarray:
    return tensor_of(name, given).detach().cpu().double().numpy()


@numpy_or_torch
def _covered(spend: Tensor, places: Tensor) -> Tensor:
    """Whether budgets cover never deferring: they may themselves have been summed from prices.  (..., N+1), (G,) -> (..., G)"""
    least = spend[..., :1] * (1 - 1e-12)
    return (least <= places.reshape(-1).to(spend)).reshape(spend.shape[:-1] + places.shape)


@numpy_or_torch
def _where_covered(spend: Tensor, value: Tensor, places: Tensor) -> Tensor:
    """The value at each budget, NaN where it does not cover never deferring.  (..., N+1), (..., N+1), (G,) -> (..., G)"""
    return _line(spend, value, places, last=True).where(_covered(spend, places), torch.nan)


@numpy_or_torch
def _line(x: Tensor, y: Tensor, places: Tensor, *, last: bool = False) -> Tensor:
    """Between the points on both sides of each place; of several points at one place, from the first or the last of them."""
    at = places.reshape(-1).to(x).expand(*x.shape[:-1], places.numel()).contiguous()
    # A budget that differs by rounding from what is spent at a point is that point's.
    found = at + 1e-12 * at.abs() if last else at
    right = torch.searchsorted(x.contiguous(), found, right=last).clamp(1, x.shape[-1] - 1)
    x0, x1, y0, y1 = x.gather(-1, right - 1), x.gather(-1, right), y.gather(-1, right - 1), y.gather(-1, right)
    share = ((at - x0) / (x1 - x0)).where(x1 > x0, 1.0).clamp(0, 1)
    return (y0 + share * (y1 - y0)).reshape(x.shape[:-1] + places.shape)
