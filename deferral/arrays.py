"""NumPy arrays, lists and columns of a table wherever a function takes tensors; what goes out is NumPy then."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from decimal import Decimal
from fractions import Fraction
from functools import wraps
from inspect import signature
from numbers import Real
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from deferral.validation import require_number, require_tensor, require_whole

__all__ = ["numpy_or_torch", "tensor_of"]

R = TypeVar("R")


def numpy_or_torch(function: Callable[..., R]) -> Callable[..., R]:
    """The function for whatever NumPy makes an array of: given such, and no tensor, its tensors come back as NumPy.

    The result may be a tensor, or a tuple, list, dict or dataclass of tensors.  A single number comes back as a NumPy scalar.
    TypeError where a parameter that is a tensor gets something that holds no numbers, one that is a number no number, one
    that counts (int) no whole number, and one that is a bool neither True nor False.
    """
    parameters = signature(function).parameters
    names = list(parameters)
    kinds = {name: _alternatives(parameter.annotation) for name, parameter in parameters.items()}

    def taken(name: str, value: Any) -> Any:
        kind = kinds.get(name)
        if kind is None:
            return value
        if value is None and NoneType in kind:
            return value
        if isinstance(value, np.ndarray):
            if Tensor in kind:
                return tensor_of(name, value)
            value = value.item() if value.ndim == 0 else value
        if kind <= {Tensor, NoneType} or (Tensor in kind and kind <= {Tensor, float} and not isinstance(value, Real)):
            return tensor_of(name, value)
        if kind <= {Tensor, float, NoneType}:
            require_number(name, value)
        elif kind <= {int, NoneType}:
            require_whole(name, value)
        elif any(get_origin(annotation) is Callable for annotation in kind) and not callable(value):
            raise TypeError(f"{name}: expected a function, got {type(value).__name__}")
        elif kind == {bool} and not isinstance(value, bool | np.bool_):
            raise TypeError(f"{name}: expected True or False, got {value!r}")
        return value

    @wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        # In older versions a compiler has no words for what follows, which tensors alone do not need.
        if torch.compiler.is_compiling() and not _arrays_among((*args, *kwargs.values())):
            return function(*args, **kwargs)
        # Of one argument too many, or of another name, the function itself complains.
        placed = [taken(name, value) for name, value in zip(names, args, strict=False)] + list(args[len(names) :])
        named = {name: taken(name, value) for name, value in kwargs.items()}
        result = function(*placed, **named)
        given = [*zip(args, placed, strict=True), *((kwargs[name], value) for name, value in named.items())]
        arrays = any(isinstance(value, Tensor) and value is not came for came, value in given)
        return _numpy(result) if arrays and not any(isinstance(came, Tensor) for came, _ in given) else result

    return either


def _arrays_among(values: tuple[Any, ...]) -> bool:
    # A loop, which every compiler follows.
    for value in values:  # noqa: SIM110
        if isinstance(value, (np.ndarray, list, tuple)):
            return True
    return False


def _alternatives(annotation: Any) -> set[Any]:
    return set(get_args(annotation)) if isinstance(annotation, UnionType) else {annotation}


def tensor_of(name: str, value: Any) -> Tensor:
    """A tensor of whatever NumPy makes an array of numbers of; TypeError of the rest."""
    if isinstance(value, Tensor):
        if value.is_complex():
            raise TypeError(f"{name}: expected real numbers, got {value.dtype}")
        return value
    if isinstance(value, tuple) and [str(getattr(part, "dtype", "")).endswith("bool") for part in value] == [False, True]:
        # Costs and their mask, which NumPy would stack.
        require_tensor(name, value)
    value = [_plain(part) for part in value] if isinstance(value, list | tuple) else _plain(value)
    # Copied: a tensor over a read-only or reversed array is not to be had.
    array = np.array(_unmasked(name, value), order="C")
    if array.dtype.kind not in "biuf":
        came = f"an array of {array.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{name}: expected a torch tensor, or numbers that NumPy makes an array of, got {came}")
    # PyTorch has hardly an operation for larger unsigned numbers, and none for longer floats or the other order of bytes.
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _plain(part: Any) -> Any:
    """What NumPy makes a number of: it reads no tensor of another device or with a gradient, and no fraction."""
    if isinstance(part, Tensor):
        return part.detach().cpu()
    return float(part) if isinstance(part, Decimal | Fraction) else part


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
    if isinstance(result, tuple | list):
        return type(result)(map(_numpy, result))
    if isinstance(result, dict):
        return {name: _numpy(value) for name, value in result.items()}
    if is_dataclass(result) and not isinstance(result, type):
        return replace(result, **{field.name: _numpy(getattr(result, field.name)) for field in fields(result)})
    return result
