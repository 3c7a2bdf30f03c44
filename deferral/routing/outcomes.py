"""What happened: which expert was asked what, how good the answer was, and what it cost."""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any

import numpy as np

from deferral.errors import DataError
from deferral.routing.confidence import Confidence, check_confidence
from deferral.routing.table import Table, decided_again

__all__ = [
    "DOUBLE",
    "FIELDS",
    "NUMBERS",
    "Log",
    "Outcome",
    "check_text",
    "log_of_table",
    "spelt_alike",
]

# The columns of numbers of a log, and the range of each.
NUMBERS = {
    "quality": (0.0, 1.0),
    "price": (0.0, np.inf),
    "input_tokens": (0.0, np.inf),
    "output_tokens": (0.0, np.inf),
    "latency_s": (0.0, np.inf),
    "propensity": (0.0, 1.0),
    "time": (-np.inf, np.inf),
}
# Columns kept in double precision.  The others are kept in single precision, which ends at _MOST.
DOUBLE = ("price", "time")
_DEAREST = 1e12
_MOST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answer of one expert.  NaN marks a number that is not known; quality and price must be.

    `quality` in [0, 1], 1 a right answer; `price` in dollars; `propensity` the probability with which this expert was asked;
    `time` in seconds since 1970; `tags` one text or several, of which the first is the subject; `confidence` how sure the expert
    was, where its answer came with log-probabilities.
    """

    query: str
    expert: str
    quality: float
    price: float
    input_tokens: float = np.nan
    output_tokens: float = np.nan
    latency_s: float = np.nan
    propensity: float = np.nan
    time: float = np.nan
    tags: str | tuple[str, ...] = ()
    confidence: Confidence | None = None


FIELDS = tuple(field.name for field in fields(Outcome))


class Log:
    """Outcomes in columns: texts are kept once, a row is some 60 bytes beside them.  Grows by `append`, `extend`, `add_row`."""

    def __init__(self, outcomes: Iterable[Outcome] = ()) -> None:
        self.queries: list[str] = []
        self.experts: list[str] = []
        self.tag_sets: list[tuple[str, ...]] = [()]
        self.confidences: dict[int, Confidence] = {}  # by row, where there is one
        self._codes: tuple[dict, dict, dict] = ({}, {}, {(): 0})
        self._query, self._expert, self._tags = _Column(np.int32), _Column(np.int32), _Column(np.int32)
        self._numbers = {name: _Column(np.float64 if name in DOUBLE else np.float32) for name in NUMBERS}
        self.extend(outcomes)

    def __len__(self) -> int:
        return len(self._query)

    def __iter__(self) -> Iterator[Outcome]:
        return (self[row] for row in range(len(self)))

    def append(self, outcome: Outcome) -> None:
        """Add one outcome; DataError names its row and field."""
        self.extend([outcome])

    def extend(self, outcomes: Iterable[Outcome]) -> None:
        """Add outcomes; DataError names the row (the first is 1) and the field.  Nothing after that row is added."""
        for outcome in outcomes:
            row = len(self) + 1
            if not isinstance(outcome, Outcome):
                raise TypeError(
                    f"row {row}: expected an Outcome, got {type(outcome).__name__}; Outcome(**fields) makes one, and "
                    'Log(Outcome(**row) for row in frame.to_dict("records")) a log of a pandas frame'
                )
            self.add_row(row, {name: getattr(outcome, name) for name in FIELDS})

    def add_row(self, number: int, values: Mapping[str, Any]) -> None:
        """Add one outcome, its values by the names of its fields; DataError names the row, by this number, and the field."""
        tags = _tags_in(number, values.get("tags"))
        numbers = {name: _number_in(number, name, values.get(name)) for name in NUMBERS}
        sure = values.get("confidence")
        sure = None if _is_empty(sure) else check_confidence(number, sure)
        query = check_text(number, "query", values.get("query"))
        expert = check_text(number, "expert", values.get("expert"))
        if sure is not None:
            self.confidences[len(self)] = sure
        by_query, by_expert, by_tags = self._codes
        self._query.add(_code(by_query, self.queries, query))
        self._expert.add(_code(by_expert, self.experts, expert))
        self._tags.add(_code(by_tags, self.tag_sets, tags))
        for name, column in self._numbers.items():
            column.add(numbers[name])

    def __getitem__(self, row: int) -> Outcome:
        """The outcome of a row, as it was added."""
        numbers = {name: float(column.values[row]) for name, column in self._numbers.items()}
        query, expert = self.queries[self._query.values[row]], self.experts[self._expert.values[row]]
        place = row if row >= 0 else len(self) + row
        return Outcome(
            query, expert, **numbers, tags=self.tag_sets[self._tags.values[row]], confidence=self.confidences.get(place)
        )

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, or the codes of the column query, expert or tags.  -> (rows,), read-only"""
        column = {"query": self._query, "expert": self._expert, "tags": self._tags, **self._numbers}.get(name)
        if column is None:
            raise ValueError(f"expected one of query, expert, tags, {', '.join(NUMBERS)}; got {name!r}")
        view = column.values
        view.flags.writeable = False
        return view

    def table(self, experts: Sequence[str] | None = None) -> Table:
        """One row per query, one column per expert, in their order of appearance; repeated outcomes are averaged, and counted."""
        if len(self) == 0:
            raise DataError("the log holds no outcome; expected at least one")
        names = list(self.experts if experts is None else experts)
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"experts: expected different names, at least one, got {names}")
        if unknown := [name for name in names if name not in self.experts]:
            raise ValueError(f"experts: {unknown[0]!r} has no outcome in the log; it holds {', '.join(self.experts)}")
        place = np.full(len(self.experts), -1)
        place[[self.experts.index(name) for name in names]] = np.arange(len(names))
        column = place[self.column("expert")]
        kept = np.flatnonzero(column >= 0)
        cell = self.column("query")[kept].astype(np.int64) * len(names) + column[kept]
        shape, size = (len(self.queries), len(names)), len(self.queries) * len(names)
        count = np.bincount(cell, minlength=size)

        def mean(values: np.ndarray) -> np.ndarray:
            """Of the outcomes of a cell of which the value is known, NaN where there is none.  (kept,) -> (N, E)"""
            known = ~np.isnan(values)
            sums = np.bincount(cell[known], weights=values[known], minlength=size)
            with np.errstate(invalid="ignore"):
                return (sums / np.bincount(cell[known], minlength=size)).reshape(shape)

        quality, price, latency, propensity = (
            self.column(name)[kept].astype(float) for name in ("quality", "price", "latency_s", "propensity")
        )
        mask = (count > 0).reshape(shape)
        asked = count.reshape(shape).astype(np.int32) if count.max() > 1 else None
        times = self.column("query")[kept], self.column("time")[kept].astype(float)
        again = None if asked is None else decided_again(*times, propensity, shape[0])
        table = Table(
            # A copy, since the log may grow.
            list(self.queries),
            names,
            np.where(mask, mean(quality), 0).astype(np.float32),
            np.where(mask, mean(price), 0),
            mask,
            mean(latency).astype(np.float32),
            # The harmonic mean, since outcomes are weighted by the inverse of their propensity.
            (1 / mean(1 / np.maximum(propensity, 1e-6))).astype(np.float32),
            asked,
            again,
        )
        answered = mask.any(1)
        return table if answered.all() else table.rows(np.flatnonzero(answered))


