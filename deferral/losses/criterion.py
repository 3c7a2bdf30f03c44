"""Criterion: any loss of this package as an nn.Module with a scalar result, for frameworks that want one."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from deferral.losses.published import cost_sensitive_abstention
from deferral.validation import check_costs, check_mask, check_scores, check_targets

__all__ = ["Criterion"]


class Criterion(nn.Module):
    """Mean of a per-example loss over the rows that are not ignored, with its options fixed.

    `Criterion(score_based_abstention, cost=0.05)(scores, targets)`.  With `validate=True` the values are read at every call:
    NaN scores, labels outside 0..K-1, costs outside [0, ceiling] and masked own actions raise ValueError.  On a GPU that
    synchronises; switch it off once the data is known to be right.
    """

    def __init__(self, loss: Callable[..., Tensor], *, validate: bool = True, **options: Any) -> None:
        super().__init__()
        self.loss = loss
        self.validate = validate
        self.options = options
        self._signature = inspect.signature(loss)
        unknown = set(options) - set(self._signature.parameters)
        if unknown:
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

    def _check_labels(self, given: dict[str, Any]) -> None:
        for name in ("scores", "rejector"):
            if name in given:
                check_scores(given[name], name=name)
        targets = given.get("targets")
        if isinstance(targets, Tensor):
            if not targets.is_floating_point():
                targets = targets[targets != given.get("ignore_index")]
            check_targets(targets, given["scores"].shape[-1] - self._extra_columns(given))

    @staticmethod
    def _check_costs(given: dict[str, Any]) -> None:
        mask, ceiling = given.get("mask"), given.get("ceiling", 1.0)
        for name in ("cost", "wrong"):
            if isinstance(given.get(name), Tensor):
                check_costs(given[name].float(), name=name)
        for name, own in (("expert_costs", 0), ("costs", 1)):
            if name not in given:
                continue
            costs = given[name]
            known = None if mask is None else mask[..., mask.shape[-1] - costs.shape[-1] + own :]
            check_costs(costs[..., own:], ceiling=ceiling, mask=known, name=name)
            check_costs(costs[..., :own], ceiling=ceiling, name=name)
        if mask is not None and "scores" in given:
            experts = given["expert_costs"].shape[-1] if "expert_costs" in given else given["scores"].shape[-1] - 1
            check_mask(mask, given["scores"].shape[-1] - experts, given["scores"].shape[-1])

    def _extra_columns(self, given: dict[str, Any]) -> int:
        """How many columns of the scores stand behind the class columns: one per expert, none, or one for abstaining."""
        if "rejector" in given or "gate" in given or getattr(self.loss, "func", self.loss) is cost_sensitive_abstention:
            return 0
        for name in ("expert_costs", "expert_correct"):
            if name in given and given[name].dim() == given["scores"].dim():
                return given[name].shape[-1]
        return 1


def _mean(losses: Tensor, given: dict[str, Any]) -> Tensor:
    targets, ignore_index = given.get("targets"), given.get("ignore_index")
    if ignore_index is None or not isinstance(targets, Tensor) or targets.is_floating_point():
        return losses.mean()
    return losses.sum() / (targets != ignore_index).sum()
