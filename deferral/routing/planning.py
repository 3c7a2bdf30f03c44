"""A setting of the trade-off, as it was asked for, made into a plan: the price of an error, and the mix to fall back to."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import TypedDict

import numpy as np

from deferral.routing.constraints import Needs
from deferral.routing.fitted import Fitted
from deferral.routing.promises import Witnesses, promised_error
from deferral.routing.static import mix_at_error, mix_at_price, mix_at_quality
from deferral.routing.table import check_amount, check_price_of_error
from deferral.routing.verdicts import why_not

__all__ = ["Plan", "Planning", "Setting", "check_amounts"]

# Means that differ by less are equal.
_ROUNDING = 1e-6


class Setting(TypedDict, total=False):
    """The trade-off of a query, and who may be asked: see `Router.plan`."""

    price_of_error: float | None
    budget: float | None
    min_quality: float | None
    max_latency: float | None
    needs: Needs | None
    learned: bool | None
    certified_quality: float | None
    confidence: float


@dataclass(frozen=True)
class Plan:
    """How queries of one setting are decided: the price of an error, who may be asked, and the mix to fall back to."""

    price_of_error: float
    mask: np.ndarray  # (E,) bool
    mix: np.ndarray  # (E,) probabilities of the static mix
    why_fallback: str  # "" where the learned policy decides

    @cached_property
    def closed(self) -> np.ndarray | None:
        """The experts that may not be asked, None if all may.  -> (E,) bool"""
        return None if self.mask.all() else ~self.mask

    @cached_property
    def closed_places(self) -> list[int]:
        """Where they stand."""
        return np.flatnonzero(~self.mask).tolist()


@dataclass(frozen=True)
class Planning:
    """Plans for the experts in `mask` (E,) bool; `learned` overrules the held-out verdict on who decides."""

    fitted: Fitted
    mask: np.ndarray
    explore: float
    learned: bool | None

    def at_error(self, error: float) -> Plan:
        """At a price of an error, in dollars."""
        check_price_of_error(error)
        mix = mix_at_error(self.fitted.means, self.fitted.mean_price, self.mask, error)
        return Plan(float(error), self.mask, mix, self._why_fallback(error))

    def within_budget(self, budget: float) -> Plan:
        """The plan of the highest price of an error at which held-out queries cost no more, in dollars per 1,000 of them."""
        if not 0 < budget < inf:
            raise ValueError(f"budget: expected dollars per 1,000 queries, above 0, got {budget}")
        state, mask, prices, wanted = self.fitted, self.mask, self.fitted.mean_price, budget / 1000
        least = (1 - self.explore) * prices[mask].min() + self.explore * prices[mask].mean()
        if self.explore > 0 and wanted < least:
            raise ValueError(
                f"budget: with {100 * self.explore:g}% of the queries asked at random, to learn, at least "
                f"${1000 * least:.4g} per 1,000 queries are spent; got ${budget:.4g}"
            )
        mix = mix_at_price(state.means, prices, mask, self._but_explored(wanted, prices))
        error, quality = state.search.error_at_price(mask, wanted, self.explore)
        _, of_mix = state.search.of_mix(mix, mask, self.explore)
        why = self._why_fallback(error)
        if not why and self.learned is None and quality < of_mix - _ROUNDING:
            why = f"routing reached for this budget a quality of {quality:.3f} on held-out queries, the static mix {of_mix:.3f}"
        return Plan(float(error), mask, mix, why)

    def at_quality(self, least: float) -> Plan:
        """The plan of the lowest price of an error at which held-out queries have this quality."""
        if not 0 <= least <= 1:
            raise ValueError(f"min_quality: expected a quality in [0, 1], got {least}")
        state, mask, means = self.fitted, self.mask, self.fitted.means
        error, price, best = state.search.error_at_quality(mask, least, self.explore)
        mix = mix_at_quality(means, state.mean_price, mask, self._but_explored(least, means))
        if best < least and self.learned is None:
            why = f"on held-out queries routing reached a quality of {best:.3f}, the best single expert more"
            return Plan(error, mask, mix, why)
        of_mix, _ = state.search.of_mix(mix, mask, self.explore)
        reached = (1 - self.explore) * float(mix @ means) + self.explore * float(means[mask].mean())
        meets, why = reached >= least - _ROUNDING, self._why_fallback(error)
        if why and not meets:
            raise ValueError(f"min_quality: the static mix, which decides ({why}), reaches at most {reached:.3f}, got {least}")
        if not why and best < least:
            raise ValueError(
                f"min_quality: on held-out queries routing reached at most {best:.3f}, got {least}; without learned=True the "
                "best single expert is asked"
            )
        if not why and self.learned is None and meets and price > of_mix * (1 + _ROUNDING):
            why = f"routing reached this quality for ${price:.3g} a query on held-out queries, the static mix for ${of_mix:.3g}"
        return Plan(float(error), mask, mix, why)

    def promised(self, share: float, confidence: float, rows: Witnesses | None, qualities: Callable[[Plan], np.ndarray]) -> Plan:
        """The plan of the lowest price of an error at which this share of the best expert's quality is certified by the rows.

        `qualities` (N,) are those that the rows get under a plan.
        """
        for name, value in (("certified_quality", share), ("confidence", confidence)):
            if not 0 < value < 1:
                raise ValueError(f"{name}: expected a share in (0, 1), got {value}")
        if rows is None:
            raise ValueError(
                "certified_quality: there are no rows that certify it; call certify with outcomes of every expert on queries "
                "that the router was not fitted on"
            )
        errors = self.fitted.search.errors_from_best(self.mask)
        return self.at_error(
            promised_error(
                lambda error: qualities(self.at_error(error)),
                rows.quality[:, self.mask],
                errors,
                share=share,
                confidence=confidence,
            )
        )

    def _but_explored(self, wanted: float, values: np.ndarray) -> float:
        """The mean of the other decisions with which, and with those that are drawn at random, the mean is the wanted one."""
        return (wanted - self.explore * float(values[self.mask].mean())) / (1 - self.explore)

    def _why_fallback(self, error: float) -> str:
        return why_not(self.fitted, error, self.mask) if self.learned is None else "" if self.learned else "asked for"


def check_amounts(confidence: float, **trade_off: float | None) -> None:
    """TypeError for what is no number; ValueError where more than one way of setting the trade-off is given."""
    for name, value in {**trade_off, "confidence": confidence}.items():
        if value is not None:
            check_amount(name, value)
    if sum(value is not None for value in trade_off.values()) > 1:
        raise ValueError(
            "expected one of price_of_error, budget, min_quality and certified_quality; each of them sets the same trade-off"
        )
