"""Criterion: any loss of this package as an nn.Module with a scalar result, for frameworks that want one."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deferral.losses.published import deep_gamblers, mixture_of_experts, picce
from deferral.losses.realizable import realizable_experts, realizable_router
from deferral.losses.score_based import score_based_abstention
from deferral.validation import check_costs, check_mask, check_scores, check_targets

__all__ = ["Criterion"]

# In these losses the last score is that of abstaining, though no argument says so; in a loss of your own every column may be
# a class.
_LAST_SCORE_ABSTAINS = {deep_gamblers, score_based_abstention}
# Their formula asks who is right; a chance of being right, or a price, has no place in it.
_RIGHT_OR_WRONG = {
    mixture_of_experts: "expert_correct",
    picce: "expert_correct",
    realizable_experts: "expert_correct",
    realizable_router: "costs",
}
_SCORES = ("scores", "rejector", "gate", "predictor_loss", "estimate", "selection")
_WITHOUT_CEILING = {
    "cost": "a cost in [0, 1], in units of one error; above 1 nobody abstains",
    "wrong": "1 where the predictor is wrong and 0 where it is right",
}
_OTHERWISE = {
    "expert_correct": "draw an answer, or train single_stage_deferral on 1 - expert_correct",
    "costs": "with prices, or chances of an error, train two_stage_deferral",
}


class Criterion(nn.Module):
    """Mean of a per-example loss over the rows that are not ignored, NaN where all are, with its options fixed.

    `Criterion(score_based_abstention, cost=0.05)(scores, targets)`.  With `validate=True` the values are read at every call:
    NaN scores, labels outside 0..K-1, costs outside [0, ceiling], fractions where an expert is right or wrong, and masked own
    actions raise ValueError.  On a GPU that synchronises; switch it off once the data is known to be right.
    """

    def __init__(self, loss: Callable[..., Tensor], *, validate: bool = True, **options: Any) -> None:
        super().__init__()
        self.loss = loss
        self.validate = validate
        self.options = options
        self._signature = inspect.signature(loss)
        if not set(_SCORES) & set(self._signature.parameters):
            raise TypeError(
                f"{self._name}: expected a loss of scores and targets, by these names, so that they can be checked and ignored "
                f"rows left out of the mean; it takes {', '.join(self._signature.parameters)}: wrap it in a function"
            )
        unknown = set(options) - set(self._signature.parameters)
        if unknown and not any(one.kind is one.VAR_KEYWORD for one in self._signature.parameters.values()):
            raise TypeError(
                f"{self._name}: no option named {', '.join(sorted(unknown))}; it takes {', '.join(self._signature.parameters)}"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mean loss; arguments as the loss takes them."""
        call = self._signature.bind(*args, **kwargs, **self.options)
        call.apply_defaults()
        if not self.validate:
            return _mean(self.loss(*args, **kwargs, **self.options), call.arguments)
        self._check_labels(call.arguments)
        # The loss itself checks shapes and dtypes, before the values that depend on them are read.
        losses = self.loss(*args, **kwargs, **self.options)
        self._check_costs(call.arguments)
        return _mean(losses, call.arguments)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{self._name}{options}, validate={self.validate}"

    @property
    def _name(self) -> str:
        return getattr(self.loss, "__name__", repr(self.loss))

    @property
    def _loss(self) -> Any:
        """The function itself, where options of it were fixed by `partial`."""
        return getattr(self.loss, "func", self.loss)

    def _check_labels(self, given: dict[str, Any]) -> None:
        for name in _SCORES:
            if name in given:
                check_scores(given[name], name=name)
        targets = given.get("targets")
        if isinstance(targets, Tensor):
            if not targets.is_floating_point():
                targets = targets[targets != given.get("ignore_index")]
            scores, costs = given["scores"], given.get("expert_costs")
            classes = scores.shape[-1] - self._extra_columns(given)
            # Where costs have the wrong shape, the loss says so; the number of classes counted here, and so this check, would be
            # wrong.
            if classes > 0 and (costs is None or costs.dim() == scores.dim()):
                check_targets(targets, classes)

    def _check_costs(self, given: dict[str, Any]) -> None:
        mask = given.get("mask")
        # In regression costs are in the units of the loss, and open above.
        ceiling = None if "predictor_loss" in given else given.get("ceiling", 1.0)
        if isinstance(given.get("weights"), Tensor):
            check_costs(given["weights"], mask=mask, name="weights")
        for name in ("cost", "wrong", "expert_cost", "expert_correct", "expert_costs", "costs"):
            if not isinstance(given.get(name), Tensor):
                continue
            costs = given[name] if given[name].is_floating_point() else given[name].float()
            costs = _of_rows_that_count(costs, given)
            own = 1 if name == "costs" else 0
            experts = costs.shape[-1] - own if costs.dim() else 0
            asked, known = _last(costs, experts), None if mask is None else _last(mask, experts)
            if known is not None:
                asked, known = torch.broadcast_tensors(asked, known)
            shown = asked if known is None else asked.where(known, 0)
            if name == "expert_correct" and bool((shown.abs() > 1).any()):
                raise ValueError(
                    "expert_correct: expected 1 where the expert was right and 0 where it was wrong, answers == targets, got "
                    "other numbers; answers or costs mean something else to this loss"
                )
            if name in _WITHOUT_CEILING and "predictor_loss" not in given and bool((asked > 1).any()):
                raise ValueError(f"{name}: expected {_WITHOUT_CEILING[name]}, got {float(asked.max()):g}")
            check_costs(asked, ceiling=ceiling, mask=known, name=name)
            if self._loss in _RIGHT_OR_WRONG and name in _RIGHT_OR_WRONG[self._loss]:
                fraction = (asked != 0) & (asked != 1) & (True if known is None else known)
                if fraction.any():
                    raise ValueError(
                        f"{name}: {self._name} takes 0 and 1 alone, got {asked[fraction][0]:.4g}; {_OTHERWISE[name]}"
                    )
            if own:
                check_costs(costs[..., :own], ceiling=ceiling, name=name)
        if mask is not None:
            _check_own(mask, given)

    def _extra_columns(self, given: dict[str, Any]) -> int:
        """How many columns of the scores stand behind the class columns: one per expert, none, or one for abstaining."""
        if "rejector" in given or "gate" in given:
            return 0
        if "expert_costs" in given:
            return given["expert_costs"].shape[-1]
        if "expert_correct" in given:
            correct = given["expert_correct"]
            # Numbers without an axis for experts belong to a single one.
            return 1 if correct.dim() < given["scores"].dim() else correct.shape[-1]
        return 1 if "expert_cost" in given or self._loss in _LAST_SCORE_ABSTAINS else 0


