"""How sure a model was of its own answer: a few numbers out of the log-probabilities of the answer's tokens, and no text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deferral.errors import DataError

__all__ = ["Confidence", "check_confidence", "confidence_of", "confidence_of_reply"]

# Some servers say -9999, or minus infinity, for what has no probability.
_LEAST = -30.0


class Confidence(NamedTuple):
    """Of the log-probabilities of an answer's tokens, in nats: how many, mean, least, and quantiles from the least on.

    `entropy` is the mean over the tokens of the entropy of what might have stood there, as far as alternatives are told; NaN
    where none are.
    """

    tokens: float
    mean: float
    least: float
    tenth: float
    quarter: float
    median: float
    entropy: float = math.nan


def confidence_of(logprobs: Sequence[float], alternatives: Sequence[Sequence[float]] = ()) -> Confidence | None:
    """Log-probabilities of the tokens, and for each those of the likeliest tokens in its place; None where there is no number.

    What an entropy does not see, the probability that no alternative has, counts as one more alternative.
    """
    found = np.array([value for value in map(_number, logprobs) if value is not None])
    if len(found) == 0:
        return None
    entropies = [_entropy(kept) for one in alternatives if (kept := [value for value in map(_number, one) if value is not None])]
    quantiles = np.quantile(found, [0.0, 0.1, 0.25, 0.5])
    entropy = float(np.mean(entropies)) if entropies else math.nan
    least, tenth, quarter, median = map(float, quantiles)
    return Confidence(float(len(found)), float(found.mean()), least, tenth, quarter, median, entropy)


def confidence_of_reply(reply: Any) -> Confidence | None:
    """Of a chat completion, as a dictionary, that was asked for with `logprobs` (and `top_logprobs`); None without them."""
    try:
        content = reply["choices"][0]["logprobs"]["content"]
        logprobs = [token["logprob"] for token in content]
        alternatives = [[other["logprob"] for other in token.get("top_logprobs") or ()] for token in content]
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    return confidence_of(logprobs, alternatives)


def check_confidence(row: int | str, value: object) -> Confidence | None:
    """A confidence as it stands in a log, by the names of its numbers; DataError with the row where it is none."""
    if value is None:
        return None
    given = value._asdict() if isinstance(value, Confidence) else value
    names = Confidence._fields
    if not isinstance(given, Mapping) or not set(names[:-1]) <= set(given) <= set(names):
        raise DataError(f"row {row}, confidence: expected the numbers {', '.join(names)} by name, got {value!r}")
    numbers = {}
    for name, number in given.items():
        unknown = name == "entropy" and (number is None or number != number)
        numeric = isinstance(number, int | float | np.integer | np.floating) and not isinstance(number, bool)
        low, high = (0.0, math.inf) if name in ("tokens", "entropy") else (-math.inf, 0.0)
        if not unknown and not (numeric and abs(number) < 1e300 and low <= number <= high):
            raise DataError(
                f"row {row}, confidence: {name}: expected a finite number {'>=' if low == 0 else '<='} 0, got {number!r}"
            )
        numbers[name] = math.nan if unknown else float(number)
    if numbers["tokens"] < 1:
        raise DataError(f"row {row}, confidence: tokens: expected 1 or more, got {numbers['tokens']:g}; leave it out if unknown")
    return Confidence(**numbers)


def _number(value: Any) -> float | None:
    """A log-probability within bounds; None for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating) or value != value:
        return None
    # A rounded sum of probabilities may exceed 1 by a little.
    return float(min(max(value, _LEAST), 0.0))


def _entropy(logprobs: Sequence[float]) -> float:
    chance = np.exp(logprobs)
    rest = max(1.0 - float(chance.sum()), 0.0)
    return float(-(chance * np.array(logprobs)).sum() - (rest * math.log(rest) if rest > 0 else 0.0))
