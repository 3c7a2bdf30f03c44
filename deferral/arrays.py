"""NumPy arrays, lists and columns of a table wherever a function takes tensors; what goes out is NumPy then."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["numpy_or_torch"]

R = TypeVar("R")


def numpy_or_torch(function: Callable[..., R]) -> Callable[..., R]:
    """The function for whatever NumPy makes an array of: given such, and no tensor, its tensors come back as NumPy.

    The result may be a tensor, or a tuple, dict or dataclass of tensors.  A single number comes back as a NumPy scalar.
    TypeError where a parameter that is a tensor gets something that holds no numbers.
    """
    parameters = signature(function).parameters
    names = list(parameters)
    tables = {name for name, parameter in parameters.items() if parameter.annotation in (Tensor, Tensor | None)}

    def taken(name: str, value: Any) -> Any:
        return _tensor(name, value) if name in tables or isinstance(value, np.ndarray) else value

    @wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        # Of one argument too many the function itself complains.
        placed = [taken(name, value) for name, value in zip(names, args, strict=False)] + list(args[len(names) :])
        named = {name: taken(name, value) for name, value in kwargs.items()}
        result = function(*placed, **named)
        given = [*zip(args, placed, strict=True), *((kwargs[name], value) for name, value in named.items())]
        arrays = any(value is not came for came, value in given)
        return _numpy(result) if arrays and not any(isinstance(came, Tensor) for came, _ in given) else result

    return either


def _tensor(name: str, value: Any) -> Any:
    if value is None or isinstance(value, Tensor):
        return value
    # Copied: a tensor over a read-only or reversed array is not to be had.
    array = np.array(_unmasked(name, value), order="C")
    if array.dtype.kind not in "biuf":
        came = f"an array of {array.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{name}: expected a torch tensor, or numbers that NumPy makes an array of, got {came}")
    # PyTorch has hardly an operation for larger unsigned numbers, and none for the other order of bytes.
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _unmasked(name: str, value: Any) -> Any:
    """NaN for what is masked: without the mask, what lies below it would count."""
    if not isinstance(value, np.ma.MaskedArray) or not value.mask.any():
        return value
    if value.dtype.kind != "f":
        raise TypeError(f"{name}: expected no masked entries in {value.dtype}, which has no NaN for them; fill or drop them")
    return value.filled(np.nan)


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
