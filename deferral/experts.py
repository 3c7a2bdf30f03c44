"""Experts: who may be asked.  Simulated from a confusion matrix, or recorded from people's labels; all draws are seeded.

An expert is what it answers: integer labels (N,), -1 where there is no answer.  Stack several as columns for `error_costs`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from deferral.validation import check_targets

__all__ = ["draw_answers", "even_skill", "random_annotator", "random_person", "specialist"]


def even_skill(accuracy: float, num_classes: int) -> Tensor:
    """A confusion matrix that is right with probability `accuracy` on every class, else wrong evenly.  -> (K, K)"""
    if not 0.0 <= accuracy <= 1.0:
        raise ValueError(f"accuracy: expected a probability, got {accuracy}")
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
    wrong = (1 - accuracy) / (num_classes - 1)
    return torch.full((num_classes, num_classes), wrong).fill_diagonal_(accuracy)


def specialist(classes: Iterable[int], num_classes: int) -> Tensor:
    """A confusion matrix that is perfect on the given classes and answers at random, over all K, on the others.  -> (K, K)

    This is the convention of Mozannar and Sontag 2020; a few papers draw from the K - 1 wrong classes instead.
    """
    known = sorted(set(classes))
    if known and not 0 <= known[0] <= known[-1] < num_classes:
        raise ValueError(f"classes: expected indices in 0..{num_classes - 1}, got {known}")
    confusion = torch.full((num_classes, num_classes), 1 / num_classes)
    confusion[known] = torch.eye(num_classes)[known]
    return confusion


def draw_answers(confusion: Tensor, targets: Tensor, *, seed: int) -> Tensor:
    """One simulated answer per row, from row `target` of the confusion matrix P[target, answer].  (K, K), (N,) -> (N,)

    The draw is made on the CPU, so that a seed means the same answers on every device.
    """
    num_classes = len(confusion)
    confusion = confusion.double().cpu()
    sums_to_one = torch.allclose(confusion.sum(-1), torch.ones(num_classes, dtype=torch.float64), atol=1e-5)
    if confusion.shape != (num_classes, num_classes) or not sums_to_one or bool((confusion < 0).any()):
        raise ValueError(f"confusion: expected a square matrix whose rows sum to 1, got shape {tuple(confusion.shape)}")
    check_targets(targets, num_classes)
    generator = torch.Generator().manual_seed(seed)
    rows = confusion[targets.cpu()]
    return torch.multinomial(rows, 1, generator=generator).squeeze(-1).to(targets.device)


def random_annotator(labels: Tensor, *, seed: int) -> Tensor:
    """The answer of an annotator drawn per row among those who labelled it.  (N, P) with -1 for no answer -> (N,)

    A row that nobody labelled gets -1.
    """
    if labels.dim() != 2:
        raise ValueError(f"labels: expected one column per annotator, got shape {tuple(labels.shape)}")
    generator = torch.Generator().manual_seed(seed)
    answered = (labels >= 0).cpu()
    nobody = ~answered.any(dim=-1)
    weights = answered.float()
    weights[nobody] = 1.0
    chosen = torch.multinomial(weights, 1, generator=generator).to(labels.device)
    return labels.gather(-1, chosen).squeeze(-1).long().where(~nobody.to(labels.device), -1)


def random_person(counts: Tensor, *, seed: int) -> Tensor:
    """The answer of a person drawn per row, from how many people chose each class.  (N, K) -> (N,)"""
    if counts.dim() != 2 or bool((counts.sum(-1) == 0).any()):
        raise ValueError(f"counts: expected (N, K) with at least one person in every row, got shape {tuple(counts.shape)}")
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(counts.cpu().double(), 1, generator=generator).squeeze(-1).to(counts.device)
