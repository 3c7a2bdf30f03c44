"""Criterion: any loss of this package as an nn.Module with a scalar result, for frameworks that want one."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from deferral.validation import check_costs, check_mask, check_scores, check_targets

__all__ = ["Criterion"]


class Criterion(nn.Module):
    """Mean over the batch of a per-example loss, with its options fixed.

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
                f"{loss.__name__}: no option named {', '.join(sorted(unknown))}; it takes {', '.join(self._signature.parameters)}"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mean loss; arguments as the loss takes them."""
        if self.validate:
            self._check(self._signature.bind(*args, **kwargs, **self.options))
        return self.loss(*args, **kwargs, **self.options).mean()

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{self.loss.__name__}{options}, validate={self.validate}"

    def _check(self, call: inspect.BoundArguments) -> None:
        call.apply_defaults()
        given = call.arguments
        mask, ceiling = given.get("mask"), given.get("ceiling", 1.0)
        for name in ("scores", "rejector"):
            if name in given:
                check_scores(given[name], name=name)
        if "targets" in given:
            check_targets(given["targets"], given["scores"].shape[-1] - self._expert_columns(given))
        if isinstance(given.get("cost"), Tensor):
            check_costs(given["cost"], name="cost")
        if "expert_costs" in given:
            check_costs(given["expert_costs"], ceiling=ceiling, mask=mask, name="expert_costs")
        if "costs" in given:
            costs = given["costs"]
            own = 0 if mask is None else costs.shape[-1] - mask.shape[-1]
            # A ceiling that is a tensor, the row's sum of costs, is above every cost by construction.
            check_costs(costs[..., own:], ceiling=None if isinstance(ceiling, Tensor) else ceiling, mask=mask)
        if mask is not None and "costs" in given:
            check_mask(mask, 1, given["costs"].shape[-1])

    @staticmethod
    def _expert_columns(given: dict[str, Any]) -> int:
        """How many columns of the scores stand behind the class columns: experts, none beside a rejector, or abstaining."""
        if "expert_costs" in given:
            return given["expert_costs"].shape[-1]
        return 0 if "rejector" in given else 1
