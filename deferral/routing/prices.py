"""What asking an expert will cost, before it is asked."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deferral.routing.outcomes import Table

__all__ = ["PriceModel", "error_range", "fit_prices", "list_prices"]

# A rule of thumb of English text in today's tokenizers.
CHARACTERS_PER_TOKEN = 4.0


@dataclass(frozen=True)
class PriceModel:
    """base + per_character * characters of the query, in dollars.  (E,), (E,)"""

    base: np.ndarray
    per_character: np.ndarray

    def __call__(self, characters: np.ndarray) -> np.ndarray:
        """The price of each query for each expert.  (N,) -> (N, E)"""
        return self.base + characters[:, None] * self.per_character


def list_prices(
    per_million_input: Sequence[float] | np.ndarray,
    per_million_output: Sequence[float] | np.ndarray,
    output_tokens: float | Sequence[float] | np.ndarray,
) -> PriceModel:
    """Prices from a price list: dollars per million tokens, and how many tokens each expert will write.  (E,), (E,), (E,)

    A query has a quarter as many tokens as characters.
    """
    into, out = np.asarray(per_million_input, float), np.asarray(per_million_output, float)
    tokens = np.broadcast_to(np.asarray(output_tokens, float), into.shape)
    for name, values in (("per_million_input", into), ("per_million_output", out), ("output_tokens", tokens)):
        if values.shape != into.shape or values.ndim != 1 or not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"{name}: expected one finite number per expert, not negative, got {values.tolist()}")
    return PriceModel(out * tokens / 1e6, into / CHARACTERS_PER_TOKEN / 1e6)


def fit_prices(table: Table) -> PriceModel:
    """The least-squares line of each expert's logged price over the length of the query, never falling nor negative."""
    characters = np.array([len(query) for query in table.queries], float)
    known = table.mask.astype(float)
    count = np.maximum(known.sum(0), 1)
    mean_length, mean_price = characters @ known / count, (table.price * known).sum(0) / count
    off = (characters[:, None] - mean_length) * known
    spread = (off**2).sum(0)
    slope = np.maximum((off * (table.price - mean_price)).sum(0), 0) / np.where(spread > 0, spread, 1)
    # A line that is negative for short queries goes through the origin instead.
    slope = np.where(mean_price < slope * mean_length, mean_price / np.maximum(mean_length, 1), slope)
    return PriceModel(np.maximum(mean_price - slope * mean_length, 0), slope)


def error_range(price: np.ndarray) -> tuple[float, float]:
    """The prices of an error between which decisions change, in dollars.  (N, E) -> low, high

    At the low end half an error's difference in quality is worth the smallest difference in price, at the high end a fiftieth
    is worth the largest.
    """
    means = np.sort(price.mean(0))
    gaps = np.diff(means)
    gaps = gaps[gaps > 1e-9 * max(means[-1], 1e-300)]
    if len(gaps) == 0:
        return 1.0, 100.0
    return float(gaps.min() / 0.5), float((means[-1] - means[0]) / 0.02)
