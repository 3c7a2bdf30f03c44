"""The cascade: one expert answers first, and by how sure it was of its answer that is kept, or another expert is asked.

Two decisions, both at any price of an error e and at any prices (dollars) without refitting.  After the answer, with its
confidence f, keeping it costs 1 - q_first(x, f), since its price is paid either way, and asking expert j costs
1 - q_j(x, f) + price_j / e.  Before it, asking first costs price_first / e + E_f[the least of those], and going to an expert
directly 1 - q_j(x) + price_j / e: the query goes where that is least.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from deferral.routing.confidence import Confidence
from deferral.routing.vectors import Arrays

__all__ = ["FEATURES", "Cascade", "Paid", "features", "logit", "network_input"]

FEATURES = 8
_NEIGHBOURS = 256
_BLOCK = 256
_FAR = 4.0


@dataclass(frozen=True)
class Paid:
    """Held-out cost of the cascade in errors a query, and of what it must beat, at G prices of an error."""

    errors: np.ndarray  # (G,) dollars, rising
    alone: np.ndarray  # (G,) whom the estimates name is asked, and nobody first
    single: np.ndarray  # (G,) always the expert that was best on these rows
    always: np.ndarray  # (G,) every query is asked first
    cascaded: np.ndarray  # (G,) as this cascade does
    gain: np.ndarray  # (G,) over the one of alone and single that is surpassed with less confidence, paired
    half_width: np.ndarray  # (G,) of its interval, 95% for all G together; infinite where too few were asked first to say
    asked: np.ndarray  # (G,) share of the queries that were asked first
    deferred: np.ndarray  # (G,) share of all queries whose first answer was not kept

    @property
    def better(self) -> np.ndarray:
        """Where the cascade is cheaper with confidence.  (G,) bool"""
        return self.gain > self.half_width

    @property
    def pays(self) -> list[tuple[float, float]]:
        """Prices of an error between which it is, from neighbour to neighbour of those that were judged."""
        found: list[tuple[float, float]] = []
        for place in np.flatnonzero(self.better[:-1] & self.better[1:]):
            low, high = float(self.errors[place]), float(self.errors[place + 1])
            if found and found[-1][1] == low:
                low = found.pop()[0]
            found.append((low, high))
        return found


@dataclass(frozen=True)
class Cascade:
    """What was learned, for the experts of one router.  `arrays` holds the network, and held-out answers to expect others by."""

    experts: tuple[str, ...]
    first: str
    arrays: Arrays
    paid: Paid

    @property
    def place(self) -> int:
        """The column of the expert that is asked first."""
        return self.experts.index(self.first)

    def why_not(self, error: float) -> str:
        """Why nobody is asked first at this price of an error; "" if it pays."""
        judged = self.paid
        if not judged.errors[0] <= error <= judged.errors[-1]:
            return f"what asking first gains was judged from ${judged.errors[0]:.3g} to ${judged.errors[-1]:.3g} an error only"
        above = int(np.searchsorted(judged.errors, error))
        around = np.array([max(above - 1, 0), above])
        if judged.better[around].all():
            return ""
        worst = int(around[(judged.gain - judged.half_width)[around].argmin()])
        if np.isinf(judged.half_width[worst]):
            return (
                f"at ${judged.errors[worst]:.3g} an error too few of the held-out queries were asked first to say what that gains"
            )
        return (
            f"on held-out queries asking first saved {judged.gain[worst]:.4f} ± {judged.half_width[worst]:.4f} errors a query at "
            f"${judged.errors[worst]:.3g} an error: maybe nothing"
        )

    def before(
        self, estimate: np.ndarray, price: np.ndarray, error: float, closed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Expected cost of asking first, and the least of going to an expert directly.  (N, E), (N, E) -> (N,), (N,)

        What the answer will say is expected by the 256 held-out answers to the queries of the nearest estimate: their shifts are
        added to the estimates of this one.  `closed` (E,): experts that may not be asked.
        """
        place, held, shifts = self.place, self.arrays["held"], self.arrays["shifts"]
        shut = np.zeros(len(self.experts)) if closed is None else np.where(closed, np.inf, 0.0)
        direct = (1 - estimate + price / error + shut).min(1)
        relative = price / error + shut
        relative[:, place] = 0.0
        size = min(_NEIGHBOURS, len(held))
        begin = np.clip(np.searchsorted(held, estimate[:, place]) - size // 2, 0, len(held) - size)
        least = np.empty(len(estimate))
        for start in range(0, len(estimate), _BLOCK):
            some = slice(start, start + _BLOCK)
            near = shifts[begin[some, None] + np.arange(size)]
            quality = _sigmoid(logit(estimate[some])[:, None, :] + near)
            least[some] = (1 - quality + relative[some, None, :]).min(-1).mean(-1)
        return price[:, place] / error + least, direct

    def after(
        self,
        confidence: np.ndarray,
        estimate: np.ndarray,
        price: np.ndarray,
        error: float,
        closed: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Whose answer to give, expected quality and cost to come of everyone.  (N, F), (N, E), (N, E) -> (N,), (N, E), (N, E)

        Ties keep the answer that is there.
        """
        quality = _sigmoid(logit(estimate) + self.shifts(confidence, estimate))
        place = self.place
        cost = 1 - quality + price / error
        if closed is not None:
            cost[:, closed] = np.inf
        cost[:, place] = 1 - quality[:, place]
        actions = np.where(cost[:, place] <= cost.min(1), place, cost.argmin(1))
        return actions, quality, cost

    def shifts(self, confidence: np.ndarray, estimate: np.ndarray) -> np.ndarray:
        """By how much the answer moves the estimates, in log-odds.  (N, F), (N, E) -> (N, E)"""
        arrays = self.arrays
        x = network_input(confidence, estimate, arrays["centre"], arrays["scale"])
        hidden = np.maximum(x @ arrays["1.weight"] + arrays["1.bias"], 0)
        return hidden @ arrays["4.weight"] + arrays["4.bias"]

    @property
    def numbers(self) -> Arrays:
        """All that it has learned and was judged by, to be saved."""
        return {**self.arrays, **{f"paid.{name}": value for name, value in vars(self.paid).items()}}

    @property
    def names(self) -> dict[str, Any]:
        """The rest, as JSON takes it."""
        return {"experts": list(self.experts), "first": self.first}

    @classmethod
    def restored(cls, names: Mapping[str, Any], numbers: Arrays) -> "Cascade":
        """What `names` and `numbers` were taken from."""
        paid = Paid(**{field.name: numbers[f"paid.{field.name}"] for field in fields(Paid)})
        arrays = {name: array for name, array in numbers.items() if not name.startswith("paid.")}
        found = cls(tuple(names["experts"]), str(names["first"]), arrays, paid)
        if found.first not in found.experts:
            raise KeyError("the cascade is of other experts")
        return found

    def report(self, error: float) -> str:
        """Where it pays, and what it is worth at the judged price of an error that is nearest to this one."""
        judged = self.paid
        place = int(np.abs(np.log(judged.errors / error)).argmin())
        gain, half = judged.gain[place], judged.half_width[place]
        ranges = " and ".join(f"${low:.3g} to ${high:.3g}" for low, high in judged.pays)
        where = f"It pays at {ranges} an error" if ranges else "It pays at no price of an error"
        lines = [
            f"{where} ({judged.better.sum()} of the {len(judged.errors)} that were judged, from ${judged.errors[0]:.3g} to "
            f"${judged.errors[-1]:.3g}).",
            f"At ${judged.errors[place]:.3g} an error, in errors a query: {self.first} asked first where that is expected to pay "
            f"{judged.cascaded[place]:.4f}, always {judged.always[place]:.4f}, never {judged.alone[place]:.4f}; best single "
            f"expert {judged.single[place]:.4f}; saved {gain:.4f} ± {half:.4f} (95% for all these prices together).  "
            f"{judged.asked[place]:.0%} were asked first, {judged.deferred[place]:.0%} then deferred.",
        ]
        why = self.why_not(error)
        return "\n".join([*lines, *([f"At ${error:.3g} an error nobody is asked first: {why}."] if why else [])])


def features(confidences: Sequence[Confidence]) -> np.ndarray:
    """Length, log-probabilities (mean, sum, least, tenth, quarter, median) and entropy, on a scale of logarithms.  N -> (N, 8)

    NaN where a number is not known.
    """
    given = np.array(confidences, float).reshape(len(confidences), len(Confidence._fields))
    tokens, entropy, logprobs = given[:, 0], given[:, -1], given[:, 1:-1]
    total = tokens * given[:, 1]
    surprise = np.log1p(np.maximum(-np.column_stack([total, logprobs]), 0))
    return np.column_stack([np.log1p(tokens), surprise, entropy])


def network_input(confidence: np.ndarray, estimate: np.ndarray, centre: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Standardised features, 0 where one is not known, and log-odds of the estimates.  (N, F), (N, E) -> (N, F + E) float32"""
    with np.errstate(invalid="ignore"):
        standard = np.clip((confidence - centre) / scale, -_FAR, _FAR)
    return np.concatenate([np.where(np.isnan(standard), 0.0, standard), logit(estimate)], axis=1).astype(np.float32)


def logit(quality: np.ndarray) -> np.ndarray:
    """Log-odds, of qualities from 0.01 to 0.99: an estimate of 1 is no certainty."""
    cut = np.clip(quality, 0.01, 0.99)
    return np.log(cut / (1 - cut))


def _sigmoid(log_odds: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-log_odds))
