"""Capacities: each expert answers so many rows and no more, an assignment problem whose dual prices make an online rule.

NumPy or torch in and out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deferral.arrays import numpy_or_torch, tensor_of
from deferral.decision import decide
from deferral.errors import installing
from deferral.validation import checked_scores

try:
    from scipy.optimize import linprog
    from scipy.sparse import coo_array
except ModuleNotFoundError as error:
    raise ImportError(f"capacities need SciPy: {installing('calibration')}") from error

__all__ = ["Assignment", "fit_capacities"]

# HiGHS stops at violations of 1e-10 in absolute terms; gains of this size make that a part in 10^13.
_LARGEST_GAIN = 1e3
# Scores that differ by less than this part of the largest gain are worth the same.
_TIE = 1e-9
_EXACT = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


@dataclass(frozen=True)
class Assignment:
    """The best assignment of some rows under capacities, and what it teaches about others.

    `actions` (N,) is the assignment itself.  `prices` (E,) are supporting dual prices, in units of the scores: each expert's lies
    between what one more answer would gain and what one fewer would lose, and is 0 where capacity is left over.

    `offsets` (A,) is the online rule `decide(scores, offsets)`, which needs no other row: -prices, and on the rows it comes from
    the same actions, wherever every row prefers what it was assigned.  A rule cannot part rows that are worth the same.  Where
    such a tie would exceed a capacity the expert is priced above it, so that on its own rows the rule never exceeds a capacity,
    but may leave some unused.
    """

    actions: Tensor
    prices: Tensor
    offsets: Tensor


@numpy_or_torch
def fit_capacities(
    scores: Tensor,
    capacities: Sequence[int] | Sequence[float] | Tensor,
    *,
    num_own: int,
    mask: Tensor | None = None,
) -> Assignment:
    """max sum_i scores[i, a_i] where expert j answers at most capacities[j] rows, own actions any number.  (N, A), (E,)

    Integers count rows (one number per expert), floating numbers are shares of the rows in [0, 1], rounded down.  With
    scores = -expected costs the assignment is the cheapest.  A score of -inf or a mask of False (as in `decide`) is never
    assigned.  float64 on the CPU.

    The linear programme over pairs of row and expert is a transportation problem, so that its vertices are assignments
    (Birkhoff; solved by HiGHS).  Among the dual prices that support the assignment, the ones returned leave
    every row a gap to its next best action, where there is one to be had.
    """
    known, mask = checked_scores(scores, num_own, mask)
    known, num_experts = known.cpu(), scores.shape[-1] - num_own
    limits = _row_counts(capacities, len(scores), num_experts)

    best_own = known[:, :num_own].amax(dim=-1, keepdim=True)
    gain = (known[:, num_own:] - best_own).numpy()
    # What loses more than anybody can gain binds no price (-inf, or a mask by finfo.min).
    gain = np.where(gain < -2 * gain.max(initial=0.0), -np.inf, gain)
    expert = _assign(gain, limits)
    actions = decide(known[:, :num_own])
    asked = torch.from_numpy(expert >= 0)
    actions = (torch.from_numpy(expert) + num_own).where(asked, actions)
    # A price below the rounding of the scores would be none.
    least = 1e-9 * float(best_own.abs().max())
    prices = _prices(gain, expert, limits, least)
    offsets = _rule(known, gain, limits, prices, least)
    return Assignment(*(part.to(scores.device) for part in (actions, torch.from_numpy(prices), offsets)))


def _rule(known: Tensor, gain: np.ndarray, limits: np.ndarray, prices: np.ndarray, least: float) -> Tensor:
    """Offsets with which `decide` keeps within the limits: where a tie would exceed one, at the price of fewer rows."""
    num_own = known.shape[-1] - len(limits)
    room = limits
    while True:
        offsets = torch.cat([torch.zeros(num_own, dtype=torch.float64), 0.0 - torch.from_numpy(prices)])
        actions = decide(known, offsets)
        loads = torch.bincount(actions, minlength=known.shape[-1])[num_own:].numpy()
        if (loads <= limits).all():
            return offsets
        if not room[loads > limits].any():
            raise RuntimeError("no prices were found that keep the rule within the capacities")
        # Those who prefer the expert by more than a tie remain; a price between them and the tie is one for fewer rows.
        best, second = (known + offsets).topk(2, dim=-1).values.unbind(-1)
        clear = best - second > _TIE * np.abs(gain[np.isfinite(gain)]).max()
        remaining = torch.bincount(actions[clear], minlength=known.shape[-1])[num_own:].numpy()
        room = np.where(loads > limits, np.minimum(remaining, room - 1), room).clip(min=0)
        prices = _prices(gain, _assign(gain, room), room, least)


def _row_counts(capacities: Sequence[int] | Sequence[float] | Tensor, rows: int, num_experts: int) -> np.ndarray:
    if isinstance(capacities, list | tuple) and len({isinstance(limit, float) for limit in capacities}) > 1:
        raise TypeError(
            f"capacities: expected integers (rows) or floating numbers (shares of the rows), got both in {capacities}"
        )
    given = tensor_of("capacities", capacities).detach().cpu()
    if given.shape != (num_experts,):
        raise ValueError(f"capacities: expected one number for each of {num_experts} experts, got shape {tuple(given.shape)}")
    if given.dtype == torch.bool:
        raise TypeError(f"capacities: expected integers (rows) or floating numbers (shares of the rows), got {given.dtype}")
    if given.is_floating_point():
        if not bool(((given >= 0) & (given <= 1)).all()):
            raise ValueError(
                f"capacities: expected shares of the rows in [0, 1], got {given.tolist()}; to count rows pass integers alone"
            )
        # 0.1 in float32 is a little less than a tenth; what is meant by it in fewer digits is a guess.
        if torch.finfo(given.dtype).bits < 32:
            raise TypeError(f"capacities: expected shares in float32 or float64, got {given.dtype}, which rounds them too far")
        rounding = 1 + torch.finfo(given.dtype).eps
        return np.floor(given.double().numpy() * rounding * rows).astype(np.int64)
    if bool((given < 0).any()):
        raise ValueError(f"capacities: expected numbers of rows >= 0, got {given.tolist()}")
    return given.long().numpy()


def _assign(gain: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """The expert of every row, -1 for the own answer, in a best assignment.  (N, E), (E,) -> (N,)"""
    rows, num_experts = gain.shape
    expert = np.full(rows, -1)
    # A pair that gains nothing is in no need of an answer.
    row, column = np.nonzero((gain > 0) & (limits > 0))
    if len(row) == 0:
        return expert
    value = gain[row, column]
    pair = np.arange(len(row))
    constraints = coo_array(
        (np.ones(2 * len(row)), (np.concatenate([row, rows + column]), np.concatenate([pair, pair]))),
        shape=(rows + num_experts, len(row)),
    )
    # The interior-point method ends in a crossover to a vertex, and is thirty times as fast as the simplex method.
    for method in ("highs-ipm", "highs-ds"):
        solution = linprog(
            -value * (_LARGEST_GAIN / value.max()),
            A_ub=constraints.tocsr(),
            b_ub=np.concatenate([np.ones(rows), limits]),
            method=method,
            options=_EXACT,
        )
        if solution.status == 0 and np.abs(solution.x - solution.x.round()).max() < 1e-6:
            taken = solution.x > 0.5
            expert[row[taken]] = column[taken]
            return expert
    raise RuntimeError(f"the assignment was not solved: {solution.message}")


def _prices(gain: np.ndarray, expert: np.ndarray, limits: np.ndarray, least: float) -> np.ndarray:
    """Prices under which every row prefers what it was assigned, by the widest gap.  (N, E), (N,), (E,) -> (E,)

    With the own answer as node 0 at price 0, the prices that support an assignment are those with
    price_k - price_j <= loss[k, j], the least that any row at k loses by going to j instead.
    They are found in units of a thousandth of the largest gain, or of `least` where that is more.
    """
    nodes = gain.shape[1] + 1
    worth = np.concatenate([np.zeros((len(gain), 1)), gain], axis=1)
    at = expert + 1
    here = np.take_along_axis(worth, at[:, None], axis=1)
    loss = np.full((nodes, nodes), np.inf)
    for node in np.unique(at):
        loss[node] = (here[at == node] - worth[at == node]).min(axis=0)
    np.fill_diagonal(loss, np.inf)

    unit = max(np.abs(gain[np.isfinite(gain)]).max(initial=0.0), least) / _LARGEST_GAIN or 1.0
    of, to = np.nonzero(np.isfinite(loss))
    differences = np.zeros((len(of), nodes + 1))
    differences[np.arange(len(of)), of] += 1
    differences[np.arange(len(of)), to] -= 1
    differences[:, nodes] = 1  # the gap
    # Nobody pays more than all that can be gained; capacity that is left over, or never can be used up, is free.
    full = (np.bincount(at, minlength=nodes)[1:] >= limits) & (limits < len(gain))
    highest = np.where(full, np.maximum(np.where(np.isfinite(gain), gain, 0.0).max(axis=0) / unit, 0.0) + 1.0, 0.0)

    def solve(direction: float, gap: float | None) -> np.ndarray:
        """The least (direction 1) or greatest (-1) prices with this gap; with gap None, the widest gap."""
        objective = np.append(np.full(nodes, direction), 0.0) if gap is not None else np.append(np.zeros(nodes), -1.0)
        bounds = [(0.0, 0.0), *((0.0, high) for high in highest), (None, _LARGEST_GAIN) if gap is None else (gap, gap)]
        solution = linprog(objective, A_ub=differences, b_ub=loss[of, to] / unit, bounds=bounds, options=_EXACT)
        if solution.status != 0:
            raise RuntimeError(f"the prices were not found: {solution.message}")
        return solution.x

    if len(of) == 0:
        return np.zeros(nodes - 1)
    widest = float(solve(0.0, None)[nodes])
    gap = widest / 2 if widest > 0 else widest - 1e-9
    return unit * (solve(1.0, gap) + solve(-1.0, gap))[1:nodes] / 2