def log_of_table(
    queries: Sequence[str],
    experts: Sequence[str],
    quality: np.ndarray,
    price: np.ndarray,
    mask: np.ndarray | None = None,
    propensity: np.ndarray | None = None,
) -> Log:
    """A log of every observed cell, row after row.  N, E, (N, E), (N, E) or (E,), (N, E) -> Log"""
    shape = (len(queries), len(experts))
    quality = np.asarray(quality)
    known = np.ones(shape, bool) if mask is None else np.asarray(mask, bool)
    if quality.shape != shape or known.shape != shape:
        raise ValueError(f"quality, mask: expected shape {shape}, queries by experts; got {quality.shape} and {known.shape}")
    price = _spread("price", price, shape)
    chance = _spread("propensity", np.nan if propensity is None else propensity, shape)
    return Log(
        Outcome(queries[row], experts[column], quality[row, column], price[row, column], propensity=chance[row, column])
        for row, column in zip(*np.nonzero(known), strict=True)
    )


def _spread(name: str, values: Any, shape: tuple[int, int]) -> np.ndarray:
    try:
        return np.broadcast_to(values, shape)
    except ValueError:
        came = np.shape(values)
        raise ValueError(f"{name}: expected shape {shape}, queries by experts, or one per expert; got {came}") from None


