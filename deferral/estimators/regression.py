"""Regressors that may abstain, or ask one of several experts.

Costs are squared errors in units of the variance of y in the training rows: always answering its mean costs about 1.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import RegressorMixin
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_array, column_or_1d
from torch import Tensor, nn

from deferral.costs import squared_costs
from deferral.estimators.actions import Abstaining, Deferring
from deferral.estimators.answers import as_numbers
from deferral.estimators.predictor import module_outputs
from deferral.estimators.two_stage import TwoStage

__all__ = ["AbstainingRegressor", "DeferralRegressor"]


class _Regression(RegressorMixin, TwoStage):
    """Numbers: an error is ((answer - y) / y_scale_)^2, at most 10; the rejector sees the prediction, X, and their squares."""

    # One wild row must not rule: an error beyond three standard deviations of y counts as that.
    _ceiling = 10.0
    # Errors grow towards both ends of the data.
    _squares = True

    def _default(self, *, sparse: bool) -> Any:
        return make_pipeline(StandardScaler(with_mean=not sparse), Ridge())

    def _read_targets(self, y: Any) -> np.ndarray:
        return column_or_1d(check_array(y, ensure_2d=False, dtype=np.float64, input_name="y"), warn=True)

    def _learn_targets(self, X: Any, y: np.ndarray, sample_weight: np.ndarray | None) -> None:
        largest = float(abs(y).max())
        if 0 < largest < np.finfo(np.float64).tiny:
            raise ValueError(f"y: expected ordinary numbers, got at most {largest:g}, which has lost digits; use a smaller unit")
        # In units of a power of two nothing is rounded, and no square overflows or vanishes.
        exponent = np.frexp(largest)[1]
        units = np.ldexp(y, -exponent)
        mean = np.average(units, weights=sample_weight)
        deviation = float(np.average((units - mean) ** 2, weights=sample_weight)) ** 0.5
        # A constant y deviates from its mean by rounding.
        self.y_scale_ = float(np.ldexp(deviation, exponent)) if deviation > 1e-12 * abs(units).max() else 1.0

    def _read_answers(self, expert_answers: Any) -> tuple[np.ndarray, np.ndarray]:
        return as_numbers(expert_answers)

    def _marked(self, own: np.ndarray, where: np.ndarray) -> np.ndarray:
        return np.where(where, np.nan, own)

    def _outputs(self, model: Any, X: Any) -> tuple[np.ndarray, np.ndarray]:
        predicted = module_outputs(model, X) if isinstance(model, nn.Module) else np.asarray(model.predict(X), dtype=np.float64)
        if predicted.ndim == 2 and predicted.shape[-1] == 1:
            predicted = predicted[:, 0]
        if predicted.ndim != 1:
            raise ValueError(f"estimator: expected one number per row, got predictions of shape {predicted.shape}")
        return predicted, predicted[:, None]

    def _errors(self, answers: np.ndarray, known: np.ndarray, y: np.ndarray) -> Tensor:
        scaled = torch.tensor(np.where(known, answers, np.nan) / self.y_scale_)
        errors, _ = squared_costs(scaled, torch.tensor(y / self.y_scale_), missing=float("nan"))
        return errors.clamp(max=self._ceiling)


class AbstainingRegressor(Abstaining, _Regression):
    """A regressor that abstains (NaN) where its expected squared error over the variance of y is at least `cost - offsets_[1]`.

    `offsets_[1]` is 0 unless another threshold is clearly cheaper, by more than one standard error on held-out rows.

    `estimator` is any scikit-learn regressor (default: standardised ridge regression), fitted on all rows; the second stage
    learns from its cross-fitted predictions.  A `FrozenEstimator` or a torch module (one number a row) is used as it is: then
    fit on rows that it has not seen (`TrainingRowsWarning` says what of this can be noticed).  `cost` is in units of the
    training variance of y (`y_scale_` squared); squared errors count as at most 10 of them.  `cv` is a number of folds or a
    splitter; `l2` the penalty of the second stage, by default chosen from 1, 10, 100 by cross-fitting.

    The second stage sees what the predictor says, and X itself where that is a dense table of numbers alone.

    Columns of `expected_cost`: [answer, abstain].  The rule Var(y|x) >= cost: Mao, Mohri, Zhong, "Regression with Multi-Expert
    Deferral" (ICML 2024).
    """

    def __init__(self, estimator: Any = None, *, cost: float = 0.25, cv: Any = 5, l2: float | None = None) -> None:
        self.estimator = estimator
        self.cost = cost
        self.cv = cv
        self.l2 = l2


class DeferralRegressor(Deferring, _Regression):
    """A regressor that asks expert j where that is expected to cost less: alpha_j * squared error / Var(y) + price_j.

    fit(X, y, expert_answers), predict(X) or predict(X, expert_answers).  Less `offsets_`, as in `AbstainingRegressor`.

    `estimator`, `cv`, `l2` and the unit of costs as in `AbstainingRegressor`; `alpha` and `price` are numbers, or one per
    expert.  Missing answers (masked, NaN) are left out.  `predict` gives NaN where it defers and no answers are handed over, and
    `decision` says whom to ask.  Columns of `expected_cost`: [own, expert 1, ..., expert E].

    Mao, Mohri, Zhong, "Regression with Multi-Expert Deferral" (ICML 2024), two-stage form.
    """

    def __init__(
        self,
        estimator: Any = None,
        *,
        alpha: float | Sequence[float] = 1.0,
        price: float | Sequence[float] = 0.0,
        cv: Any = 5,
        l2: float | None = None,
    ) -> None:
        self.estimator = estimator
        self.alpha = alpha
        self.price = price
        self.cv = cv
        self.l2 = l2
