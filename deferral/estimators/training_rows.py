"""Has a frozen predictor seen the rows on which the second stage learns?  Clones of it that have, and that have not, tell."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils import _safe_indexing

__all__ = ["TrainingRowsWarning", "warn_of_training_rows"]

# Clones are fitted on at most this many rows, so that freezing a costly predictor still saves its price.
_MOST_ROWS = 10_000
_STANDARD_ERRORS = 4.0
_TIMES_NEARER = 9.0
# Smaller errors than this are rounding.
_ROUNDING = 1e-9
# Without clones: a mean error below this may mean that the rows were seen.
_TOO_GOOD = 0.005


class TrainingRowsWarning(UserWarning):
    """The rows of the second stage look like those that the frozen predictor was trained on.

    A wrapped scikit-learn predictor is compared with clones of it.  Of a torch module, and of what cannot be cloned and fitted
    on these rows, only a mean error near 0 (below 0.005) can be noticed, seen rows or not.
    """


def warn_of_training_rows(
    frozen: Any, X: Any, y: np.ndarray, own: np.ndarray, errors_of: Callable[[np.ndarray, np.ndarray], np.ndarray], *, level: int
) -> None:
    """TrainingRowsWarning where the frozen predictor errs on these rows as if it had learned them.  `own` (N,) are its answers.

    One clone is fitted on all rows, two on a half each, to be judged on the other half.  The rows look seen where, in the mean,
    the frozen predictor's error is (a) below half of what the clones reach on unseen rows, (b) by more than 4 standard errors
    of the paired difference, and (c) nine times nearer to what the clone of all rows reaches on its own.  A predictor that is
    good since its problem is easy fails (a), one that is good since it learned from far more rows as a rule fails (c).
    """
    rows = np.random.default_rng(0).permutation(len(y))[:_MOST_ROWS]
    errors = errors_of(own, y)
    clones = _errors_of_clones(frozen, X, y, rows, errors_of)
    if clones is None:
        if errors.mean() < _TOO_GOOD:
            warnings.warn(
                f"the frozen predictor's mean error on these {len(y)} rows is {errors.mean():.4f}, below {_TOO_GOOD}: they look "
                "like its training rows, on which a rejector learns never to defer; fit on rows that it has not seen.  If it "
                "has not seen these, it is merely good, and this can be ignored",
                TrainingRowsWarning,
                stacklevel=level + 1,
            )
        return
    unseen, seen = clones
    gained = unseen - errors[rows]
    here, on_unseen, on_seen = float(errors[rows].mean()), float(unseen.mean()), float(seen.mean())
    if (
        on_unseen > _ROUNDING
        and here < on_unseen / 2
        and gained.mean() > _STANDARD_ERRORS * gained.std() / len(rows) ** 0.5
        and _TIMES_NEARER * abs(here - on_seen) < on_unseen - here
    ):
        warnings.warn(
            f"the frozen predictor's mean error on these {len(y)} rows is {here:.3g}; clones of it reach {on_seen:.3g} on the "
            f"rows that they were fitted on and {on_unseen:.3g} on others: these look like its training rows, on which a "
            "rejector learns never to defer; fit on rows that it has not seen.  If it has not seen these, it learned from many "
            "more rows, and this can be ignored",
            TrainingRowsWarning,
            stacklevel=level + 1,
        )


def _errors_of_clones(
    frozen: Any, X: Any, y: np.ndarray, rows: np.ndarray, errors_of: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Errors on these rows of clones fitted on the other half, and of one fitted on all.  -> (n,), (n,), or None"""
    wrapped = frozen
    while isinstance(wrapped, FrozenEstimator):
        wrapped = wrapped.estimator

    def errors_after(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        answers = clone(wrapped).fit(_safe_indexing(X, train), y[train]).predict(_safe_indexing(X, test))
        return errors_of(np.asarray(answers).reshape(len(test)), y[test])

    unseen = np.empty(len(rows))
    try:
        # What a clone warns of is not about the predictor that was handed over.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unseen[1::2], unseen[::2] = errors_after(rows[::2], rows[1::2]), errors_after(rows[1::2], rows[::2])
            return unseen, errors_after(rows, rows)
    # A torch module has no clones, a half may lack a class, and `fit` may want more than rows: none of it is the caller's
    # trouble, whose predictor is fitted.
    except Exception:
        return None
