"""The second stage of the estimators: what each action will cost, by our own surrogate on a linear model.

One model per action, rather than one softmax over all of them: each is then a calibrated cost within its range, the threshold
is in units of cost, and an answer that is missing for one expert says nothing about another.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deferral.calibration import fit_offsets
from deferral.costs import pick
from deferral.decision import decide
from deferral.losses import two_stage_deferral
from deferral.threads import one_thread

__all__ = ["CostModel", "HeldOut", "fit_cost_model", "fit_cost_offsets"]

# Standardised features are cut here: far outside the training rows a line must not run on.
_FARTHEST = 5.0
# The predictor's own log-odds are penalised this much less than the rest: a strong penalty leaves Chow's rule, not a constant.
_LEADING_PENALTY = 0.01
_INTERCEPT_PENALTY = 0.01
_PARTS = 5
_PENALTIES = (100.0, 10.0, 1.0)
# Numbers in a table over which a product is done sooner than several threads have met.
_SMALL = 1 << 22


@dataclass(frozen=True)
class CostModel:
    """E[error_a | x] = ceiling * sigmoid(-(z @ weights + intercepts)), z the standardised features.  (N, D) -> (N, A)

    A missing feature (NaN) counts as its mean.  With `squares`, z holds the squared features as well.
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    intercepts: np.ndarray
    ceiling: float
    squares: bool

    def __call__(self, features: np.ndarray) -> Tensor:
        z = _standardised(features, self.mean, self.scale, self.squares)
        return self.ceiling * torch.sigmoid(-(z @ torch.tensor(self.weights) + torch.tensor(self.intercepts)))


@dataclass(frozen=True)
class HeldOut:
    """What the threshold rests on, kept so that prices may change: errors (N, 1+E) as expected from other folds and as found.

    `known` (N, 1+E) says which were found, `weights` (N,) as how many rows each row counts, `fold` (N,) the fold of each.
    """

    expected: np.ndarray
    found: np.ndarray
    known: np.ndarray
    weights: np.ndarray
    fold: np.ndarray

    def offsets(self, price: Callable[[Tensor], Tensor]) -> np.ndarray:
        """`fit_cost_offsets` at the costs (N, A) that `price` makes of errors (N, 1+E).  -> (A,)"""
        expected, costs = price(torch.tensor(self.expected).double()), price(torch.tensor(self.found).double())
        known = torch.tensor(self.known)
        # Abstaining needs nobody's answer.
        mask = torch.cat([known, known.new_ones(len(known), costs.shape[-1] - known.shape[-1])], dim=-1)
        return fit_cost_offsets(expected, costs, mask, torch.tensor(self.weights), self.fold).numpy()


def fit_cost_model(
    features: np.ndarray,
    errors: Tensor,
    known: Tensor,
    fold: np.ndarray,
    *,
    ceiling: float,
    sample_weight: np.ndarray | None = None,
    l2: float | None = None,
    leading: int = 0,
    squares: bool = False,
) -> tuple[CostModel, Tensor]:
    """A model of all rows, and what the models of the other folds expect of every row.  (N, D), (N, A) x 2, (N,) -> ., (N, A)

    Minimises sum two_stage_deferral([z w, 0], [error, ceiling - error]) + l2/2 |w|^2: each action is set against its
    complement, so that at the optimum softmax = [1 - E[error|x] / ceiling, E[error|x] / ceiling] (the logistic surrogate,
    mu = 1).  Errors lie in [0, ceiling]; those that are not `known` are left out.  `l2=None` takes the one of 1, 10, 100 of
    least cross-fitted loss.  The first `leading` features are penalised 100 times less.  A row of weight 2 counts as two rows.
    Convex, full batch, float64: no seed.
    """
    weights = np.ones(len(features)) if sample_weight is None else sample_weight
    present = ~np.isnan(features)
    rows = weights @ present
    rows = np.where(rows > 0, rows, 1.0)
    mean = weights @ np.where(present, features, 0.0) / rows
    # In units of a power of two nothing is rounded, and no square overflows or vanishes.
    exponent = np.frexp(np.where(present, abs(features), 0.0).max(axis=0))[1]
    units = np.ldexp(features - mean, -exponent)
    scale = np.ldexp(np.sqrt(weights @ np.where(present, units**2, 0.0) / rows), exponent)
    # A column that is constant up to rounding stays out.
    scale = np.where(scale > 1e-9 * np.abs(mean) + 1e-300, scale, np.inf)
    z = _standardised(features, mean, scale, squares)
    penalty = torch.ones(z.shape[-1], 1, dtype=torch.float64)
    penalty[:leading] = _LEADING_PENALTY

    errors, counted = errors.where(known, 0.0), known * torch.tensor(weights).unsqueeze(-1)
    part, parts = _parts(fold)
    elsewhere = counted * (part != torch.arange(parts).unsqueeze(-1)).unsqueeze(-1)
    start = torch.zeros(parts, z.shape[-1] + 1, errors.shape[-1], dtype=torch.float64)
    tried = []
    # From the strongest penalty down, each starting where the last one ended.
    for candidate in _PENALTIES if l2 is None else (float(l2),):
        start = _minimise(start, z, errors, elsewhere, candidate * penalty, ceiling)
        right = (z @ start[:, :-1] + start[:, -1:])[part, torch.arange(len(z))]
        tried.append((float((_losses(right, errors, ceiling) * counted).sum()), candidate, right))
    _, best, right = min(tried, key=lambda trial: trial[0])
    expected = ceiling * torch.sigmoid(-right)
    fitted = _minimise(start.mean(dim=0, keepdim=True), z, errors, counted.unsqueeze(0), best * penalty, ceiling)[0].numpy()
    return CostModel(mean, scale, fitted[:-1].copy(), fitted[-1].copy(), ceiling, squares), expected


