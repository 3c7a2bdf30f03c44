"""A row of the record: what is kept of one request, and how a database takes it."""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any, Literal

__all__ = [
    "BY_ANSWER",
    "ROUTED",
    "CascadeRow",
    "DecisionRow",
    "Ending",
    "cascade_values",
    "expected_json",
    "id_kept",
    "plain",
    "values",
]

Ending = Literal["kept", "deferred", "failed", "silent", "unanswered"]

# `DecisionRow.requested` where the router was to choose.
ROUTED = "auto"
# Endings of a cascade in which the log-probabilities of the first answer chose, and not the router.
BY_ANSWER: tuple[Ending, ...] = ("kept", "deferred", "failed")

_MOST_TOKENS = 2**53
_LONGEST_ID = 200


@dataclass(frozen=True, slots=True)
class CascadeRow:
    """The first expert's answer in a cascade, and its outcome.

    `ending`: "kept"; "deferred" to another expert; "failed", that other one, so that the first answer was given; "silent", the
    first answer had no log-probabilities, so that the router's own choice holds; "unanswered", there was no first answer.
    """

    first: str
    ending: Ending
    extra: float = 0.0  # dollars, of the first answer where another was given
    quality: float = math.nan  # expected of the first answer, once it was there
    confidence: tuple[float, ...] | None = None  # the numbers of deferral.routing.Confidence


@dataclass(frozen=True, slots=True)
class DecisionRow:
    """One request: who was chosen and why, who answered, and what it cost.  Times in seconds, prices in dollars."""

    id: str
    time: float  # of arrival, since 1970
    key: str  # the key's id, "" without keys
    requested: str  # ROUTED or an expert's name
    expert: str  # who answered, "" if nobody
    chosen: str  # whom the decision named first
    reason: str
    propensity: float  # of `chosen`
    expected_quality: dict[str, float]
    expected_price: dict[str, float]
    expected_cost: dict[str, float]  # inf or left out where the expert may not be asked
    price_of_error: float
    price: float
    estimated: bool  # the price is an estimate
    input_tokens: int
    output_tokens: int
    first_byte_s: float
    latency_s: float
    status: int  # to the client
    outcome: str  # "ok", "error", "cancelled", "refused", "truncated"
    attempts: int
    streamed: bool
    fast_path: bool  # the deadline passed and the fast path decided
    query: str | None  # kept only where storing is switched on
    reply_id: str = ""  # the id inside the upstream's reply
    best_price: float = math.nan  # the same tokens at the price of the expert that is best on the mean
    cascade: CascadeRow | None = None
    kind: str = ""  # of query, as the router knows them; "" where it was not looked for
    draw: float = math.nan  # in [0, 1), what the router explores by: the same for the same query; NaN where it did not decide


def values(row: DecisionRow) -> tuple[Any, ...]:
    """A row in the order of the columns, of the types and lengths that every database takes."""
    return (
        row.id[:64],
        id_kept(row.reply_id),
        row.time,
        row.key,
        plain(row.requested)[:200],
        row.expert,
        row.chosen,
        plain(row.reason),
        _known(row.propensity),
        expected_json(row.expected_quality, row.expected_price, row.expected_cost),
        _known(row.price_of_error),
        _known(row.best_price),
        row.price if 0 <= row.price < math.inf else 0.0,
        bool(row.estimated),
        min(max(int(row.input_tokens), 0), _MOST_TOKENS),
        min(max(int(row.output_tokens), 0), _MOST_TOKENS),
        _known(row.first_byte_s),
        _known(row.latency_s),
        row.status,
        row.outcome,
        row.attempts,
        bool(row.streamed),
        bool(row.fast_path),
        row.kind or None,
        _known(row.draw),
    )


def cascade_values(row: DecisionRow) -> tuple[Any, ...]:
    """The cascade of a row that has one, in the order of the columns."""
    cascade = row.cascade
    assert cascade is not None
    sure = cascade.confidence
    numbers = None if sure is None else f"[{', '.join(map(_number, sure))}]"
    return row.id[:64], cascade.first, cascade.ending, cascade.extra, _known(cascade.quality), numbers


def plain(text: str) -> str:
    """Without lone surrogates, which UTF-8 cannot hold, and zeros, which PostgreSQL does not take."""
    return text if text.isascii() and "\0" not in text else text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def id_kept(reply_id: str) -> str:
    """A reply's own id as it is on record: of a long one, such as proxies make of another's, the beginning and a hash."""
    text = plain(reply_id)
    if len(text) <= _LONGEST_ID:
        return text
    digest = sha256(text.encode()).hexdigest()
    return f"{text[: _LONGEST_ID - len(digest) - 1]}:{digest}"


def expected_json(quality: dict[str, float], price: dict[str, float], cost: dict[str, float]) -> str:
    """{expert: [quality, price, cost]} as JSON, in half the time of json.dumps."""
    entries = [
        f"{_quoted(name)}: [{_number(good)}, {_number(price.get(name, math.nan))}, {_number(cost.get(name, math.nan))}]"
        for name, good in quality.items()
    ]
    return f"{{{', '.join(entries)}}}"


_quoted = lru_cache(1024)(json.dumps)


def _number(value: float) -> str:
    return f"{value:.7g}" if -math.inf < value < math.inf else "null"


def _known(value: float) -> float | None:
    """None for NaN and infinity, which JSON and some databases do not have."""
    return float(value) if math.isfinite(value) else None
