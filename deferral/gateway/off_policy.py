"""What a router would have cost on requests that another one decided, from the draws that were logged.

A logged row is a draw of one action with a known probability.  Of a policy that would have taken that action the row says the
truth, of another nothing; weighting by the inverse of the probability makes up for the latter.  Rows of one group (the same
query, asked again) are drawn together in the intervals.  Where rows are missing, since nobody judged their answers, each of
those that are there stands for 1 / heard: answers of an expert that is judged more often must not count for more.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from deferral.intervals import Interval

__all__ = [
    "FEWEST_SEEN",
    "Comparison",
    "Draws",
    "Z",
    "alike",
    "cautious_gain",
    "compare",
    "doubly_robust",
    "interval_of_mean",
    "of_no_use",
    "one_more",
    "stakes",
]

# Different queries that must have drawn a choice before anything is said of it.
FEWEST_SEEN = 20
Z = 1.96  # of a 95% interval
_RESAMPLES = 2000
_MOST_STAKE = 10.0
_DEAR = 0.99


@dataclass(frozen=True)
class Draws:
    """N logged draws among A actions."""

    action: np.ndarray  # (N,) what was drawn
    propensity: np.ndarray  # (N,) its probability
    cost: np.ndarray  # (N,) what it cost
    estimate: np.ndarray  # (N, A) cost of every action, by a model that did not see these rows
    group: np.ndarray  # (N,) integers from 0
    heard: np.ndarray | float = 1.0  # (N,) the probability that such a row is among these: that its answer was judged, say
    worst: np.ndarray | float = 1.0  # (N,) what the draw had cost, had it been of no use: `of_no_use`
    perfect: np.ndarray | float = 0.0  # (N,) and had it been perfect: its price

    def seen(self, rows: np.ndarray) -> int:
        """How many draws these rows are: a query that is asked again is drawn as before.  (N,) bool"""
        return len(np.unique(self.group[rows]))

    def weight(self, actions: np.ndarray) -> np.ndarray:
        """1 / propensity where a policy takes the action that was drawn, else 0.  (N,) -> (N,)"""
        return np.where(actions == self.action, 1 / self.propensity, 0.0)


@dataclass(frozen=True)
class Comparison:
    """Mean cost of two deterministic policies on the same draws, and what changing from one to the other gains."""

    rows: int
    differ: int  # rows on which they differ
    seen: tuple[int, int]  # of those, the draws of the old one's action, and of the new one's: a query asked again is one
    old: "Interval"  # doubly robust
    new: "Interval"
    gain: "Interval"  # old - new, doubly robust
    gain_weighted: "Interval"  # old - new, self-normalised inverse propensity
    cautious: float  # the lower end of the gain's interval, had one more draw been against it: see `cautious_gain`


def compare(draws: Draws, old: np.ndarray, new: np.ndarray, *, seed: int = 0) -> Comparison:
    """Judge two policies by the actions they take.  Draws, (N,), (N,) -> Comparison"""
    differ = old != new
    before, after = doubly_robust(draws, old), doubly_robust(draws, new)
    return Comparison(
        rows=len(differ),
        differ=int(differ.sum()),
        seen=(draws.seen(differ & (old == draws.action)), draws.seen(differ & (new == draws.action))),
        old=_mean(draws, before, seed),
        new=_mean(draws, after, seed),
        gain=_mean(draws, before - after, seed),
        gain_weighted=_self_normalised(draws, old, new, seed=seed),
        cautious=cautious_gain(draws, old, new),
    )


def cautious_gain(draws: Draws, old: np.ndarray, new: np.ndarray) -> float:
    """The lower end of the gain's 95% interval, had one more draw of the new choice been of no use, or of the old one perfect.

    -inf where the new choice was never drawn.  Where errors are rare, the few draws of a new choice, of heavy weight each, may
    hold none of them by luck, and then no resample of them does: the interval knows nothing of errors that were not seen.  One is
    allowed for, as by the rule of succession.  Where right answers are as rare, it is the old choice that looks too bad, if it
    was seldom drawn: the router before it decided as the new one does.
    """
    if not (draws.action == new)[old != new].any():
        return -math.inf
    lost, half = _less_with_one_more(draws, new, old, draws.worst)
    gained, other_half = _less_with_one_more(draws, old, new, draws.perfect)
    return min(-lost - half, gained - other_half)


def _less_with_one_more(draws: Draws, actions: np.ndarray, others: np.ndarray, cost: np.ndarray | float) -> tuple[float, float]:
    """The cost of some actions less that of others, had one more draw of the former cost so much, and half its 95% interval."""
    values, group = doubly_robust(draws, actions) - doubly_robust(draws, others), draws.group
    stands_for = np.broadcast_to(1 / np.asarray(draws.heard), len(values))
    differ = actions != others
    seen = differ & (actions == draws.action)
    if seen.any():
        once = one_more(draws, actions, seen, float(np.broadcast_to(cost, len(seen))[seen].mean()), of=int(differ.sum()))
        values = np.append(values, once - float(draws.estimate[seen, others[seen]].mean()))
        stands_for, group = np.append(stands_for, stands_for[seen].mean()), np.append(group, group.max() + 1)
    mean, half = interval_of_mean(values, stands_for, group)
    return mean, math.inf if half is None else half


def one_more(draws: Draws, actions: np.ndarray, seen: np.ndarray, cost: float, *, of: int) -> float:
    """The doubly robust cost of one more draw of a policy's actions that cost so much, like those seen.  (N,), (N,) bool

    It stands for no more than all the rows `of` which those seen are some.
    """
    expected = float(draws.estimate[seen, actions[seen]].mean())
    return expected + min(float((1 / draws.propensity[seen]).mean()), of) * (cost - expected)


def doubly_robust(draws: Draws, actions: np.ndarray) -> np.ndarray:
    """estimate(a) + 1[a was drawn] / propensity * (cost - estimate(a)); its mean, weighted by 1 / heard, is the policy's cost.

    (N,) -> (N,)

    Right on average if the propensities are, whatever the estimate; the better that is, the narrower.
    Dudík, Langford, Li, "Doubly Robust Policy Evaluation and Learning" (2011), eq. 2.
    """
    expected = draws.estimate[np.arange(len(actions)), actions]
    return expected + draws.weight(actions) * np.where(actions == draws.action, draws.cost - expected, 0.0)


def _self_normalised(draws: Draws, old: np.ndarray, new: np.ndarray, *, seed: int = 0) -> "Interval":
    """The gain old - new where weights are divided by their sum.  Draws, (N,), (N,) -> Interval

    On rows on which the two agree it is 0, so only the others are weighted: share of those * (mean cost of old - of new).
    NaN where one of the two was never drawn there.  Swaminathan, Joachims, "The Self-Normalized Estimator for
    Counterfactual Learning" (2015), section 4.
    """
    differ = (old != new).astype(float)
    before, after = differ * draws.weight(old), differ * draws.weight(new)
    parts = [differ, np.ones(len(differ)), before * draws.cost, before, after * draws.cost, after]

    def gain(sums: np.ndarray) -> np.ndarray:
        share, all_rows, cost_old, weight_old, cost_new, weight_new = sums
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(share == 0, 0.0, share / all_rows * (cost_old / weight_old - cost_new / weight_new))

    return _interval(draws, parts, gain, seed)


def stakes(prices_of_error: Sequence[float], unit: float) -> np.ndarray:
    """What an error of each request costs, in units of `unit` dollars: at most ten, so that no setting outweighs all others.

    N -> (N,)
    """
    return np.minimum(np.array(prices_of_error) / unit, _MOST_STAKE)


def of_no_use(error: np.ndarray, price: np.ndarray, action: np.ndarray) -> np.ndarray:
    """What draws had cost, had their answers been of no use, and dear: all but one in a hundred of that action cost less.

    (N,), (N,), (N,) -> (N,).  Where lengths of answers vary widely, a few draws may hold none of the dear ones by luck.
    """
    dear = np.zeros(int(action.max(initial=0)) + 1)
    for one in np.unique(action):
        dear[one] = np.quantile(price[action == one], _DEAR)
    return error + np.maximum(dear[action], price)


def alike(drawn: Sequence[float | None]) -> np.ndarray:
    """The group of each decision by the number that it was drawn by: one that is the same, or None, which none shares.

    N -> (N,) integers from 0
    """
    numbers = [-1.0 - place if number is None else number for place, number in enumerate(drawn)]
    return np.unique(numbers, return_inverse=True)[1].reshape(-1)


def interval_of_mean(values: np.ndarray, stands_for: np.ndarray, group: np.ndarray) -> tuple[float, float | None]:
    """A weighted mean and half its 95% interval, by the normal law over whole groups; None with one group.  (N,) thrice"""
    mean, groups = float(np.average(values, weights=stands_for)), int(group.max()) + 1
    if groups < 2:
        return mean, None
    off = np.bincount(group, stands_for * (values - mean), groups)
    return mean, float(Z * math.sqrt(groups / (groups - 1)) * np.linalg.norm(off) / stands_for.sum())


def _mean(draws: Draws, values: np.ndarray, seed: int) -> "Interval":
    return _interval(draws, [values, np.ones(len(values))], lambda sums: sums[0] / sums[1], seed)


def _interval(draws: Draws, columns: list[np.ndarray], figure: Callable[[np.ndarray], np.ndarray], seed: int) -> "Interval":
    """A figure of column sums, with the interval of resampled groups."""
    # A gateway that serves holds no torch.
    import torch

    from deferral.intervals import bootstrap, interval

    groups = int(draws.group.max()) + 1
    sums = torch.from_numpy(np.stack([np.bincount(draws.group, column / draws.heard, groups) for column in columns], 1))

    def figure_of(weights: "Tensor") -> "Tensor":
        return torch.from_numpy(np.asarray(figure((weights @ sums).numpy().T), float))

    estimate = float(figure_of(torch.ones(1, groups, dtype=torch.float64))[0])
    return interval(estimate, bootstrap(figure_of, groups, resamples=_RESAMPLES, seed=seed))
