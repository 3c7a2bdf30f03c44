"""NumPy arrays wherever a function takes tensors: they come in as tensors, and what goes out is NumPy again."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["numpy_or_torch"]

R = TypeVar("R")


def numpy_or_torch(function: Callable[..., R]) -> Callable[..., R]:
    """The function for NumPy arrays as well: with no tensor among its arguments, its tensors come back as NumPy arrays.

    The result may be a tensor, or a tuple, dict or dataclass of tensors.  A single number comes back as a NumPy scalar.
    """

    @wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        arrays = any(isinstance(value, np.ndarray) for value in given)
        result = function(*map(_tensor, args), **{name: _tensor(value) for name, value in kwargs.items()})
        return _numpy(result) if arrays and not any(isinstance(value, Tensor) for value in given) else result

    return either


def _tensor(value: Any) -> Any:
    # Copied: a tensor over a read-only or reversed array is not to be had.
    return torch.from_numpy(np.array(value, order="C")) if isinstance(value, np.ndarray) else value


def _numpy(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.detach().cpu().numpy()[()]
    if isinstance(result, tuple):
        return tuple(map(_numpy, result))
    if isinstance(result, dict):
        return {name: _numpy(value) for name, value in result.items()}
    if is_dataclass(result) and not isinstance(result, type):
        return replace(result, **{field.name: _numpy(getattr(result, field.name)) for field in fields(result)})
    return result
