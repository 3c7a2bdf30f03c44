"""Classifiers that may abstain, or ask one of several experts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, column_or_1d
from torch import Tensor, nn

from deferral.costs import error_costs
from deferral.estimators.actions import Abstaining, Deferring
from deferral.estimators.answers import as_labels, free_label
from deferral.estimators.predictor import classes_of, is_frozen, log_scores, module_outputs
from deferral.estimators.two_stage import TwoStage
from deferral.labels import FEW_ANSWERS, misspelt
from deferral.validation import require_cost_range

__all__ = ["AbstainingClassifier", "DeferralClassifier"]


def _gives_probabilities(self: "_Classification") -> bool:
    base = self._default(sparse=True) if self.estimator is None else self.estimator
    return isinstance(base, nn.Module) or hasattr(base, "predict_proba")


class _Classification(ClassifierMixin, TwoStage):
    """Labels: an error is 1[answer != y], and the rejector sees the predictor's log-odds, margin and probabilities."""

    _ceiling = 1.0
    _leading = 1  # the log-odds
    _stratified = True

    _mark: str  # the word for a row without an own answer, and of the parameter `<word>_label`

    @available_if(_gives_probabilities)
    def predict_proba(self, X: Any) -> np.ndarray:
        """The predictor's own class probabilities, whoever answers.  -> (N, K)"""
        self._require_same_columns(X)
        model = self.estimator_
        if isinstance(model, nn.Module):
            return softmax(module_outputs(model, X), axis=-1)
        table, own = model.predict_proba(X), classes_of(model)
        # Some keep the order in which classes were named.
        return table if np.array_equal(own, self.classes_) else table[:, np.argsort(own)]

    def _default(self, *, sparse: bool) -> Any:
        return make_pipeline(StandardScaler(with_mean=not sparse), LogisticRegression(max_iter=1000))

    def _read_targets(self, y: Any) -> np.ndarray:
        labels = column_or_1d(check_array(y, ensure_2d=False, dtype=None, input_name="y"), warn=True)
        check_classification_targets(labels)
        return labels

    def _learn_targets(self, X: Any, y: np.ndarray, sample_weight: np.ndarray | None) -> None:
        if isinstance(self.estimator, nn.Module):
            self.classes_ = _classes_of_columns(module_outputs(self.estimator, X[:1]), y)
        else:
            self.classes_ = np.sort(classes_of(self.estimator)) if is_frozen(self.estimator) else np.unique(y)
        self._check_targets(y)
        label = free_label(np.union1d(self.classes_, y), getattr(self, f"{self._mark}_label"), self._mark)
        setattr(self, f"{self._mark}_label_", label)

    def _read_answers(self, expert_answers: Any) -> tuple[np.ndarray, np.ndarray]:
        return as_labels(expert_answers, self.classes_)

    def _check_targets(self, targets: np.ndarray) -> None:
        labels = targets.tolist()
        if not set(labels) & set(self.classes_.tolist()):
            raise ValueError(
                f"y: none of its labels, such as {labels[0]!r}, is a class of the predictor, such as "
                f"{self.classes_[:3].tolist()}; spell them as it was fitted"
            )

    def _check_answers(self, answers: np.ndarray, known: np.ndarray) -> None:
        for column, (labels, given) in enumerate(zip(answers.T, known.T, strict=True)):
            strange = labels[given]
            for text, meant in misspelt(_texts(strange), _texts(self.classes_)).items():
                raise ValueError(
                    f"expert_answers: {strange.tolist().count(text)} answers in column {column} are {text!r}, which is the class "
                    f"{meant!r} but for blanks or case; spell them as in y"
                )
            # Of a few answers every one may be wrong, and a label that no row has; of many hardly.
            if len(strange) >= FEW_ANSWERS and not np.isin(strange, self.classes_).any():
                raise ValueError(
                    f"expert_answers: none of the {len(strange)} answers in column {column} is a class, such as "
                    f"{strange.tolist()[0]!r} beside {self.classes_[:3].tolist()}; spell them as in y, or drop the column"
                )

    def _marked(self, own: np.ndarray, where: np.ndarray) -> np.ndarray:
        return np.where(where, np.asarray(getattr(self, f"{self._mark}_label_")), own)

    def _outputs(self, model: Any, X: Any) -> tuple[np.ndarray, np.ndarray]:
        table = log_scores(model, X, self.classes_)
        of_module = isinstance(model, nn.Module)
        answers = self.classes_[table.argmax(axis=-1)] if of_module else np.asarray(model.predict(X))
        answers = answers[:, 0] if answers.ndim == 2 and answers.shape[1] == 1 else answers
        chosen = np.searchsorted(self.classes_, answers).clip(max=len(self.classes_) - 1)
        if answers.ndim != 1 or not np.array_equal(self.classes_[chosen], answers):
            raise ValueError(f"estimator: expected a classifier that answers one of {self.classes_}, got {model!r}")
        rows = np.arange(len(chosen))
        p = softmax(table, axis=-1)
        others = p.copy()
        others[rows, chosen] = 0.0
        # From the others' sum, which keeps its digits where 1 - p would lose them.
        log_odds = np.log(p[rows, chosen].clip(min=1e-20)) - np.log(others.sum(axis=-1).clip(min=1e-20))
        return answers, np.column_stack([log_odds, p[rows, chosen] - others.max(axis=-1), p])

    def _errors(self, answers: np.ndarray, known: np.ndarray, y: np.ndarray) -> Tensor:
        # An expert may give a label that no row has: it is wrong, and needs a code of its own.
        _, codes = np.unique(np.concatenate([y, answers[known]]), return_inverse=True)
        table = np.full(answers.shape, -1)
        table[known] = codes[len(y) :]
        errors, _ = error_costs(torch.tensor(table), torch.tensor(codes[: len(y)]), missing=-1)
        return errors.double()


