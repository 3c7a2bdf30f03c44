"""Fitted estimators in one skops file: no pickle, and no type that is not named as trusted."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from torch import nn

from deferral.errors import DataError, installing
from deferral.estimators.predictor import module_digest

__all__ = ["load", "save"]

_OURS = (
    "deferral.estimators.classification.AbstainingClassifier",
    "deferral.estimators.classification.DeferralClassifier",
    "deferral.estimators.regression.AbstainingRegressor",
    "deferral.estimators.regression.DeferralRegressor",
    "deferral.estimators.rejector.CostModel",
    "deferral.estimators.rejector.HeldOut",
)


def _skops() -> Any:
    try:
        import skops.io
    except ModuleNotFoundError as error:
        raise ImportError(f"save and load need skops: {installing('sklearn')}") from error
    return skops.io


def save(estimator: Any, path: Path) -> None:
    """Write the estimator; of a torch module only the digest of its weights."""
    if isinstance(estimator.estimator_, nn.Module):
        module = estimator.estimator_
        estimator = copy.copy(estimator)
        estimator.estimator = estimator.estimator_ = None
        estimator.module_digest_ = module_digest(module)
    _skops().dump(estimator, path)


def load(cls: type[Any], path: Path, module: nn.Module | None, trusted: Sequence[str]) -> Any:
    """Read the estimator, refusing types that neither skops, nor this package, nor `trusted` names."""
    io = _skops()
    try:
        foreign = set(io.get_untrusted_types(file=path))
    except (BadZipFile, KeyError, ValueError) as error:
        raise DataError(
            f"{path}: expected a file that save() wrote, this one cannot be read ({error}); fit and save again"
        ) from error
    unknown = sorted(foreign - set(_OURS) - set(trusted))
    if unknown:
        raise ValueError(
            f"{path}: holds types that are not trusted: {unknown}; if you know where the file comes from, pass "
            f"load(path, trusted={unknown})"
        )
    estimator: Any = io.load(path, trusted=sorted(foreign))
    if not isinstance(estimator, cls):
        raise ValueError(f"{path}: expected an estimator of the class {cls.__name__}, got {type(estimator).__name__}")
    digest = vars(estimator).pop("module_digest_", None)
    if (digest is None) != (module is None):
        raise ValueError(
            f"{path}: "
            + (
                "was saved without its torch module; pass it: load(path, module=...)"
                if module is None
                else "holds its own predictor; load it without module="
            )
        )
    if module is not None:
        if module_digest(module) != digest:
            raise ValueError(f"{path}: the module has other weights than the one it was fitted with")
        estimator.estimator = estimator.estimator_ = module
    return estimator
