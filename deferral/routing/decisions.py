"""What a router answers: whom to ask, what is expected of everyone, and why."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import numpy as np

__all__ = ["Decision", "Decisions", "why_learned"]


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

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def names(self) -> list[str]:
        """The expert of each query."""
        return [self.experts[action] for action in self.actions]

    def __getitem__(self, row: int) -> Decision:
        return self._decision(self.kinds[row] if self.kinds else "", *(array[row].tolist() for array in self._arrays))

    def __iter__(self) -> Iterator[Decision]:
        # To be asked for its numbers one by one takes an array longer than to become a list.
        return map(self._decision, self.kinds or [""] * len(self), *(array.tolist() for array in self._arrays))

    @property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.actions, self.quality, self.price, self.cost, self.propensity, self.fallback, self.similarity

    def _decision(
        self,
        kind: str,
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
            why = f"{name} by the static mix: "
            why += self.why_fallback or f"the query is unlike the log (similarity {similarity:.2f})"
        else:
            why = why_learned(name, action, quality, price, cost, self.price_of_error)
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
    name: str, action: int, quality: list[float], price: list[float], cost: list[float], price_of_error: float
) -> str:
    """Why the learned policy asks this expert."""
    others = min(cost[:action] + cost[action + 1 :], default=inf)
    best = f", the next {others:.3f}" if others < inf else ""
    return (
        f"{name}: expected quality {quality[action]:.2f} for ${price[action]:.3g}, cost {cost[action]:.3f} errors{best}, "
        f"at ${price_of_error:.3g} an error"
    )
