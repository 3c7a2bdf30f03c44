"""The two ways not to answer: abstain at a constant cost, or ask one of several experts."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from sklearn.utils.validation import check_consistent_length
from torch import Tensor

from deferral.arrays import tensor_of
from deferral.estimators.two_stage import TwoStage
from deferral.validation import require_number

__all__ = ["Abstaining", "Deferring"]


class Abstaining(TwoStage):
    """Two actions: answer, or abstain at `cost`.

    `cost` may be changed after `fit`: the learned errors do not depend on it, and the threshold follows (O(N log N) in every
    call, until `fit`).
    """

    cost: float

    def fit(self, X: Any, y: Any, *, sample_weight: Any = None, groups: Any = None) -> Self:
        """Fit the predictor, the cost of its answers on rows it did not see, and the threshold.  -> self

        A row of weight 2 counts as two rows, in all three (a frozen predictor stays as it is).  `groups` (N,) are for a splitter
        such as GroupKFold in `cv`.
        """
        self._require_cost()
        targets, sample_weight = self._record(X, y, sample_weight)
        nobody = np.empty((len(targets), 0))
        return self._fit(X, targets, nobody.astype(targets.dtype), nobody.astype(bool), sample_weight, groups)

    def decision(self, X: Any) -> np.ndarray:
        """0 where the predictor answers, 1 where it abstains.  -> (N,)"""
        return self._decide(self._judge(X)[1]).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The own answer, or the mark of abstaining (`abstain_label_`; NaN in regression).  -> (N,)"""
        own, expected = self._judge(X)
        return self._marked(own, self._decide(expected).numpy() > 0)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """1 - the mean cost of the actions taken: an error (squared and standardised in regression), or `cost`.

        Compare settings of the predictor by it, not values of `cost`; `scoring="accuracy"` would count abstentions as errors.
        """
        own, expected = self._judge(X)
        targets = self._read_targets(y)
        check_consistent_length(own, targets)
        self._check_targets(targets)
        costs = self._costs(self._errors(own[:, None], np.ones((len(own), 1), dtype=bool), targets))
        taken = costs.gather(-1, self._decide(expected).unsqueeze(-1))[:, 0]
        return self._one_less(taken, targets, sample_weight)

    def _require_cost(self) -> None:
        require_number("cost", self.cost)
        if not 0 <= self.cost < float("inf"):
            raise ValueError(f"cost: expected a non-negative number, got {self.cost}")

    def _costs(self, errors: Tensor) -> Tensor:
        self._require_cost()
        return torch.cat([errors, torch.full_like(errors[:, :1], self.cost)], dim=-1)


