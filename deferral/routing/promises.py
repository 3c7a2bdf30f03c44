"""A floor for the quality of routed answers, relative to the best expert's, that holds with a stated confidence.

The promise is about the router as it is served, so it takes rows that no part of the fit has seen: every expert's outcome on
each of them.  Candidates are prices of an error, from the one of the highest held-out quality downwards; each is tested, and the
first that fails ends the sequence (fixed sequence testing: Angelopoulos et al., "Learn then Test" (2021), section 3).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from deferral.routing.fitted import Estimates

__all__ = ["Witnesses", "promised_error"]


@dataclass(frozen=True)
class Witnesses:
    """Rows that certify: what the router expected on them, and what happened."""

    quality: np.ndarray  # (N, E) outcomes
    estimated: Estimates
    characters: np.ndarray  # (N,)

    def columns(self, kept: np.ndarray) -> "Witnesses":
        """The same rows, some of the experts."""
        quality, dearness = self.estimated.quality[:, kept], self.estimated.dearness[:, kept]
        return replace(self, quality=self.quality[:, kept], estimated=self.estimated._replace(quality=quality, dearness=dearness))


def shortfall_p_value(routed: np.ndarray, quality: np.ndarray, share: float, delta: float) -> float:
    """How surprising the rows are if E[routed] < share * E[quality_e] for some expert e.  (N,), (N, E) -> number

    (1 + share * quality_e - routed) / (1 + share) lies in [0, 1], and at the floor its mean is 1 / (1 + share).  The largest
    p-value of the experts needs no correction: whichever is the best, it was tested.
    """
    from deferral.certified import p_value_of_mean

    losses = (1 + share * quality.T - routed) / (1 + share)
    return float(p_value_of_mean(np.clip(losses, 0, 1), 1 / (1 + share), delta=delta).max())


def promised_error(
    qualities_at: Callable[[float], np.ndarray],
    quality: np.ndarray,
    errors: Iterable[float],
    *,
    share: float,
    confidence: float,
) -> float:
    """The last of the falling prices of an error at which the floor is certified.  ValueError if the first is not.

    `qualities_at(price_of_error) -> (N,)` is the expected quality of every row as it would be routed.
    """
    certified = None
    for error in errors:
        p_value = shortfall_p_value(qualities_at(error), quality, share, 1 - confidence)
        if p_value > 1 - confidence:
            break
        certified = error
    if certified is None:
        raise ValueError(
            f"certified_quality: {share:g} of the best expert's quality cannot be promised with confidence {confidence:g} from "
            f"{len(quality)} rows; certify with more of them, or ask for a smaller share or for less confidence"
        )
    return float(certified)
