"""Thresholds fitted on held-out scores.  On real data the natural threshold of a good surrogate may never defer.

Each function returns offsets (A,), float64, for `decide(scores, offsets)`; what it says of the rows it was given holds there,
ties included, and on new rows up to sampling.  For a promise on new rows see `deferral.certified`, for a capacity of each expert
`deferral.capacity`.  The first `num_own` actions (K in the single stage, 1 in two stages) are the own ones.  NumPy or torch in
and out.

To close an action give a mask or -inf.  A number such as finfo.min is a score like any other; but an offset that would lift it
would round away what the other experts differ by, so that of several experts none is lifted so far.  In the tenth of the rows
where the two best experts lie nearest to each other, an offset may still round them together: the later one is then asked, and
what was counted of that row was the other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deferral.arrays import numpy_or_torch
from deferral.costs import pick
from deferral.curves import own_and_asked
from deferral.decision import decide, margin_levels
from deferral.validation import (
    check_costs,
    check_scores,
    check_weights,
    checked_scores,
    require_actions,
    require_floating,
    require_share,
    require_tensor,
)

__all__ = ["budget_offsets", "coverage_offsets", "deferral_rate_offsets", "fit_offsets", "fit_temperature"]


@numpy_or_torch
def fit_offsets(
    scores: Tensor,
    costs: Tensor,
    *,
    num_own: int,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    per_expert: bool = False,
) -> Tensor:
    """Offsets that minimise the mean cost of `decide(scores, offsets)` on these rows, exactly.  (N, A), (N, A) -> (A,)

    The first `num_own` actions get 0, all experts one common number: who is the best expert stays the scores' choice, whether
    to defer is fitted.  Use rows that the scores were not trained on.  The threshold lies half way between two rows; among
    equally cheap ones it takes the one that defers least.  `weights` (N,) count rows: weight 2 is the row twice.  float64,
    O(N log N).

    With `per_expert=True` every expert gets its own number: from the common one on, each in turn is moved to its best place
    given the others, until none can gain.  Never dearer than the common number on these rows, but a local optimum; E numbers
    also overfit sooner than one.
    """
    known, mask = checked_scores(scores, num_own, mask)
    require_actions(scores, costs)
    costs = costs.expand_as(scores)
    check_costs(costs, ceiling=None, mask=mask)
    costs = costs.double()
    if weights is not None:
        require_tensor("weights", weights)
        if weights.shape != scores.shape[:1]:
            raise ValueError(f"weights: expected one per row, shape ({len(scores)},), got {tuple(weights.shape)}")
        costs = costs * check_weights(weights, scores).unsqueeze(-1)
    _, own, asked = own_and_asked(known, costs, num_own=num_own, mask=mask)
    # Where nobody can be asked the cost of asking is NaN, and does not matter.
    offsets = _common_offset(_sweep_experts(known, num_own).cheapest(own, asked.nan_to_num(0.0)), scores, num_own)
    if per_expert:
        _move_one_at_a_time(offsets, known, costs, num_own)
    return offsets


@numpy_or_torch
def coverage_offsets(scores: Tensor, coverage: float, *, num_own: int, mask: Tensor | None = None) -> Tensor:
    """Offsets that defer as many rows as possible and keep at least the share `coverage` of them.  (N, A) -> (A,)

    Rows are deferred in the order of `deferral_margin`.  Rows of equal margin stay together, on the side of being kept; rows
    without a known expert are always kept.
    """
    require_floating("scores", scores)
    require_share("coverage", coverage)
    return _defer_at_most(len(scores) - math.ceil(coverage * len(scores) - 1e-9), scores, num_own, mask)


@numpy_or_torch
def deferral_rate_offsets(scores: Tensor, rate: float, *, num_own: int, mask: Tensor | None = None) -> Tensor:
    """Offsets that defer as many rows as possible, at most the share `rate` of them.  (N, A) -> (A,)

    Rows are deferred in the order of `deferral_margin`.  Rows of equal margin stay together, on the side of being kept.
    """
    require_floating("scores", scores)
    require_share("rate", rate)
    return _defer_at_most(math.floor(rate * len(scores) + 1e-9), scores, num_own, mask)


@numpy_or_torch
def budget_offsets(scores: Tensor, price: Tensor, budget: float, *, num_own: int, mask: Tensor | None = None) -> Tensor:
    """Offsets that defer as many rows as a budget pays for, in the order of `deferral_margin`.  (N, A), (A,) or (N, A) -> (A,)

    `price` is what each action costs, own actions included, and `budget` the mean price of a row, both in one currency.
    ValueError where no threshold stays within the budget: with free own actions never deferring always does.
    """
    known, mask = checked_scores(scores, num_own, mask)
    require_actions(scores, price, name="price")
    # 0.1 in float32 is a little more than a tenth, and a budget may itself have been summed from prices.
    rounding = torch.finfo(torch.float32).eps if price.dtype == torch.float32 else 1e-12
    price = price.double().expand_as(scores)
    check_costs(price, ceiling=None, mask=mask, name="price")
    _, own, asked = own_and_asked(known, price, num_own=num_own, mask=mask)
    sweep = _sweep_experts(known, num_own)
    spent = (sweep.sums_over_kept(own) + sweep.sums_over_deferred(asked)) / len(scores)
    affordable = spent <= budget * (1 + rounding)
    if not bool(affordable.any()):
        raise ValueError(
            f"budget: expected at least {float(spent.min()):g} a row, the least that any threshold spends on these rows "
            f"(never deferring spends {float(spent[0]):g}), got {budget:g}"
        )
    return _common_offset(sweep.thresholds[affordable.nonzero().max()], scores, num_own)


@numpy_or_torch
def fit_temperature(loss: Callable[[Tensor], Tensor], scores: Tensor) -> float:
    """The temperature T > 0 that minimises `loss(scores / T).mean()`; read probabilities off `scores / T`.  (..., A) -> float

    `loss` maps scores to one number per row and its optimum must be a probability: cross-entropy, or a surrogate at mu = 1.
    Use rows that the scores were not trained on.  ValueError where the optimum lies at T = 0 (no row is wrong, so that no
    confidence is too high) or at infinity (constant scores do better).  Guo, Pleiss, Sun, Weinberger, "On Calibration of
    Modern Neural Networks" (ICML 2017), section 4.2.
    """
    check_scores(scores)
    if scores.numel() == 0:
        raise ValueError(f"scores: expected at least one row, got shape {tuple(scores.shape)}")
    closed = scores.isneginf()
    finite = scores.detach().double().masked_fill(closed, 0.0)

    def loss_at(temperature: Tensor | float) -> Tensor:
        # Dividing -inf by T would give a gradient of NaN, so closed actions are 0 here and -inf again afterwards.
        return loss((finite / temperature).masked_fill(closed, -torch.inf)).mean()

    def mean_loss(temperature: Tensor) -> Tensor:
        value = loss_at(temperature)
        if not bool(value.isfinite()):
            raise ValueError(f"loss: expected finite numbers at every temperature, got a mean of {value.item()}")
        return value

    # Good temperatures are of the size of the scores, so the search begins at some of their quantiles: a few huge scores, such as
    # those by which a mask is made, must not set the scale for all.
    sizes = finite.abs()[finite != 0].sort().values if bool(finite.any()) else torch.ones(1)
    halves = range(scores.shape[-1].bit_length() + 1)
    with torch.no_grad():
        tried = [(float(loss_at(size)), size) for size in {float(sizes[(len(sizes) - 1) >> half]) for half in halves}]
    # Starts at which the loss is not finite are left out; where all are, the search itself raises.
    _, size = min((each for each in tried if math.isfinite(each[0])), default=tried[0])
    log_ratio = torch.zeros((), dtype=torch.float64, device=scores.device, requires_grad=True)
    search = torch.optim.LBFGS(
        [log_ratio], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        value = mean_loss(size * log_ratio.exp())
        value.backward()
        return value

    search.step(closure)
    with torch.no_grad():
        sharper, best, flatter = (float(mean_loss(size * log_ratio.exp() * times)) for times in (0.5, 1.0, 2.0))
    if not best < min(sharper, flatter):
        why = (
            "the sharper the better, as if no row were ever wrong; use rows that the model was not trained on"
            if sharper <= flatter
            else "the flatter the better: these scores say less than constant ones; is their sign or the order of columns wrong?"
        )
        raise ValueError(f"scores: no temperature is best for the {len(scores)} rows: {why}")
    return size * math.exp(float(log_ratio.detach()))


@dataclass(frozen=True)
class _Sweep:
    """Every set of rows that a threshold on asked - own can defer, from none of them to all that can be.

    `thresholds` (L+1,) fall; the i-th defers the rows whose `level` is below i.  Rows that none defers have level L.
    """

    thresholds: Tensor
    level: Tensor

    @staticmethod
    def of(asked: Tensor, own: Tensor, lead: float = math.inf) -> "_Sweep":
        """From the two scores that are compared in each row: -inf where nobody can be asked.  (N,), (N,)

        `lead` is how far the best expert lies before the next in nearly every row.  A threshold so low that lifting the
        experts by it would round that away tells nobody apart, and is left out.
        """
        asks = ~asked.isneginf()
        if not bool(asks.any()):
            return _Sweep(asked.new_zeros(1), torch.zeros_like(asks, dtype=torch.int64))
        margin, size = (asked - own)[asks], torch.maximum(asked.abs(), own.abs())[asks]
        rank = margin_levels(margin, size)
        lowest, highest = (
            margin.new_empty(int(rank.max()) + 1).scatter_reduce(0, rank, margin, reduce, include_self=False)
            for reduce in ("amin", "amax")
        )
        upper, lower, step = lowest[:-1], highest[1:], float(size.median()) or 1.0
        # Where the gap is huge, as beside a score of finfo.min that masks, its middle would be absurd: go one step from the end
        # that is nearer to 0.
        near_zero = (upper - step).where((upper - step).abs() < (lower + step).abs(), lower + step)
        between = (upper / 2 + lower / 2).where(upper - lower < 1e6 * step, near_zero)
        none, every = (margin + 1e-12 * size).max() + step, (margin - 1e-12 * size).min() - step
        lower_ones = torch.cat([between, every[None]])
        apart = torch.finfo(torch.float64).eps * lower_ones.abs() <= lead
        thresholds = torch.cat([none[None], lower_ones[apart]])
        return _Sweep(thresholds, _first_to_defer(thresholds, asked, own) - 1)

    def sums_over_deferred(self, values: Tensor) -> Tensor:
        """The sum of the values of the rows that each threshold defers.  (N,) -> (L+1,)"""
        return torch.cat([values.new_zeros(1), self._per_level(values)[:-1].cumsum(0)])

    def sums_over_kept(self, values: Tensor) -> Tensor:
        """The sum of the values of the rows that each threshold keeps.  (N,) -> (L+1,)"""
        return self._per_level(values).flip(0).cumsum(0).flip(0)

    def _per_level(self, values: Tensor) -> Tensor:
        return values.new_zeros(len(self.thresholds)).index_add(0, self.level, values)

    def cheapest(self, kept_cost: Tensor, deferred_cost: Tensor) -> Tensor:
        """The threshold of least total cost; sums in another order differ by rounding: within it, the one that defers least."""
        saved = self.sums_over_deferred(kept_cost - deferred_cost)
        return self.thresholds[(saved >= saved.max() - _rounding(kept_cost, deferred_cost)).int().argmax()]


def _first_to_defer(thresholds: Tensor, asked: Tensor, own: Tensor) -> Tensor:
    """The index of the first of the falling thresholds at which `decide` defers, L+1 where none does.  (L+1,), (N,), (N,) -> (N,)

    By bisection with the arithmetic of `decide` itself, so that no rounding parts what is counted from what is decided.
    """
    count = len(thresholds)
    keep = torch.zeros(len(asked), dtype=torch.int64, device=asked.device)
    for power in reversed(range(count.bit_length())):
        more = keep + 2**power
        keeps = (more <= count) & ~(asked - thresholds[(more - 1).clamp(max=count - 1)] >= own)
        keep = more.where(keeps, keep)
    return keep


def _rounding(*costs: Tensor) -> float:
    """How far apart two sums of the same costs may be."""
    return 1e-12 * sum(float(cost.abs().sum()) for cost in costs)


def _sweep_experts(known: Tensor, num_own: int) -> _Sweep:
    """All experts together against the own actions."""
    best = known[:, num_own:].topk(min(2, known.shape[-1] - num_own), dim=-1).values
    first, last = best[:, 0], best[:, -1]
    leads = (first - last)[last.isfinite()]
    leads = leads[leads > 4 * torch.finfo(torch.float64).eps * first[last.isfinite()].abs()].sort().values
    return _Sweep.of(first, known[:, :num_own].amax(dim=-1), float(leads[len(leads) // 10]) if len(leads) else math.inf)


def _move_one_at_a_time(offsets: Tensor, known: Tensor, costs: Tensor, num_own: int) -> None:
    """Coordinate descent on the experts' offsets, in place, until a whole round saves nothing."""
    total = pick(costs, decide(known, offsets)).sum()
    moved = True
    while moved:
        moved = False
        for expert in range(num_own, known.shape[-1]):
            others = known.clone()
            others[:, expert] = -torch.inf
            instead = decide(others, offsets)
            rival = pick(others + offsets, instead)
            # Ties go to the last action, so against a later rival the expert must be larger by at least one float.
            rival = rival.nextafter(torch.full_like(rival, torch.inf)).where(instead > expert, rival)
            asked = costs[:, expert].where(~known[:, expert].isneginf(), 0.0)
            trial = offsets.clone()
            trial[expert] = -_Sweep.of(known[:, expert], rival).cheapest(pick(costs, instead), asked)
            trial_total = pick(costs, decide(known, trial)).sum()
            if trial_total < total - _rounding(costs.where(~known.isneginf(), 0.0)):
                offsets[expert], total, moved = trial[expert], trial_total, True


def _defer_at_most(rows: int, scores: Tensor, num_own: int, mask: Tensor | None) -> Tensor:
    known, _ = checked_scores(scores, num_own, mask)
    sweep = _sweep_experts(known, num_own)
    deferred = sweep.sums_over_deferred(torch.ones(len(scores), dtype=torch.float64, device=scores.device))
    return _common_offset(sweep.thresholds[(deferred <= rows).nonzero().max()], scores, num_own)


def _common_offset(threshold: Tensor, scores: Tensor, num_own: int) -> Tensor:
    offsets = torch.zeros(scores.shape[-1], dtype=torch.float64, device=scores.device)
    offsets[num_own:] = -threshold
    return offsets
