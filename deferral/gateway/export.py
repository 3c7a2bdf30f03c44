"""The router's log out of the record: what was asked, who was drawn with which probability, and how good the answer was."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, Engine, Row, and_, func, or_, select

from deferral.errors import DataError
from deferral.gateway.rows import BY_ANSWER, ROUTED
from deferral.gateway.schema import cascades, decisions, feedback, own_price, texts
from deferral.routing import Confidence, Log, Outcome, write_log

__all__ = [
    "DRAWN",
    "Exported",
    "Logged",
    "allowed",
    "by_chance",
    "confidence_in",
    "export",
    "in_vain",
    "latest",
    "logged",
    "nothing_left",
    "whole",
]

_PAGE = 2000

_judged = select(func.avg(feedback.c.quality)).where(feedback.c.decision == decisions.c.id).scalar_subquery()
# Of a decision joined with its cascade: the draw, what came of it, and what is said of the answer on average.
DRAWN = (
    decisions.c.chosen, decisions.c.expert, decisions.c.requested, decisions.c.outcome, decisions.c.reason,
    decisions.c.propensity, decisions.c.expected, own_price, decisions.c.price_of_error, decisions.c.draw, cascades.c.ending,
    _judged.label("quality"),
)  # fmt: skip

# In the order in which a row is looked at: each is counted under the first that holds.
NAMED = "a client asked for the expert by name"
FAILED = "there was no whole answer"
FELL_BACK = "another expert answered than was drawn"
CERTAIN = "an answer was kept or not by its own log-probabilities, with certainty (explore was 0)"
NO_CHANCE = "the probability of the draw is not known"
NO_TEXT = "the query was not stored"
NO_QUALITY = "nobody said how good the answer was"


@dataclass(frozen=True, slots=True)
class Logged:
    """One draw of the router and what came of it: who else could have been drawn, at which price of an error."""

    outcome: Outcome
    allowed: tuple[str, ...]
    price_of_error: float

    @property
    def by_chance(self) -> bool:
        return by_chance(self.outcome.propensity, self.allowed)


@dataclass(frozen=True)
class Exported:
    """How many rows were written, and why the others were left out."""

    rows: int
    left_out: dict[str, int]
    assumed: int  # rows whose quality is the stated default

    def __str__(self) -> str:
        lines = [f"{self.rows} rows written" + (f", {self.assumed} of them with the assumed quality" if self.assumed else "")]
        lines += [f"{count} left out: {reason}" for reason, count in self.left_out.items()]
        return "\n".join(lines)


def export(
    engine: Engine,
    path: str | Path,
    *,
    since: float = -math.inf,
    until: float = math.inf,
    assumed_quality: float | None = None,
) -> Exported:
    """Write the log to a file that ends in .jsonl or .parquet, for `deferral.routing.read_log`.

    Times are those of arrival, in seconds since 1970: since <= time < until.  `assumed_quality` stands in where there was no
    feedback; such rows have the tag "assumed".  A new file can be read by its owner alone.  DataError where no row is left.
    """
    left_out: Counter[str] = Counter()
    log = Log(row.outcome for row in logged(engine, left_out, since=since, until=until, assumed_quality=assumed_quality))
    if len(log) == 0:
        raise DataError(nothing_left(left_out))
    # As the database, which holds the same texts.
    write_log(log, path, private=True)
    assumed = sum(bool(log.tag_sets[code]) for code in log.column("tags").tolist())
    return Exported(len(log), dict(left_out.most_common()), assumed)


def logged(
    engine: Engine,
    left_out: Counter[str],
    *,
    since: float = -math.inf,
    until: float = math.inf,
    assumed_quality: float | None = None,
    unheard: Counter[str] | None = None,
) -> Iterator[Logged]:
    """The rows that a router can learn from, oldest first; `left_out` counts the others by reason.

    `unheard` counts, by the expert that was drawn by chance, those of them that lack nothing but an answer, or an opinion on it.

    Read in pages, each for itself: a long transaction would keep the writer's journal from being emptied.
    """
    if assumed_quality is not None and not 0 <= assumed_quality <= 1:
        raise ValueError(f"assumed_quality: expected a number in [0, 1], got {assumed_quality}")
    when, last = max(since, -1e300), ""
    while True:
        # The first row after the last one that was read.
        later = or_(decisions.c.time > when, and_(decisions.c.time == when, decisions.c.id > last))
        # The first condition is for the index: by the second alone every page would be looked for from the beginning.
        wanted = select(decisions).where(decisions.c.time >= when, later).order_by(decisions.c.time, decisions.c.id).limit(_PAGE)
        if until < math.inf:
            wanted = wanted.where(decisions.c.time < until)
        with engine.connect() as connection:
            page = connection.execute(wanted).all()
            ids = [row.id for row in page]
            asked = dict(connection.execute(select(texts.c.decision, texts.c.query).where(texts.c.decision.in_(ids))).all())
            said = latest(connection, ids)
            through = {one.decision: one for one in connection.execute(select(cascades).where(cascades.c.decision.in_(ids)))}
        for row in page:
            quality, cascade = said.get(row.id, assumed_quality), through.get(row.id)
            reason = _why_not(row, cascade, asked.get(row.id), quality, judged=row.id in said)
            if reason:
                left_out[reason] += 1
                silent = reason == NO_QUALITY or (in_vain(row, cascade) and row.id in asked)
                if unheard is not None and silent and by_chance(row.propensity, allowed(row.chosen, json.loads(row.expected))):
                    unheard[row.chosen] += 1
            else:
                yield _logged(row, cascade, asked[row.id], float(quality), row.id not in said)  # type: ignore[arg-type]
        if len(page) < _PAGE:
            return
        when, last = page[-1].time, page[-1].id


def nothing_left(left_out: Counter[str]) -> str:
    """Why a log would be empty, and what to do."""
    if not left_out:
        return "the record holds no request in that time; expected at least one"
    reasons = "; ".join(f"{count} rows: {reason}" for reason, count in left_out.most_common())
    return (
        f"no row of the record can be used ({reasons}).  A router learns from queries that are stored (serve with "
        "--store-text and --retention-days) and judged (POST /v1/feedback, or an assumed quality)"
    )


def latest(connection: Connection, ids: list[str]) -> dict[str, float]:
    """The quality of each answer; of two opinions the later."""
    found = select(feedback.c.decision, feedback.c.quality).where(feedback.c.decision.in_(ids)).order_by(feedback.c.time)
    return dict(connection.execute(found).all())


def whole(row: Row) -> bool:
    """Whether who was drawn has answered, to the end."""
    return bool(row.outcome == "ok" and row.expert == row.chosen)


def in_vain(row: Row, cascade: Row | None) -> bool:
    """Whether who was drawn gave no whole answer to a request that was routed: it failed, was too late, or broke off.

    1 / propensity makes up for what was not drawn, and not for this.  A client's mistake, which nobody answers, is none of it.
    """
    drawn = row.requested == ROUTED and row.outcome != "refused" and row.propensity is not None and 0 < row.propensity <= 1
    by_answer = cascade is not None and cascade.ending in BY_ANSWER
    if not drawn or (by_answer and row.propensity == 1):
        return False
    return row.expert != row.chosen or row.outcome in ("truncated", "cancelled")


def _why_not(row: Row, cascade: Row | None, query: str | None, quality: float | None, *, judged: bool) -> str:
    if row.requested != ROUTED:
        return NAMED
    # An answer that broke off is what its expert gave, and worth what somebody says; nobody's assumption.
    if not row.expert or (row.outcome != "ok" and not (row.outcome == "truncated" and judged)):
        return FAILED
    if row.expert != row.chosen:
        return FELL_BACK
    if cascade is not None and cascade.ending in BY_ANSWER and row.propensity == 1:
        return CERTAIN
    if row.propensity is None or not 0 < row.propensity <= 1:
        return NO_CHANCE
    if query is None:
        return NO_TEXT
    return "" if quality is not None else NO_QUALITY


def _logged(row: Row, cascade: Row | None, query: str, quality: float, assumed: bool) -> Logged:
    # What a first answer cost that was not given is no price of the one that was.
    price = row.price if cascade is None else max(row.price - cascade.extra, 0.0)
    # Nor is the time of two answers that of one.
    waited = cascade is not None and row.expert != cascade.first
    outcome = Outcome(
        query,
        row.expert,
        quality,
        price,
        row.input_tokens,
        row.output_tokens,
        math.nan if row.latency_s is None or waited else row.latency_s,
        row.propensity,
        row.time,
        ("assumed",) if assumed else (),
        confidence_in(cascade) if cascade is not None and cascade.ending == "kept" else None,
    )
    return Logged(outcome, allowed(row.chosen, json.loads(row.expected)), row.price_of_error or math.nan)


def allowed(chosen: str, expected: Mapping[str, Sequence[float | None]]) -> tuple[str, ...]:
    """Who could have been drawn, by the column `expected` of a decision: whoever has a cost, and who was drawn."""
    return tuple(name for name, (_, _, cost) in expected.items() if cost is not None or name == chosen) or (chosen,)


def by_chance(propensity: float, allowed: Sequence[str]) -> bool:
    """Whether the others, if there were any, could have been drawn as well."""
    return propensity < 1 or len(allowed) == 1


def confidence_in(cascade: Row) -> Confidence | None:
    """The confidence of a first answer, as a row of the record holds it."""
    if cascade.confidence is None:
        return None
    return Confidence(*(math.nan if number is None else float(number) for number in json.loads(cascade.confidence)))