def fit_cost_offsets(expected: Tensor, costs: Tensor, mask: Tensor, weights: Tensor, fold: np.ndarray) -> Tensor:
    """`fit_offsets` on scores -expected, or 0 where moving the threshold saves too little.  (N, A) x 3, (N,) x 2 -> (A,)

    The expected costs are calibrated, so that their natural threshold is 0; on few rows the best threshold is mostly noise, and
    what it saves on the rows that chose it mostly luck.  So what moving saves is measured on each fold with the threshold of
    the others, and must exceed one standard error (the one-standard-error rule of Breiman, Friedman, Olshen, Stone,
    "Classification and Regression Trees", 1984).  A row of weight 2 counts as two rows.
    """
    scores, kept = -expected, torch.zeros(expected.shape[-1], dtype=torch.float64)
    part, parts = _parts(fold)
    if scores.shape[-1] == 1 or parts == 1:
        return kept
    natural = pick(costs, decide(scores, mask=mask))
    saved = torch.zeros_like(natural)
    for left_out in range(parts):
        rest, there = part != left_out, part == left_out
        offsets = fit_offsets(scores[rest], costs[rest], num_own=1, mask=mask[rest], weights=weights[rest])
        saved[there] = natural[there] - pick(costs[there], decide(scores[there], offsets, mask=mask[there]))
    rows = weights.sum()
    mean = (weights * saved).sum() / rows
    # One row tells nothing of the spread: 0 / 0 is NaN, and the threshold stays.
    variance = (weights * (saved - mean).square()).sum() / (rows - 1).clamp(min=0)
    if mean > (variance / rows).sqrt():
        return fit_offsets(scores, costs, num_own=1, mask=mask, weights=weights)
    return kept


def _parts(fold: np.ndarray) -> tuple[Tensor, int]:
    """The part of every row, and how many there are: one row at a time would make as many problems as rows.  (N,) -> (N,), int"""
    part = torch.tensor(np.unique(fold, return_inverse=True)[1] % _PARTS)
    return part, int(part.max()) + 1


def _minimise(start: Tensor, z: Tensor, errors: Tensor, counted: Tensor, penalty: Tensor, ceiling: float) -> Tensor:
    """Weights and, last, intercepts of G problems over the same rows, which each counts as its own.  (G, D+1, A), (G, N, A)"""
    rows = counted.amax(dim=(0, 2)).sum()
    parameters = start.clone().requires_grad_()
    # The intercept of an action that was never wrong is held by next to nothing.
    held = torch.cat([penalty, penalty.new_full((1, 1), _INTERCEPT_PENALTY)])
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=500, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        right = z @ parameters[:, :-1] + parameters[:, -1:]
        losses = _losses(right, errors, ceiling)
        mean = ((losses * counted).sum() + (held * parameters.square()).sum() / 2) / rows
        mean.backward()
        return mean

    with one_thread() if z.numel() <= _SMALL else nullcontext():
        optimizer.step(objective)
    return parameters.detach()


def _losses(right: Tensor, errors: Tensor, ceiling: float) -> Tensor:
    scores, costs = torch.stack([right, torch.zeros_like(right)], dim=-1), torch.stack([errors, ceiling - errors], dim=-1)
    return two_stage_deferral(scores, costs, ceiling=ceiling)


def _standardised(features: np.ndarray, mean: np.ndarray, scale: np.ndarray, squares: bool) -> Tensor:
    if features.shape[-1] != len(mean):
        raise ValueError(
            f"X: the rejector was fitted on {len(mean)} features (the predictor's outputs, and X where it is a table of "
            f"numbers), got {features.shape[-1]}; pass X of the same kind to fit and predict"
        )
    z = torch.tensor(np.nan_to_num((features - mean) / scale, nan=0.0)).clamp(-_FARTHEST, _FARTHEST)
    return torch.cat([z, z.square() - 1], dim=-1) if squares else z
