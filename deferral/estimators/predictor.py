"""The first stage of the estimators: any scikit-learn predictor, or a torch module that is used as it is."""

import hashlib
from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn import get_config
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import has_fit_parameter
from torch import nn

__all__ = ["classes_of", "fit_clone", "is_frozen", "log_scores", "module_digest", "module_outputs", "table_of_numbers"]

_BATCH = 4096
# Forests say exactly 0 and 1: their log-odds stop here.
_SMALLEST = 1e-6


def is_frozen(estimator: Any) -> bool:
    """True for what is used as it is, without fitting: a torch module, or scikit-learn's FrozenEstimator."""
    return isinstance(estimator, nn.Module | FrozenEstimator)


def fit_clone(estimator: Any, X: Any, y: np.ndarray, sample_weight: np.ndarray | None) -> Any:
    """A fitted clone.  In a pipeline the predictor gets the weights, and so does every step before it that takes them."""
    model = clone(estimator)
    if sample_weight is None:
        return model.fit(X, y)
    # With metadata routing the steps themselves say what they take.
    if not isinstance(model, Pipeline) or get_config()["enable_metadata_routing"]:
        return model.fit(X, y, sample_weight=sample_weight)
    *before, (last, _) = model.steps
    taking = [name for name, step in before if hasattr(step, "fit") and has_fit_parameter(step, "sample_weight")]
    return model.fit(X, y, **{f"{name}__sample_weight": sample_weight for name in [*taking, last]})


def module_outputs(module: nn.Module, X: Any) -> np.ndarray:
    """The module's outputs in evaluation mode, on its own device, in batches.  (N, ...) -> (N, ...), float64

    X becomes the dtype of the module's parameters, except that a tensor of integers (of token ids) stays one.
    """
    parameter = next(module.parameters(), torch.empty(0))
    rows = X if isinstance(X, torch.Tensor) else torch.tensor(np.asarray(X))
    if len(rows) == 0:
        raise ValueError("X: expected at least one row, got 0")
    dtype = rows.dtype if rows is X and not rows.is_floating_point() else parameter.dtype
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            outputs = [_tensor(module(batch.to(parameter.device, dtype))).cpu().double() for batch in rows.split(_BATCH)]
    finally:
        for part in training:
            part.training = True
    return torch.cat(outputs).numpy()


def _tensor(outputs: Any) -> torch.Tensor:
    if not isinstance(outputs, torch.Tensor):
        raise TypeError(
            f"estimator: expected a torch module that returns a tensor of scores, got {type(outputs).__name__}; wrap it in one "
            "that returns the scores alone"
        )
    return outputs


def module_digest(module: nn.Module) -> str:
    """SHA-256 of the module's weights and buffers by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def classes_of(model: Any) -> np.ndarray:
    """The labels that a fitted classifier chooses from; ValueError if it is none."""
    if not hasattr(model, "classes_"):
        raise ValueError(f"estimator: expected a classifier, which has classes_ after fitting, got {model!r}")
    return model.classes_


def log_scores(model: Any, X: Any, classes: np.ndarray) -> np.ndarray:
    """Scores whose softmax are the model's probabilities, one column per class.  -> (N, K)

    `predict_proba`, else `decision_function`, else the bare answers.  A class that the model has not seen gets the smallest
    probability.
    """
    if isinstance(model, nn.Module):
        return module_outputs(model, X)
    seen, table = classes_of(model), np.empty((0, 0))
    if hasattr(model, "predict_proba"):
        table = np.log(np.clip(model.predict_proba(X), _SMALLEST, None))
    elif hasattr(model, "decision_function"):
        table = np.asarray(model.decision_function(X), dtype=np.float64)
        table = np.stack([np.zeros_like(table), table], axis=-1) if table.ndim == 1 else table
    # The model gives answers alone, or scores of another shape, such as one for every pair of classes.
    if table.shape[-1] != len(seen):
        return np.where(np.asarray(model.predict(X))[:, None] == classes, 0.0, np.log(_SMALLEST))
    if np.array_equal(seen, classes):
        return table
    aligned = np.full((len(table), len(classes)), table.min(initial=0.0) + np.log(_SMALLEST))
    aligned[:, np.searchsorted(classes, seen)] = table
    return aligned


def table_of_numbers(X: Any) -> np.ndarray | None:
    """X as (N, D) float64 with NaN for what is missing or infinite; None unless it is a dense table of numbers."""
    if issparse(X) or getattr(X, "ndim", 2) != 2:
        return None
    if isinstance(X, torch.Tensor):
        X = X.detach().cpu().double().numpy()
    if hasattr(X, "iter_columns"):
        # A polars table, whose dtypes have names and no numpy kind.
        columns = X.get_columns()
        if not all(column.dtype.is_numeric() or str(column.dtype) == "Boolean" for column in columns):
            return None
        table = np.column_stack([column.cast(float).to_numpy() for column in columns]) if columns else np.empty((len(X), 0))
    elif hasattr(X, "dtypes"):
        # pandas: a dtype per column.  Nullable numbers have a kind too, categories and text have none of these.
        if not all(getattr(dtype, "kind", "O") in "biuf" for dtype in X.dtypes):
            return None
        table = X.to_numpy(dtype=np.float64, na_value=np.nan)
    else:
        table = np.asarray(X)
        if table.ndim != 2 or table.dtype.kind not in "biuf":
            return None
    table = np.array(table, dtype=np.float64)
    table[~np.isfinite(table)] = np.nan
    return table
