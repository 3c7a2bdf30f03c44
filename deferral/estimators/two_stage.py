"""What the four estimators share: fit the predictor, learn the costs on rows it did not see, fit the threshold, decide."""

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.base import BaseEstimator
from sklearn.model_selection import KFold, StratifiedKFold, check_cv
from sklearn.utils import _safe_indexing, get_tags, indexable
from sklearn.utils.validation import _check_sample_weight, check_consistent_length, check_is_fitted, validate_data
from torch import Tensor, nn

from deferral.decision import decide
from deferral.estimators.persistence import load, save
from deferral.estimators.predictor import fit_clone, is_frozen, table_of_numbers
from deferral.estimators.rejector import HeldOut, fit_cost_model
from deferral.estimators.training_rows import warn_of_training_rows
from deferral.validation import require_number

__all__ = ["TwoStage"]


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
    def _default(self, *, sparse: bool) -> Any:
        """The predictor where none is given; a sparse table is scaled without being centred."""
        raise NotImplementedError

    def _read_targets(self, y: Any) -> np.ndarray:
        raise NotImplementedError

    def _learn_targets(self, X: Any, y: np.ndarray, sample_weight: np.ndarray | None) -> None:
        raise NotImplementedError

    def _read_answers(self, expert_answers: Any) -> tuple[np.ndarray, np.ndarray]:
        """The answers (N, E) in the type of the targets, and which are known."""
        raise NotImplementedError

    def _check_targets(self, targets: np.ndarray) -> None:
        """ValueError where targets cannot be those of the predictor."""

    def _check_answers(self, answers: np.ndarray, known: np.ndarray) -> None:
        """ValueError where answers to learn from cannot be meant so."""

    def _marked(self, own: np.ndarray, where: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _outputs(self, model: Any, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """The own answers (N,), and the features that the predictor gives the rejector (N, D)."""
        raise NotImplementedError

    def _errors(self, answers: np.ndarray, known: np.ndarray, y: np.ndarray) -> Tensor:
        raise NotImplementedError

    # What abstaining and deferring define.
    def _costs(self, errors: Tensor) -> Tensor:
        """The costs (N, A) of errors (N, 1+E) at the present prices, which are checked."""
        raise NotImplementedError

    def _fit(
        self, X: Any, y: np.ndarray, experts: np.ndarray, known: np.ndarray, sample_weight: np.ndarray | None, groups: Any
    ) -> Self:
        X, y = indexable(X, y)
        own, outputs, fold = self._unseen_outputs(X, y, sample_weight, groups)
        weights = np.ones(len(y)) if sample_weight is None else sample_weight
        # A splitter such as TimeSeriesSplit tests only some rows: the second stage takes those.
        rows = np.flatnonzero(fold >= 0)
        if len(silent := np.flatnonzero(~known[rows].any(axis=0))):
            raise ValueError(
                f"expert_answers: expected an answer in every column on the rows that the second stage learns from, got none in "
                f"{silent.tolist()}; drop them, or give those rows a weight and a test part of cv"
            )
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
            sample_weight=weights[rows],
        )
        self.held_out_ = HeldOut(unseen.float().numpy(), errors.float().numpy(), known, weights[rows], fold[rows])
        self._offsets_of_fit, self._tariff_of_fit = self.held_out_.offsets(self._costs), self._tariff()
        return self

    @property
    def offsets_(self) -> np.ndarray:
        """What is taken off each action's expected cost, fitted at the present prices on the held-out errors.  (A,)"""
        check_is_fitted(self)
        same = np.array_equal(self._tariff(), self._tariff_of_fit)
        return self._offsets_of_fit if same else self.held_out_.offsets(self._costs)

    def _tariff(self) -> np.ndarray:
        """What every action costs without an error and with one: all that costs depend on.  (2, A)"""
        columns = self.held_out_.found.shape[-1]
        return self._costs(torch.tensor([0.0, 1.0], dtype=torch.float64).unsqueeze(-1).expand(2, columns)).numpy()

    def _unseen_outputs(
        self, X: Any, y: np.ndarray, sample_weight: np.ndarray | None, groups: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fit the predictor; its answers (N,) and outputs (N, D) where it was not fitted, and the fold of every row (N,)."""
        base = self._default(sparse=issparse(X)) if self.estimator is None else self.estimator
        frozen = is_frozen(base)
        splitter = self._splitter(y)
        self.estimator_ = base if frozen else self._fit_clone(base, X, y, sample_weight)
        parts, fold = [], np.full(len(y), -1)
        for number, (train, test) in enumerate(splitter.split(X, y, groups)):
            if (fold[test] >= 0).any():
                raise ValueError("cv: expected every row in at most one test part; use a splitter such as KFold")
            fold[test] = number
            if not frozen:
                rows = np.arange(len(y))
                if np.isin(rows[test], rows[train]).any():
                    raise ValueError(
                        "cv: expected no row in the train and the test part of one split; use a splitter such as KFold"
                    )
                weights = None if sample_weight is None else sample_weight[train]
                model = self._fit_clone(base, _safe_indexing(X, train), y[train], weights)
                parts.append((test, *self._outputs(model, _safe_indexing(X, test))))
        if sample_weight is not None:
            # Rows of weight 0 are left out, as if they were not there.
            fold[sample_weight == 0] = -1
        if len(np.unique(fold[fold >= 0])) < 2:
            raise ValueError("cv: expected at least two test parts, since the threshold is cross-fitted too")
        if frozen:
            parts = [(np.arange(len(y)), *self._outputs(base, X))]
            there = np.flatnonzero(fold >= 0)
            warn_of_training_rows(
                base, _safe_indexing(X, there), _safe_indexing(y, there), parts[0][1][there], self._own_errors, level=4
            )
        own = np.zeros(len(y), dtype=np.result_type(*(answers for _, answers, _ in parts)))
        outputs = np.zeros((len(y), parts[0][2].shape[-1]))
        for test, answers, features in parts:
            own[test], outputs[test] = answers, features
        return own, outputs, fold

    def _fit_clone(self, base: Any, X: Any, y: np.ndarray, sample_weight: np.ndarray | None) -> Any:
        try:
            return fit_clone(base, X, y, sample_weight)
        except ValueError as error:
            if self._stratified and len(np.unique(y)) == 1:
                raise ValueError(
                    f"y: the predictor cannot learn from the one class {y.tolist()[0]!r} alone, which is all that y holds, or "
                    "all that it holds outside one fold of cv; it needs two classes of at least two rows each"
                ) from error
            raise

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
        self._require_same_columns(X)
        own, outputs = self._outputs(self.estimator_, X)
        # If it was fitted on a sparse table, the second stage has learned from the predictor's outputs alone.
        alone = len(self.cost_model_.mean) == outputs.shape[-1]
        return own, self._costs(self.cost_model_(self._with_inputs(outputs, None if alone else X)))

    def _require_same_columns(self, X: Any) -> None:
        check_is_fitted(self)
        # Only in tables is the second axis columns; that of images or sequences may be longer than in fit.
        if getattr(X, "ndim", 2) == 2:
            validate_data(self, X=X, reset=False, skip_check_array=True)

    def _decide(self, expected: Tensor, mask: Tensor | None = None) -> Tensor:
        return decide(-expected, torch.tensor(self.offsets_), mask=mask)

    def _with_inputs(self, outputs: np.ndarray, X: Any) -> np.ndarray:
        if not np.isfinite(outputs).all():
            raise ValueError("the predictor's outputs hold NaN or infinity; check the predictor and its input")
        inputs = None if X is None else table_of_numbers(X)
        return outputs if inputs is None else np.column_stack([outputs, inputs])

    def _own_errors(self, answers: np.ndarray, y: np.ndarray) -> np.ndarray:
        return self._errors(answers[:, None], np.ones((len(y), 1), dtype=bool), y)[:, 0].numpy()

    def _record(self, X: Any, y: Any, sample_weight: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """The targets and the weights, checked; what is to be known of X and the targets is stored."""
        if self.l2 is not None:
            require_number("l2", self.l2)
            if not 0 <= self.l2 < float("inf"):
                raise ValueError(f"l2: expected a finite number >= 0, or None to choose one, got {self.l2}")
        if self.estimator is not None and not isinstance(self.estimator, nn.Module) and not hasattr(self.estimator, "fit"):
            raise TypeError(
                f"estimator: expected a scikit-learn estimator, a torch module or None, got {type(self.estimator).__name__}"
            )
        validate_data(self, X=X, y=y, skip_check_array=True)
        targets = self._read_targets(y)
        check_consistent_length(X, targets)
        sample_weight = _checked(sample_weight, targets)
        self._learn_targets(X, targets, sample_weight)
        return targets, sample_weight

    def _one_less(self, costs: Tensor, targets: np.ndarray, sample_weight: Any) -> float:
        """1 - the mean of costs (N,) that these targets have."""
        return 1 - float(np.average(costs.numpy(), weights=_checked(sample_weight, targets)))

    def _splitter(self, y: np.ndarray) -> Any:
        if isinstance(self.cv, Integral):
            folds, most = int(self.cv), int(np.unique(y, return_counts=True)[1].max()) if self._stratified else len(y)
            if folds < 2:
                raise ValueError(f"cv: expected at least 2 folds, or a splitter, got {self.cv}")
            if most < folds:
                of = "rows of some class" if self._stratified else "rows"
                raise ValueError(
                    f"cv: expected at least {folds} {of}, one for each of the {folds} folds, got {most} (n_samples={len(y)}); "
                    "pass more rows, or fewer folds, at least 2"
                )
            # Shuffled, since tables are often sorted; with a fixed seed, so that fit is a function of its arguments.
            return (StratifiedKFold if self._stratified else KFold)(folds, shuffle=True, random_state=0)
        return check_cv(self.cv, y, classifier=self._stratified)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        if not isinstance(self.estimator, nn.Module):
            base = get_tags(self._default(sparse=True) if self.estimator is None else self.estimator)
            tags.input_tags.sparse = base.input_tags.sparse
            tags.input_tags.allow_nan = base.input_tags.allow_nan
        return tags


def _checked(sample_weight: Any, targets: np.ndarray) -> np.ndarray | None:
    if sample_weight is None:
        return None
    sample_weight = _check_sample_weight(sample_weight, targets, dtype=np.float64, ensure_non_negative=True)
    if not sample_weight.any():
        raise ValueError("sample_weight: expected a positive weight in some row, got none")
    return sample_weight