class Deferring(TwoStage):
    """1 + E actions: answer, or ask expert j at `alpha_j * error + price_j`.

    `alpha` and `price` may be changed after `fit`: the learned errors do not depend on them, and the threshold follows
    (O(N log N) in every call, until `fit`).
    """

    alpha: float | Sequence[float]
    price: float | Sequence[float]

    def fit(self, X: Any, y: Any, expert_answers: Any = None, *, sample_weight: Any = None, groups: Any = None) -> Self:
        """Fit the predictor, the costs of all answers on rows it did not see, and the threshold.  -> self

        `expert_answers` (N, E) or (N,): masked, NaN, None and pandas' NA mean no answer, and so does -1 among integer labels
        that do not hold it.  The texts "" and "nan" are answers, and wrong ones unless they are classes: read a file so that
        its gaps become NaN.  The columns of a frame must come in the same order later.  Without experts this is the predictor
        alone.

        A row of weight 2 counts as two rows, everywhere (a frozen predictor stays as it is).  `groups` (N,) are for a splitter
        such as GroupKFold in `cv`.
        """
        targets, sample_weight = self._record(X, y, sample_weight)
        if expert_answers is None:
            expert_answers = np.empty((len(targets), 0)).astype(targets.dtype)
        self.expert_names_ = _names(expert_answers)
        experts, known = self._read_answers(expert_answers)
        check_consistent_length(targets, experts)
        self.n_experts_ = experts.shape[-1]
        silent = np.flatnonzero(~known.any(axis=0))
        if len(silent):
            raise ValueError(f"expert_answers: expected an answer in every column, got none in {silent.tolist()}; drop them")
        self._check_answers(experts, known)
        self._costs(torch.zeros(1, 1 + self.n_experts_, dtype=torch.float64))
        return self._fit(X, targets, experts, known, sample_weight, groups)

    def decision(self, X: Any, available: Any = None) -> np.ndarray:
        """0 where the predictor answers, j where expert j is asked (from 1).  -> (N,)

        `available`: who can be asked, bool, (E,) or (N, E); of one expert (N,) as well.
        """
        expected = self._judge(X)[1]
        if available is None:
            return self._decide(expected).numpy()
        mask = np.asarray(available)
        if self.n_experts_ == 1 and mask.shape == (len(expected),):
            mask = mask[:, None]
        if mask.dtype != bool or mask.shape not in ((self.n_experts_,), (len(expected), self.n_experts_)):
            raise ValueError(
                f"available: expected bool of shape ({self.n_experts_},) or {(len(expected), self.n_experts_)}, True = can be "
                f"asked, got {mask.dtype} of shape {mask.shape}"
            )
        return self._decide(expected, _with_own(np.broadcast_to(mask, (len(expected), self.n_experts_)))).numpy()

    def predict(self, X: Any, expert_answers: Any = None) -> np.ndarray:
        """The own answer, or the mark of deferring (`defer_label_`; NaN in regression).  -> (N,)

        With `expert_answers`, the answer of whoever is asked; an expert whose answer is missing cannot be asked.
        """
        own, expected = self._judge(X)
        if self.n_experts_ == 0:
            return own
        if expert_answers is None:
            return self._marked(own, self._decide(expected).numpy() > 0)
        experts, known = self._read_given(expert_answers, len(own))
        actions = self._decide(expected, _with_own(known)).numpy()
        return np.take_along_axis(np.column_stack([own, experts]), actions[:, None], axis=-1)[:, 0]

    def score(self, X: Any, y: Any, expert_answers: Any = None, sample_weight: Any = None) -> float:
        """1 - the mean cost of the actions taken: the system's accuracy where asking is free and alpha is 1.

        With `expert_answers` an expert costs what its answer costs, and one without an answer cannot be asked; otherwise what
        it is expected to cost.  In a search, route the answers: `set_score_request(expert_answers=True)`.
        """
        own, expected = self._judge(X)
        targets = self._read_targets(y)
        check_consistent_length(own, targets)
        self._check_targets(targets)
        if expert_answers is None:
            experts, known = np.empty((len(own), 0)).astype(own.dtype), np.empty((len(own), 0), dtype=bool)
        else:
            experts, known = self._read_given(expert_answers, len(own))
        errors = self._errors(np.column_stack([own, experts]), _with_own(known).numpy(), targets)
        if expert_answers is None:
            actions, costs = self._decide(expected), torch.cat([errors, expected[:, 1:]], dim=-1)
        else:
            actions, costs = self._decide(expected, _with_own(known)), self._costs(errors)
        return self._one_less(costs.gather(-1, actions.unsqueeze(-1))[:, 0], targets, sample_weight)

    def _read_given(self, expert_answers: Any, rows: int) -> tuple[np.ndarray, np.ndarray]:
        experts, known = self._read_answers(expert_answers)
        if experts.shape != (rows, self.n_experts_):
            raise ValueError(f"expert_answers: expected shape {(rows, self.n_experts_)} as in fit, got {experts.shape}")
        names = _names(expert_answers)
        if names is not None and self.expert_names_ is not None and names != self.expert_names_:
            raise ValueError(f"expert_answers: expected the columns {self.expert_names_} as in fit, in that order, got {names}")
        return experts, known

    def _costs(self, errors: Tensor) -> Tensor:
        return self._per_action("alpha", 1.0, errors) * errors + self._per_action("price", 0.0, errors)

    def _per_action(self, name: str, own: float, errors: Tensor) -> Tensor:
        value = tensor_of(name, getattr(self, name)).double()
        num_experts = errors.shape[-1] - 1
        if value.shape not in ((), (num_experts,)) or not bool((value.isfinite() & (value >= 0)).all()):
            raise ValueError(
                f"{name}: expected one non-negative number, or one per expert ({num_experts}), got {getattr(self, name)!r}"
            )
        return torch.cat([value.new_tensor([own]), value.expand(num_experts)])


def _names(table: Any) -> list[Any] | None:
    """The columns of a frame; None of what has no names."""
    return list(table.columns) if hasattr(table, "columns") else None


def _with_own(known: np.ndarray) -> Tensor:
    return torch.tensor(np.column_stack([np.ones(len(known), dtype=bool), known]))
