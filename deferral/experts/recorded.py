"""Recorded experts: what people answered, read as a random one of them or as their majority."""

import torch
from torch import Tensor

from deferral.arrays import numpy_or_torch
from deferral.validation import require_tensor

__all__ = ["label_counts", "majority", "random_annotator", "random_person"]


@numpy_or_torch
def random_annotator(labels: Tensor, *, seed: int) -> Tensor:
    """The answer of an annotator drawn per row among those who labelled it.  (N, P) with -1 for no answer -> (N,)

    A row that nobody labelled gets -1.
    """
    answered = _answered(labels).cpu()
    nobody = ~answered.any(dim=-1)
    weights = answered.float()
    weights[nobody] = 1.0
    chosen = torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(seed)).to(labels.device)
    return labels.gather(-1, chosen).squeeze(-1).long().where(~nobody.to(labels.device), -1)


@numpy_or_torch
def random_person(counts: Tensor, *, seed: int) -> Tensor:
    """The answer of a person drawn per row, from how many people chose each class.  (N, K) -> (N,)"""
    _check_counts(counts)
    if bool((counts.sum(-1) == 0).any()):
        raise ValueError("counts: expected at least one person in every row; leave rows that nobody labelled out")
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(counts.cpu().double(), 1, generator=generator).squeeze(-1).to(counts.device)


@numpy_or_torch
def majority(counts: Tensor, *, seed: int) -> Tensor:
    """The class that most people chose; a tie is broken by a fair draw among the tied.  (N, K) -> (N,)

    A row that nobody labelled gets -1.  From one column per annotator: `majority(label_counts(labels, K), seed=0)`.
    """
    _check_counts(counts)
    most = (counts == counts.amax(dim=-1, keepdim=True)).cpu().float()
    chosen = torch.multinomial(most, 1, generator=torch.Generator().manual_seed(seed)).squeeze(-1).to(counts.device)
    return chosen.where(counts.amax(dim=-1) > 0, -1)


@numpy_or_torch
def label_counts(labels: Tensor, num_classes: int) -> Tensor:
    """How many annotators chose each class.  (N, P) with -1 for no answer -> (N, K)"""
    answered = _answered(labels)
    if bool((labels >= num_classes).any()):
        raise ValueError(f"labels: expected class indices in 0..{num_classes - 1} or -1, got {int(labels.max())}")
    counts = torch.zeros(len(labels), num_classes, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(-1, labels.long().clamp(min=0), answered.long())


def _answered(labels: Tensor) -> Tensor:
    require_tensor("labels", labels)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected class indices of an integer dtype, got {labels.dtype}; mark a missing label with -1")
    if labels.dim() != 2 or labels.numel() == 0:
        raise ValueError(
            f"labels: expected one column per annotator, shape (N, P) and not empty, got shape {tuple(labels.shape)}"
        )
    return labels >= 0


def _check_counts(counts: Tensor) -> None:
    require_tensor("counts", counts)
    if counts.dim() != 2 or counts.numel() == 0:
        raise ValueError(f"counts: expected (N, K) with at least one person in every row, got shape {tuple(counts.shape)}")
    # The comparison is false for NaN.
    if not bool(((counts >= 0) & (counts < torch.inf)).all()):
        raise ValueError("counts: expected how many people chose each class, got a negative number, NaN or infinity")
