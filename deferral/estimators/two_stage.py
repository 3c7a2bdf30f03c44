"""What the four estimators share: fit the predictor, learn the costs on rows it did not see, fit the threshold, decide."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.model_selection import KFold, StratifiedKFold, check_cv
from sklearn.utils import _safe_indexing, get_tags, indexable
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data
from torch import Tensor, nn

from deferral.decision import decide
from deferral.estimators.persistence import load, save
from deferral.estimators.predictor import is_frozen, table_of_numbers
from deferral.estimators.rejector import fit_cost_model, fit_cost_offsets

__all__ = ["TrainingRowsWarning", "TwoStage"]

# A frozen predictor whose mean error is below this on the rows handed to fit has probably seen them.
_TOO_GOOD = 0.005


class TrainingRowsWarning(UserWarning):
    """The predictor is (nearly) never wrong on the rows of the second stage: mean error below 0.005."""


class TwoStage(BaseEstimator):
    """The two stages, apart from what classes and numbers, abstaining and deferring do differently.

    Action 0 is the own answer.  `_errors` is the table (N, 1+E) of what can be wrong, in [0, `_ceiling`]; `_costs` prices it.
    """

    estimator: Any
    cv: Any
    l2: float | None
    _ceiling: float
    _leading = 0
    _squares = False
    _stratified = False

    # What classification and regression define.
    def _default(self) -> Any:
        raise NotImplementedError

    def _read_targets(self, y: Any) -> np.ndarray:
        raise NotImplementedError

    def _learn_targets(self, X: Any, y: np.ndarray) -> None:
        raise NotImplementedError

    def _read_answers(self, expert_answers: Any) -> tuple[np.ndarray, np.ndarray]:
        """The answers (N, E) in the type of the targets, and which are known."""
        raise NotImplementedError

    def _marked(self, own: np.ndarray, where: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _outputs(self, model: Any, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """The own answers (N,), and the features that the predictor gives the rejector (N, D)."""
        raise NotImplementedError

    def _errors(self, answers: np.ndarray, known: np.ndarray, y: np.ndarray) -> Tensor:
        raise NotImplementedError

    # What abstaining and deferring define.
    def _costs(self, errors: Tensor) -> Tensor:
        raise NotImplementedError

    def _fit(self, X: Any, y: np.ndarray, experts: np.ndarray, known: np.ndarray) -> Self:
        own, outputs, fold = self._unseen_outputs(*indexable(X, y))
        # A splitter such as TimeSeriesSplit tests only some rows: the second stage takes those.
        rows = np.flatnonzero(fold >= 0)
        table = self._with_inputs(outputs, X)[rows]
        known = np.column_stack([np.ones(len(rows), dtype=bool), known[rows]])
        errors, mask = self._errors(np.column_stack([own[rows], experts[rows]]), known, y[rows]), torch.tensor(known)
        self.cost_model_, unseen = fit_cost_model(
            table,
            errors,
            mask,
            fold[rows],
            ceiling=self._ceiling,
            l2=self.l2,
            leading=self._leading,
            squares=self._squares,
        )
        costs, expected = self._costs(errors), self._costs(unseen)
        # Abstaining needs nobody's answer.
        can_be_taken = torch.cat([mask, mask.new_ones(len(mask), costs.shape[-1] - mask.shape[-1])], dim=-1)
        self.offsets_ = fit_cost_offsets(expected, costs, can_be_taken).numpy()
        return self

    def _unseen_outputs(self, X: Any, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fit the predictor; its answers (N,) and outputs (N, D) where it was not fitted, and the fold of every row (N,)."""
        base = self._default() if self.estimator is None else self.estimator
        frozen = is_frozen(base)
        self.estimator_ = base if frozen else clone(base).fit(X, y)
        parts, fold = [], np.full(len(y), -1)
        for number, (train, test) in enumerate(self._splitter(y).split(np.empty(len(y)), y)):
            if (fold[test] >= 0).any():
                raise ValueError("cv: expected every row in at most one test part; use a splitter such as KFold")
            fold[test] = number
            if not frozen:
                model = clone(base).fit(_safe_indexing(X, train), y[train])
                parts.append((test, *self._outputs(model, _safe_indexing(X, test))))
        if fold.max() < 1:
            raise ValueError("cv: expected at least two test parts, since the threshold is cross-fitted too")
        if frozen:
            parts = [(np.arange(len(y)), *self._outputs(base, X))]
            self._warn_if_too_good(parts[0][1], y)
        own = np.zeros(len(y), dtype=np.result_type(*(answers for _, answers, _ in parts)))
        outputs = np.zeros((len(y), parts[0][2].shape[-1]))
        for test, answers, features in parts:
            own[test], outputs[test] = answers, features
        return own, outputs, fold

    def expected_cost(self, X: Any) -> np.ndarray:
        """The expected cost of every action, on which `decision` rests: action 0 is the own answer.  -> (N, A)

        `decision` takes the action of least `expected_cost(X) - offsets_`.
        """
        return self._judge(X)[1].numpy()

    def save(self, path: str | Path) -> None:
        """Write one skops file, without pickle.  A torch module is not in it: keep it, and hand it to `load`."""
        check_is_fitted(self)
        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, *, module: nn.Module | None = None, trusted: Sequence[str] = ()) -> Self:
        """Read what `save` wrote.  Types that skops does not trust must be named in `trusted`, as `package.Type`."""
        return load(cls, Path(path), module, trusted)

    def _judge(self, X: Any) -> tuple[np.ndarray, Tensor]:
        """The own answers (N,) and the expected costs (N, A), from one pass of the predictor."""
        check_is_fitted(self)
        own, outputs = self._outputs(self.estimator_, X)
        return own, self._costs(self.cost_model_(self._with_inputs(outputs, X)))

    def _decide(self, expected: Tensor, mask: Tensor | None = None) -> Tensor:
        return decide(-expected, torch.tensor(self.offsets_), mask=mask)

    def _with_inputs(self, outputs: np.ndarray, X: Any) -> np.ndarray:
        if not np.isfinite(outputs).all():
            raise ValueError("the predictor's outputs hold NaN or infinity; check the predictor and its input")
        inputs = table_of_numbers(X)
        return outputs if inputs is None else np.column_stack([outputs, inputs])

    def _record(self, X: Any, y: Any) -> np.ndarray:
        if self.l2 is not None and not self.l2 >= 0:
            raise ValueError(f"l2: expected a non-negative number, or None to choose one, got {self.l2}")
        validate_data(self, X=X, y=y, skip_check_array=True)
        targets = self._read_targets(y)
        check_consistent_length(X, targets)
        self._learn_targets(X, targets)
        return targets

    def _splitter(self, y: np.ndarray) -> Any:
        if isinstance(self.cv, int):
            # Shuffled, since tables are often sorted; with a fixed seed, so that fit is a function of its arguments.
            return (StratifiedKFold if self._stratified else KFold)(self.cv, shuffle=True, random_state=0)
        return check_cv(self.cv, y, classifier=self._stratified)

    def _warn_if_too_good(self, own: np.ndarray, y: np.ndarray) -> None:
        mean = float(self._errors(own[:, None], np.ones((len(y), 1), dtype=bool), y).mean())
        if mean < _TOO_GOOD:
            warnings.warn(
                f"the frozen predictor's mean error on these {len(y)} rows is {mean:.4f}, below {_TOO_GOOD}: they look like its "
                "training rows, on which a rejector learns never to defer; fit on rows that it has not seen",
                TrainingRowsWarning,
                stacklevel=5,
            )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        if not isinstance(self.estimator, nn.Module):
            base = get_tags(self._default() if self.estimator is None else self.estimator)
            tags.input_tags.sparse = base.input_tags.sparse
            tags.input_tags.allow_nan = base.input_tags.allow_nan
        return tags
