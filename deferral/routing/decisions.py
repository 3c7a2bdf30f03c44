"""What a router answers: whom to ask, what is expected of everyone, and why."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import numpy as np

__all__ = ["AT_RANDOM", "Decision", "Decisions", "why_learned"]

# Part of the reason of a decision in which an expert was drawn to explore, in place of the one who would have been chosen.
AT_RANDOM = "drawn at random"


@dataclass(frozen=True)
class Decision:
    """Whom to ask.  quality, price and cost (in errors) are what is expected of each expert."""

    expert: str
    quality: dict[str, float]
    price: dict[str, float]
    cost: dict[str, float]
    propensity: float
    fallback: bool
    similarity: float
    why: str
    kind: str = ""  # of the kinds of queries in the log, the nearest; "" where it was not looked for


@dataclass(frozen=True)
class Decisions:
    """Decisions for N queries; `decisions[i]` is one of them."""

    experts: list[str]
    actions: np.ndarray  # (N,) indices into the experts
    quality: np.ndarray  # (N, E)
    price: np.ndarray  # (N, E) dollars
    cost: np.ndarray  # (N, E) errors, inf where the expert may not be asked
    propensity: np.ndarray  # (N,) probability of the expert that was drawn
    fallback: np.ndarray  # (N,) bool, the static mix decided
    similarity: np.ndarray  # (N,) to the log
    price_of_error: float
    why_fallback: str  # of all rows, or "" where the learned policy is used
    kinds: list[str] | None = None  # of each query
    drawn: np.ndarray | None = None  # (N,) who was drawn at random in the place of another, to learn; -1 where nobody was

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def names(self) -> list[str]:
        """The expert of each query."""
        return [self.experts[action] for action in self.actions]

    def __getitem__(self, row: int) -> Decision:
        kind, drawn = self.kinds[row] if self.kinds else "", -1 if self.drawn is None else int(self.drawn[row])
        return self._decision(kind, drawn, *(array[row].tolist() for array in self._arrays))

    def __iter__(self) -> Iterator[Decision]:
        # Converting an array to a list once is faster than reading its numbers one by one.
        kinds, drawn = self.kinds or [""] * len(self), [-1] * len(self) if self.drawn is None else self.drawn.tolist()
        return map(self._decision, kinds, drawn, *(array.tolist() for array in self._arrays))

    @property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.actions, self.quality, self.price, self.cost, self.propensity, self.fallback, self.similarity

    def _decision(
        self,
        kind: str,
        drawn: int,
        action: int,
        quality: list[float],
        price: list[float],
        cost: list[float],
        propensity: float,
        fallback: bool,
        similarity: float,
    ) -> Decision:
        names = self.experts
        name, quality = names[action], [min(max(value, 0.0), 1.0) for value in quality]
        if fallback:
            how = f"{name}, {AT_RANDOM} to learn, else" if drawn == action else name
            why = f"{how} by the static mix: "
            why += self.why_fallback or f"the query is unlike the log (similarity {similarity:.2f})"
        else:
            usual = names[min(set(range(len(cost))) - {action}, key=cost.__getitem__)] if drawn == action else ""
            why = why_learned(name, action, quality, price, cost, self.price_of_error, usual)
        return Decision(
            name,
            dict(zip(names, quality, strict=True)),
            dict(zip(names, price, strict=True)),
            dict(zip(names, cost, strict=True)),
            propensity,
            fallback,
            similarity,
            why,
            kind,
        )


def why_learned(
    name: str, action: int, quality: list[float], price: list[float], cost: list[float], price_of_error: float, usual: str = ""
) -> str:
    """Why the learned policy asks this expert, or, where it was drawn at random in the place of the usual one, that it was."""
    others = min(cost[:action] + cost[action + 1 :], default=inf)
    best = f"; {usual} would cost {others:.3f}" if usual else f", the next {others:.3f}" if others < inf else ""
    how = f"{name}, {AT_RANDOM} to learn" if usual else name
    return (
        f"{how}: expected quality {quality[action]:.2f} for ${price[action]:.3g}, cost {cost[action]:.3f} errors{best}, "
        f"at ${price_of_error:.3g} an error"
    )
