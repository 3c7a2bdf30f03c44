"""Which properties a loss violates: `check_loss`."""

from collections.abc import Sequence
from dataclasses import dataclass

from deferral.testing.minimisers import bayes
from deferral.testing.settings import Loss, Property, Setting
from deferral.testing.values_and_gradients import (
    autocast,
    bounded_below,
    classes_are_alike,
    every_expert_counts,
    finite,
    gradient,
    half_precision,
    leaves_its_input,
    one_value_per_example,
    pulls_when_wrong,
    vmap,
)

__all__ = ["PROPERTIES", "Report", "check_loss"]

PROPERTIES: tuple[Property, ...] = (
    one_value_per_example,
    leaves_its_input,
    gradient,
    finite,
    half_precision,
    pulls_when_wrong,
    bounded_below,
    every_expert_counts,
    classes_are_alike,
    vmap,
    autocast,
    bayes,
)


@dataclass(frozen=True)
class Report:
    """The violated properties of a loss, each with what was seen."""

    violations: dict[str, str]

    @property
    def ok(self) -> bool:
        """True if nothing is violated."""
        return not self.violations

    def __str__(self) -> str:
        return "\n".join(f"{name}: {seen}" for name, seen in self.violations.items()) or "no property is violated"


def check_loss(loss: Loss, setting: Setting, *, properties: Sequence[Property] | None = None) -> Report:
    """Run the properties on a loss and report which it violates.

    `loss(scores, rows)` takes packed scores (..., width) and rows (`draw_rows`), and returns one value per row (...,).  In
    SINGLE_STAGE, for one, `lambda s, rows: my_loss(s, rows["targets"], rows["expert_costs"])`.  `properties` defaults to
    PROPERTIES, all of them; a loss that makes no claim of consistency leaves `bayes` out, one that detaches a part of itself on
    purpose `gradient`.

    The suite hands over no mask, no ignored rows and no targets that are probabilities: what a loss makes of them is for its own
    tests.  `bayes` looks for minimisers of scores of about unit size: divide those of a temperature far from 1 by it.  It judges
    60 random problems of 3 classes and 2 experts, and a decision is wrong where it is dearer than the best by more than 0.02: a
    loss that errs by less, or with more experts only, passes.
    """
    if not isinstance(setting, Setting):
        raise TypeError(f"setting: expected one of deferral.testing, say SINGLE_STAGE or TWO_STAGE, got {setting!r}")
    if properties is not None and not properties:
        raise ValueError("properties: expected at least one, got none; leave them out for all")
    violations = {}
    for check in PROPERTIES if properties is None else properties:
        try:
            seen = check(loss, setting)
        except Exception as error:  # a loss that raises violates the property, whatever it raises
            seen = f"raised {type(error).__name__}: {error}"
        if seen is not None:
            violations[check.__name__] = seen
    return Report(violations)
