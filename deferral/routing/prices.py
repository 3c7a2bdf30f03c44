"""What asking an expert will cost, before it is asked."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deferral.errors import DataError
from deferral.routing.outcomes import Log
from deferral.routing.table import Table

__all__ = [
    "LEAST_SHARE",
    "PriceModel",
    "characters_of",
    "dearness",
    "error_range",
    "fit_prices",
    "list_prices",
    "paid_on_average",
    "price_gaps",
    "read_prices",
    "repriced",
    "shortest",
    "token_prices",
]

# A rule of thumb for English text.
_CHARACTERS_PER_TOKEN = 4.0
# However cheap similar queries were, a query is expected to cost at least this share of what its length says.
LEAST_SHARE = 0.1
# Differences below this share of a mean price are rounding.
_SAME = 1e-5
# The share of a log's queries that are too short to tell what their length costs.
_TOO_SHORT = 0.01


@dataclass(frozen=True)
class PriceModel:
    """base + per_character * characters of the query, in dollars.  (E,), (E,); ValueError where one is no price.

    `experts` are the names of whose prices these are, where that is known.
    """

    base: np.ndarray
    per_character: np.ndarray
    experts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("base", "per_character"):
            values = _dollars(f"prices, {name}", getattr(self, name))
            _check_prices(f"prices, {name}", values, np.shape(self.base))
            object.__setattr__(self, name, values)
        if self.experts and len(self.experts) != len(self.base):
            raise ValueError(f"prices: expected one per expert, {len(self.experts)}, got {len(self.base)}")

    def of(self, experts: Sequence[str]) -> "PriceModel":
        """The prices of these experts, in their order; where no names are known, it is taken to be theirs."""
        if not self.experts:
            if len(self.base) != len(experts):
                raise ValueError(f"prices: expected one per expert, {len(experts)}, got {len(self.base)}")
            return self
        if not set(experts) <= set(self.experts):
            raise ValueError(f"prices: expected those of {', '.join(experts)}; got those of {', '.join(self.experts)}")
        order = [self.experts.index(name) for name in experts]
        return PriceModel(self.base[order], self.per_character[order])

    def __call__(self, characters: np.ndarray) -> np.ndarray:
        """The price of each query for each expert.  (N,) -> (N, E)"""
        return self.base + characters[:, None] * self.per_character


def _dollars(name: str, values: Any) -> np.ndarray:
    with suppress(TypeError, ValueError):
        array = np.asarray(values)
        # NumPy would make a number of the text "0.5".
        if array.dtype.kind not in "US":
            return array.astype(float)
    raise TypeError(f"{name}: expected one number per expert, got {values!r}")


def _check_prices(name: str, values: np.ndarray, shape: tuple[int, ...]) -> None:
    if values.ndim != 1 or values.shape != shape or not ((values >= 0) & (values < np.inf)).all():
        raise ValueError(f"{name}: expected one finite number per expert, not negative, got {values.tolist()}")


def characters_of(queries: Sequence[str]) -> np.ndarray:
    """The length of each query.  N -> (N,)"""
    return np.array([len(query) for query in queries], float)


def list_prices(
    per_million_input: Sequence[float] | np.ndarray,
    per_million_output: Sequence[float] | np.ndarray,
    output_tokens: float | Sequence[float] | np.ndarray,
) -> PriceModel:
    """Prices from a price list: dollars per million tokens, and how many tokens each expert will write.  (E,), (E,), (E,)

    A query has a quarter as many tokens as characters.
    """
    into, out = _dollars("per_million_input", per_million_input), _dollars("per_million_output", per_million_output)
    tokens = _dollars("output_tokens", output_tokens)
    tokens = np.full(into.shape, tokens) if tokens.shape in ((), (1,)) else tokens
    for name, values in (("per_million_input", into), ("per_million_output", out), ("output_tokens", tokens)):
        _check_prices(name, values, into.shape)
    return PriceModel(out * tokens / 1e6, into / _CHARACTERS_PER_TOKEN / 1e6)


def fit_prices(table: Table, weights: np.ndarray) -> PriceModel:
    """The least-squares line of each expert's logged price over the length of the query, never falling nor negative.

    `weights` (N, E) are those of the known cells, 0 elsewhere: an expert that is mostly asked what is dear to answer is not as
    dear as its log.
    """
    return PriceModel(*_lines(characters_of(table.queries), table.price, weights))


def dearness(table: Table, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """How much dearer each answer was than the length of its query says, in mean prices of its expert; and which are known.

    -> (N, E) float32, (N, E) bool, or None where length says it all.  `weights` (N, E) as for `fit_prices`.
    """
    characters, line = characters_of(table.queries), fit_prices(table, weights)
    mean = _weighted_mean(np.where(table.mask, table.price, 0), weights)

    def beyond(length: np.ndarray) -> np.ndarray:
        return np.where(table.mask, table.price - line(length), 0) / np.where(mean > 0, mean, 1)

    if np.abs(beyond(characters)).max(initial=0) < _SAME:
        return None
    return beyond(np.maximum(characters, shortest(characters))).astype(np.float32), table.mask


def paid_on_average(paid: np.ndarray, expected: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Doubly robust prices: expected + weight * (paid - expected), what is expected where nothing was paid.  (N, E) thrice

    An expert's weights are scaled to add up to the number of rows.  Single rows may come out negative; means are right if either
    the weights or the expectations are.  Dudík, Langford, Li, "Doubly Robust Policy Evaluation and Learning" (2011), eq. 2.
    """
    if (weights == 1).all():
        return paid
    factor = weights * (len(weights) / np.maximum(weights.sum(0), 1e-12))
    return expected + np.where(weights > 0, factor * (paid - expected), 0)