class AbstainingClassifier(Abstaining, _Classification):
    """A classifier that abstains where its expected error is at least `cost - offsets_[1]`.  fit(X, y), predict(X)

    `offsets_[1]` is 0 unless another threshold is clearly cheaper, by more than one standard error on held-out rows.

    `estimator` is any scikit-learn classifier (default: standardised logistic regression), fitted on all rows; the second stage
    learns from its cross-fitted answers.  A `FrozenEstimator` or a torch module (K scores a row) is used as it is: then fit
    on rows that it has not seen (`TrainingRowsWarning` says what of this can be noticed).  `predict` marks abstentions with
    `abstain_label_`: `abstain_label` if given, else -1 (or, where -1 is a class, one below the smallest), or "abstain" among
    text labels.

    The second stage sees what the predictor says, and X itself where that is a dense table of numbers alone.

    `cost` in [0, 1] is in units of one error; `cv` a number of folds or a splitter; `l2` the penalty of the second stage, by
    default chosen from 1, 10, 100 by cross-fitting.  Columns of `expected_cost`: [answer, abstain].
    """

    _mark = "abstain"

    def __init__(
        self, estimator: Any = None, *, cost: float = 0.1, cv: Any = 5, l2: float | None = None, abstain_label: Any = None
    ) -> None:
        self.estimator = estimator
        self.cost = cost
        self.cv = cv
        self.l2 = l2
        self.abstain_label = abstain_label

    def _require_cost(self) -> None:
        require_cost_range(self.cost)


class DeferralClassifier(Deferring, _Classification):
    """A classifier that asks expert j where that is expected to cost less: alpha_j * 1[wrong] + price_j.

    fit(X, y, expert_answers), predict(X) or predict(X, expert_answers).  Less `offsets_`, as in `AbstainingClassifier`.

    `estimator`, `cv` and `l2` as in `AbstainingClassifier`; `alpha` and `price` (in units of one error) are numbers, or one per
    expert.  Missing answers are left out, which is right where they are missing independently of correctness given X.
    `predict` marks deferred rows with `defer_label_` (`defer_label` if given, else -1 or "defer", as for abstaining), and
    `decision` says whom to ask.  Columns of `expected_cost`: [own, expert 1, ..., expert E].

    Two-stage deferral: Mao, Mohri, Mohri, Zhong, "Two-Stage Learning to Defer with Multiple Experts" (NeurIPS 2023).
    """

    _mark = "defer"

    def __init__(
        self,
        estimator: Any = None,
        *,
        alpha: float | Sequence[float] = 1.0,
        price: float | Sequence[float] = 0.0,
        cv: Any = 5,
        l2: float | None = None,
        defer_label: Any = None,
    ) -> None:
        self.estimator = estimator
        self.alpha = alpha
        self.price = price
        self.cv = cv
        self.l2 = l2
        self.defer_label = defer_label


def _texts(labels: np.ndarray) -> list[str]:
    return [label for label in labels.tolist() if isinstance(label, str)]


def _classes_of_columns(scores: np.ndarray, y: np.ndarray) -> np.ndarray:
    num_classes = scores.shape[-1]
    if scores.ndim != 2 or num_classes < 2:
        raise ValueError(f"estimator: expected a module that gives scores (N, K) with K >= 2, got {scores.shape} for one row")
    if y.dtype.kind in "iu":
        if y.min() < 0 or y.max() >= num_classes:
            raise ValueError(f"y: expected labels in 0..{num_classes - 1}, the module's columns, got {y.min()}..{y.max()}")
        return np.arange(num_classes)
    classes = np.unique(y)
    if len(classes) != num_classes:
        raise ValueError(
            f"y: the module has {num_classes} columns and y {len(classes)} labels; use column numbers 0..{num_classes - 1}"
        )
    return classes
