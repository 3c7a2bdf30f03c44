"""Any model as an expert: what it answers, read off its scores."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deferral.decision import decide

__all__ = ["model_answers"]


def model_answers(
    model: nn.Module | Callable[[Tensor], Tensor],
    batches: Iterable[Tensor | Sequence[Any]],
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """The class of highest score for every row, all batches in one vector.  Scores (B, K) per batch -> (N,)

    A module is asked in evaluation mode and without gradient; every submodule gets its own mode back.  `batches` hold inputs,
    or tuples and lists whose first entry is the input, as a DataLoader gives them.  Inputs go to `device`, by default that of
    the module's parameters, and the answers stay there.  Ties go to the last class, as in `decide`.
    """
    if device is None and isinstance(model, nn.Module):
        weight = next(model.parameters(), None)
        device = None if weight is None else weight.device
    answers = []
    with _asked(model):
        for number, batch in enumerate(batches):
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
            if not isinstance(inputs, Tensor):
                raise TypeError(f"batches: expected tensors, or tuples that begin with one, got {type(inputs).__name__}")
            scores = model(inputs if device is None else inputs.to(device))
            _check(scores, number, len(inputs))
            answers.append(decide(scores))
    if not answers:
        raise ValueError("batches: expected at least one batch, got none; was the iterator used up by an earlier pass?")
    return torch.cat(answers)


@contextmanager
def _asked(model: nn.Module | Callable[[Tensor], Tensor]) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        if isinstance(model, nn.Module):
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _check(scores: Any, number: int, rows: int) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(
            f"model: expected it to return a tensor of scores, got {type(scores).__name__}; wrap it, as in "
            "lambda x: model(x).logits (and call model.eval() first)"
        )
    if scores.dim() != 2 or len(scores) != rows or scores.shape[-1] < 2:
        raise ValueError(
            f"model: expected scores of shape ({rows}, K) with K >= 2 in batch {number}, got {tuple(scores.shape)}; a single "
            "score z of the second class is the pair [0, z]"
        )
    # NaN and +inf pass through the maximum, and a row of -inf has no answer; -inf for some of the classes closes those.
    bad = ~scores.amax(dim=-1).isfinite()
    if bool(bad.any()):
        raise ValueError(
            f"model: expected finite scores, got NaN or infinity in row {int(bad.nonzero()[0])} of batch {number}; the model has "
            "diverged or its input holds NaN"
        )