def _of_rows_that_count(costs: Tensor, given: dict[str, Any]) -> Tensor:
    """Costs, 0 in the rows whose target is ignored: nobody knows what these cost."""
    targets, ignore_index = given.get("targets"), given.get("ignore_index")
    if ignore_index is None or not isinstance(targets, Tensor) or targets.is_floating_point():
        return costs
    counts = targets != ignore_index
    if costs.shape == counts.shape:
        return costs.where(counts, 0.0)
    return costs.where(counts.unsqueeze(-1), 0.0) if costs.shape[:-1] == counts.shape else costs


def _last(table: Tensor, columns: int) -> Tensor:
    return table[..., table.shape[-1] - columns :] if table.dim() else table


def _check_own(mask: Tensor, given: dict[str, Any]) -> None:
    """Own actions can always be taken.  Where the mask is of one expert alone, or of any actions, there is nothing to check."""
    if "costs" in given or "predictor_loss" in given:
        check_mask(mask, 1, given["scores"].shape[-1])
    elif "gate" in given:
        check_mask(mask, 1, given["gate"].shape[-1])
    elif "expert_costs" in given:
        check_mask(mask, given["scores"].shape[-1] - given["expert_costs"].shape[-1], given["scores"].shape[-1])
    elif "expert_correct" in given and mask.dim() == given["scores"].dim():
        check_mask(mask, given["scores"].shape[-1] - given["expert_correct"].shape[-1], given["scores"].shape[-1])


def _mean(losses: Tensor, given: dict[str, Any]) -> Tensor:
    targets, ignore_index = given.get("targets"), given.get("ignore_index")
    if ignore_index is None or not isinstance(targets, Tensor) or targets.is_floating_point():
        return losses.mean()
    # A loss of your own may return the rows of all leading dimensions as one vector.
    if losses.numel() != targets.numel():
        raise ValueError(
            f"loss: expected one value per row, shape {tuple(targets.shape)}, so that ignored rows are left out of the mean, got "
            f"{tuple(losses.shape)}; a loss of torch needs reduction='none'"
        )
    return losses.sum() / (targets != ignore_index).sum()
