"""Laws whose risk is known at every threshold, and how often a promise is broken on them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from deferral.certified import Certificate

DELTA = 0.1
TRIALS = 1000
ALLOWED = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / TRIALS)
# 0.4, 0.3, 0.6 and 0.7, where the laws below cross their levels, lie between two of these.
GRID = torch.arange(0.125, 1.0, 0.01, dtype=torch.float64)


# The law: the margin is uniform on (0, 1), the own answer is wrong with probability margin / 2, the expert with 5%, but with 60%
# where the margin is above 0.8: the rows that look most like theirs are not, and the risk of the system is not monotone.


def draw(rows: int, generator: torch.Generator, slope: Tensor | float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    margin, own, expert = torch.rand(3, rows, generator=generator, dtype=torch.float64)
    return margin, own < slope * margin, expert < torch.where(margin < 0.8, 0.05, 0.6)


def selective_risk(threshold: float, slope: float = 0.5) -> float:
    return slope * threshold / 2


def system_risk(threshold: float, price: float = 0.0) -> float:
    t = min(max(threshold, 0.0), 1.0)
    asked = 0.05 * (0.8 - t) + 0.12 if t < 0.8 else 0.6 * (1 - t)
    return t**2 / 4 + asked + price * (1 - t)


def plug_in(certificate: Certificate, *levels: float, lowest: bool = False) -> float:
    """The threshold that one would take without a certificate: the boldest whose plain means are within the levels."""
    within = (certificate.estimates <= torch.tensor(levels)).all(-1)
    passed = certificate.thresholds[within]
    if len(passed) == 0:
        return torch.nan
    return float(passed.min() if lowest else passed.max())


def violations(trial: Callable[[torch.Generator], tuple[bool, bool, bool]]) -> tuple[float, float, float]:
    """The shares of trials in which the certified threshold broke its promise, the plain one did, and a promise was made."""
    generator = torch.Generator().manual_seed(0)
    certified, plain, promised = torch.tensor([trial(generator) for _ in range(TRIALS)]).double().mean(0).tolist()
    return certified, plain, promised
