"""Experts given by a confusion matrix P[target, answer]: how they answer depends on the class, or on class and group."""

import operator
from collections.abc import Iterable

import torch
from torch import Tensor

from deferral.arrays import numpy_or_torch
from deferral.validation import require_tensor, require_whole

__all__ = ["check_indices", "draw_answers", "even_skill", "perfect_on_first", "perfect_up_to", "specialist"]


@numpy_or_torch
def even_skill(accuracy: float, num_classes: int) -> Tensor:
    """A confusion matrix that is right with probability `accuracy` on every class, else wrong evenly.  -> (K, K)"""
    if not 0.0 <= accuracy <= 1.0:
        raise ValueError(f"accuracy: expected a probability, got {accuracy}")
    _check_num_classes(num_classes)
    wrong = (1 - accuracy) / (num_classes - 1)
    return torch.full((num_classes, num_classes), wrong).fill_diagonal_(accuracy)


@numpy_or_torch
def specialist(classes: Iterable[int], num_classes: int, *, may_guess_right: bool = True) -> Tensor:
    """A confusion matrix that is perfect on the given classes and guesses on the others.  -> (K, K)

    Papers differ in what a guess is.  With `may_guess_right=True` it is drawn from all K classes, so that it is right once in K
    (Mozannar and Sontag, "Consistent Estimators for Learning to Defer to an Expert", 2020); with False it is drawn from the
    K - 1 wrong classes, so that the expert is always wrong where it does not know.
    """
    _check_num_classes(num_classes)
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise TypeError(f"classes: expected indices of classes, got {classes!r}")
    given = list(classes)
    if any(isinstance(each, bool) or getattr(each, "dtype", None) in (torch.bool, bool) for each in given):
        raise TypeError("classes: expected indices of classes, got True or False; use the indices of those that are True")
    for each in given:
        require_whole("classes", each)
    known = sorted({operator.index(each) for each in given})
    if known and not 0 <= known[0] <= known[-1] < num_classes:
        raise ValueError(f"classes: expected indices in 0..{num_classes - 1}, got {known}")
    confusion = torch.full((num_classes, num_classes), 1 / num_classes) if may_guess_right else even_skill(0.0, num_classes)
    confusion[known] = torch.eye(num_classes)[known]
    return confusion


@numpy_or_torch
def perfect_on_first(k: int, num_classes: int, *, may_guess_right: bool = True) -> Tensor:
    """`specialist` on k classes, 0..k-1: what papers mean by "perfect on the first k classes".  -> (K, K)

    k = 0 knows nothing, k = num_classes everything.  Released code often tests `label <= k` instead, see `perfect_up_to`.
    """
    if not 0 <= k <= num_classes:
        raise ValueError(f"k: expected a number of classes in 0..{num_classes}, got {k}")
    return specialist(range(k), num_classes, may_guess_right=may_guess_right)


@numpy_or_torch
def perfect_up_to(last: int, num_classes: int, *, may_guess_right: bool = True) -> Tensor:
    """`specialist` on the classes of index <= last, which are last + 1 classes.  -> (K, K)

    The convention `label <= k` of code released with Mozannar and Sontag 2020 and copied since: figures at "k" there are
    those of `perfect_on_first(k + 1, ...)`.
    """
    if not 0 <= last < num_classes:
        raise ValueError(f"last: expected the index of a class in 0..{num_classes - 1}, got {last}")
    return specialist(range(last + 1), num_classes, may_guess_right=may_guess_right)


@numpy_or_torch
def draw_answers(confusion: Tensor, targets: Tensor, *, seed: int, groups: Tensor | None = None) -> Tensor:
    """One simulated answer per row, from row `target` of the confusion matrix P[target, answer].  (K, K), (N,) -> (N,)

    An expert whose skill varies by group of rows has a matrix per group, confusion (G, K, K), and `groups` (N,) gives each
    row's group in 0..G-1.
    """
    require_tensor("confusion", confusion)
    num_classes = confusion.shape[-1] if confusion.dim() else 0
    grouped = groups is not None
    if confusion.dim() != 2 + grouped or confusion.shape[-2:] != (num_classes, num_classes) or confusion.numel() == 0:
        raise ValueError(
            f"confusion: expected shape {'(G, K, K)' if grouped else '(K, K)'}, got {tuple(confusion.shape)}; pass `groups` with "
            "one matrix per group, and only then"
        )
    table = confusion.double().cpu()
    if not torch.allclose(table.sum(-1), table.new_ones(()), atol=1e-5) or bool((table < 0).any()):
        raise ValueError("confusion: expected probabilities whose rows sum to 1 (rows are the true class, columns the answer)")
    check_indices("targets", targets, num_classes)
    if groups is None:
        laws = table[targets.cpu()]
    else:
        check_indices("groups", groups, len(table))
        if groups.shape != targets.shape:
            raise ValueError(f"groups: expected one per row, {tuple(targets.shape)}, got {tuple(groups.shape)}")
        laws = table[groups.cpu(), targets.cpu()]
    if len(laws) == 0:
        return targets.clone()
    return torch.multinomial(laws, 1, generator=torch.Generator().manual_seed(seed)).squeeze(-1).to(targets.device)


def check_indices(name: str, indices: Tensor, count: int) -> None:
    """int64 indices in 0..count-1, one per row.  Reads the values."""
    require_tensor(name, indices)
    if indices.dtype != torch.int64:
        raise TypeError(f"{name}: expected indices of dtype int64, got {indices.dtype}; use {name}.long()")
    if indices.dim() != 1:
        raise ValueError(f"{name}: expected one index per row, shape (N,), got {tuple(indices.shape)}")
    outside = (indices < 0) | (indices >= count)
    if bool(outside.any()):
        raise ValueError(
            f"{name}: expected indices in 0..{count - 1}, got {int(indices[outside][0])} and {int(outside.sum()) - 1} more; are "
            "they counted from 1, or does -1 mark a missing one?"
        )


def _check_num_classes(num_classes: int) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