def _number_in(row: int, name: str, value: object) -> float:
    """The value as a float; DataError with the row and field where it is not a number in range."""
    low, high = NUMBERS[name]
    required = name in ("quality", "price")
    if value is None and not required:
        return np.nan
    if name == "quality" and isinstance(value, bool | np.bool_):
        # Right or wrong.
        return float(value)
    # Dollars in Parquet are often decimals.
    if not isinstance(value, int | float | Decimal | np.integer | np.floating) or isinstance(value, bool):
        raise DataError(f"row {row}, {name}: expected {_expected(name)}, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = np.inf
    if np.isnan(number) and not required:
        return number
    if not low <= number <= high or np.isinf(number):
        raise DataError(f"row {row}, {name}: expected {_expected(name)}, got {number:g}")
    if name == "price" and number > _DEAREST:
        raise DataError(f"row {row}, price: expected dollars up to {_DEAREST:.0e}, got {number:g}")
    if number > _MOST and name not in DOUBLE:
        raise DataError(f"row {row}, {name}: expected a number up to {_MOST:.1e}, got {number:g}")
    if name == "propensity" and np.float32(number) == 0:
        raise DataError(
            f"row {row}, propensity: expected a probability above 0, got {number:g}; what cannot happen did not happen"
        )
    return number


def _expected(name: str) -> str:
    low, high = NUMBERS[name]
    if name == "time":
        return "a number of seconds since 1970"
    return f"a number in [{low:g}, {high:g}]" if np.isfinite(high) else "a number that is finite and not negative"


def spelt_alike(names: Iterable[str]) -> list[list[str]]:
    """Names that differ in nothing but capitals, spaces and signs: probably one expert that was spelt in several ways."""
    groups: dict[str, list[str]] = {}
    for name in names:
        alike = unicodedata.normalize("NFKC", name).casefold()
        groups.setdefault("".join(filter(str.isalnum, alike)) or name, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def check_text(row: int | str, name: str, value: object) -> str:
    if name == "expert" and isinstance(value, str) and value.strip() and value != value.strip():
        raise DataError(
            f"row {row}, expert: expected no space before or after the name, got {value!r}; it would be another expert"
        )
    if not isinstance(value, str) or (name == "expert" and not value.strip()):
        raise DataError(f"row {row}, {name}: expected {'a name' if name == 'expert' else 'text'}, got {value!r}")
    return value


def _tags_in(row: int, tags: object) -> tuple[str, ...]:
    if isinstance(tags, str):
        return (tags,) if tags else ()
    if _is_empty(tags):
        return ()
    if not isinstance(tags, list | tuple | np.ndarray) or not all(isinstance(tag, str) for tag in tags):
        raise DataError(f"row {row}, tags: expected a text or a list of texts, got {tags!r}")
    return tuple(tags)


def _is_empty(cell: object) -> bool:
    """pandas has NaN where a column of anything has no value."""
    return cell is None or (isinstance(cell, float) and np.isnan(cell))


class _Column:
    """A typed column that doubles as it grows."""

    def __init__(self, dtype: type) -> None:
        self._array: np.ndarray = np.empty(64, dtype)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, value: float) -> None:
        if self._size == len(self._array):
            self._array = np.concatenate([self._array, np.empty_like(self._array)])
        self._array[self._size] = value
        self._size += 1

    @property
    def values(self) -> np.ndarray:
        return self._array[: self._size]


def _code(codes: dict, values: list, value: object) -> int:
    code = codes.get(value)
    if code is None:
        code = codes[value] = len(values)
        values.append(value)
    return code