def repriced(paid: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """What answers would cost at other prices, where by their length they cost `before`, and would cost `after`.  (N, E) thrice

    What was paid above that grows in proportion to the expert's mean.  Means are right; a row that was paid much less than its
    length said may come out below 0.
    """
    means = before.mean(0)
    return after + (paid - before) * (after.mean(0) / np.where(means > 0, means, np.inf))


def shortest(characters: np.ndarray) -> float:
    """The length that all but a hundredth of a log's queries have; below it their line is extrapolated.  (N,) -> number"""
    return float(np.quantile(characters, _TOO_SHORT))


def token_prices(log: Log, per_million: Mapping[str, tuple[float, float]]) -> PriceModel:
    """Prices to come from the dollars per million tokens (input, output) of each expert of the log, by name.

    How many tokens an expert reads and writes is predicted from the length of the query, by a line through its logged tokens.
    Where none of its outcomes has input tokens, a query has a quarter as many as characters.
    """
    if not isinstance(log, Log):
        raise TypeError(f"log: expected a Log, got {type(log).__name__}; read_log(path) reads a file")
    if not isinstance(per_million, Mapping):
        raise TypeError(f"per_million: expected dollars by the experts' names, got {per_million!r}")
    for name, one in per_million.items():
        dollars = _dollars(f"{name}: dollars per million tokens", one)
        if dollars.shape != (2,) or not ((dollars >= 0) & (dollars < np.inf)).all():
            raise ValueError(f"{name}: expected dollars per million tokens of input and of output, not negative, got {one}")
    if missing := [name for name in log.experts if name not in per_million]:
        raise ValueError(f"{missing[0]}: it has no price; expected one for each of {', '.join(log.experts)}")
    characters = characters_of(log.queries)[log.column("query")]
    own = log.column("expert")[:, None] == np.arange(len(log.experts))
    read, read_known = _token_lines(log, "input_tokens", characters, own)
    written, written_known = _token_lines(log, "output_tokens", characters, own)
    if not written_known.all():
        unknown = log.experts[int(written_known.argmin())]
        raise ValueError(f"{unknown}: none of its outcomes has output tokens, so that its price cannot be predicted")
    read[1] = np.where(read_known, read[1], 1 / _CHARACTERS_PER_TOKEN)
    dollars = np.array([per_million[name] for name in log.experts], float).T / 1e6
    base, per_character = dollars[0] * read + dollars[1] * written
    return PriceModel(base, per_character, tuple(log.experts))


def read_prices(path: str | Path) -> dict[str, tuple[float, float]]:
    """Dollars per million tokens from JSON: {"EXPERT": {"input": 0.5, "output": 1.5}}.  DataError names what is wrong."""
    shape = 'expected an object like {"EXPERT": {"input": 0.5, "output": 1.5}}'
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: {shape}, got no JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: {shape}, got a {type(found).__name__}")
    for name, one in found.items():
        if not isinstance(one, dict) or {"input", "output"} - set(one):
            got = ", ".join(map(str, one)) if isinstance(one, dict) else one
            raise DataError(f"{path}: {name}: {shape}, got {got}")
    try:
        return {name: (float(one["input"]), float(one["output"])) for name, one in found.items()}
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {shape}, got what is no number: {error}") from error


def _token_lines(log: Log, name: str, characters: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """base and slope of each expert's tokens over the length of the query, and whether any are known.  -> (2, E), (E,) bool"""
    values = log.column(name).astype(float)[:, None]
    known = own & ~np.isnan(values)
    return np.stack(_lines(characters, np.where(known, values, 0), known)), known.any(0)


def _lines(characters: np.ndarray, values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """base and slope of each column's weighted least-squares line.  (N,), (N, E), (N, E) -> (E,), (E,)"""
    known = weights.astype(float)
    mean_length, mean = _weighted_mean(characters[:, None], known), _weighted_mean(values, known)
    off = characters[:, None] - mean_length
    spread = (known * off**2).sum(0)
    slope = np.maximum((known * off * (values - mean)).sum(0), 0) / np.where(spread > 0, spread, 1)
    # A line that is negative for short queries goes through the origin instead.
    slope = np.where(mean < slope * mean_length, mean / np.maximum(mean_length, 1), slope)
    return np.maximum(mean - slope * mean_length, 0), slope


def _weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of each column, 0 where nothing is known.  (N, E), (N, E) -> (E,)"""
    mass = weights.sum(0, dtype=float)
    return (values * weights).sum(0) / np.where(mass > 0, mass, 1)


def price_gaps(price: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The experts' mean prices in order, and the gaps between neighbours that count.  (N, E) -> (E,), (G,)

    Between two that cost the same to a hundredth, where others do not, nobody chooses by price, and a trade-off at which their
    difference counted would be absurd.
    """
    means = np.sort(price.mean(0))
    gaps = np.diff(means)
    large = gaps > np.maximum(0.01 * means[1:], 1e-300)
    # Prices that differ by rounding are one price.
    return means, gaps[large if large.any() else gaps > 1e-9 * max(means[-1], 1e-300)]


def error_range(price: np.ndarray) -> tuple[float, float]:
    """The prices of an error between which decisions change, in dollars.  (N, E) -> low, high

    At the low end half an error's difference in quality is worth the smallest difference in price, at the high end a fiftieth
    is worth the largest.
    """
    means, gaps = price_gaps(price)
    if len(gaps) == 0:
        return 1.0, 100.0
    return float(gaps.min() / 0.5), float((means[-1] - means[0]) / 0.02)
