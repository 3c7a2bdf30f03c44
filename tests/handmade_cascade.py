"""A cascade that was written down and not learned, and a router that is unsure of some queries: for the tests, in a moment."""

import copy
from functools import cache

import numpy as np

from deferral.routing import Cascade, Log, Outcome, Router
from deferral.routing.cascade import FEATURES, Paid
from deferral.routing.policies import Linear
from tests.running_gateway import EASY, HARD

__all__ = ["GUESS", "PRICES", "handmade", "unsure_router"]

GUESS = "guess the word that I think of"
PRICES = {"small": 1.0, "large": 100.0}
_MEAN = 2  # the column of the mean log-probability among the features


def handmade(experts: tuple[str, ...] = ("small", "large"), **paid: float) -> Cascade:
    """Log-odds of the first go up by 3 where its mean log-probability is 0, and down by 3 where it is about -2.3.

    As if half of its answers were of either kind.  `paid` are figures of the verdict, at all prices of an error.
    """
    size, place = len(experts), experts.index("small")
    into, out, bias = np.zeros((FEATURES + size, 1)), np.zeros((1, size)), np.zeros(size)
    into[_MEAN], out[0, place], bias[place] = 1.0, -5.0, 3.0
    shifts = np.zeros((64, size))
    shifts[:, place] = np.tile([3.0, -3.0], 32)
    arrays = {
        "centre": np.zeros(FEATURES), "scale": np.ones(FEATURES), "1.weight": into, "1.bias": np.zeros(1), "4.weight": out,
        "4.bias": bias, "held": np.linspace(0, 1, 64), "shifts": shifts,
    }  # fmt: skip
    figures = {
        "gain": 0.1,
        "half_width": 0.01,
        "cascaded": 0.1,
        "alone": 0.2,
        "single": 0.2,
        "always": 0.2,
        "asked": 0.5,
        "deferred": 0.2,
    }
    errors = np.geomspace(1e-3, 1.0, 5)
    verdict = Paid(errors=errors, **{name: np.full(5, value) for name, value in (figures | paid).items()})
    return Cascade(experts, "small", {name: value.astype(np.float32) for name, value in arrays.items()}, verdict)


def unsure_router() -> Router:
    """What is easy both can answer, what is hard only the large one, and of guesses the small one has every other right."""
    router = copy.copy(_router())
    router._plans, router.cascade = {}, handmade()
    return router


@cache
def _router() -> Router:
    rows = []
    for number in range(60):
        for query, small in ((f"{EASY} {number}", 1.0), (f"{HARD} {number} in full", 0.0), (f"{GUESS} {number}", number % 2)):
            rows.append(Outcome(query, "small", float(small), 0.0001, latency_s=0.1))
            rows.append(Outcome(query, "large", 1.0, 0.01, latency_s=0.8))
    router = Router(0.05, policies=(Linear,)).fit(Log(rows))
    router.salt = "the same draws in every run"
    return router
