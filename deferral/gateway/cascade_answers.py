"""Answers to learn a cascade from, out of the gateway's record: numbers alone, so that no text need be stored."""

import json
from collections import Counter
from collections.abc import Sequence

import numpy as np
from sqlalchemy import Engine, Row, select

from deferral.errors import DataError
from deferral.gateway.export import confidence_in, in_vain, latest, whole
from deferral.gateway.off_policy import alike
from deferral.gateway.rows import BY_ANSWER
from deferral.gateway.schema import cascades, decisions
from deferral.routing.cascade import features
from deferral.routing.cascade_fitting import Answered

__all__ = ["answers_on_record"]

_PAGE = 500

# In the order in which a row is looked at.
_NO_ANSWER = "there was no whole answer"
CERTAIN = "it was kept or deferred with certainty: nothing can be said of the other (explore was 0)"
OTHERS = "not every expert of the router might have been asked"
IN_VAIN = "there was no whole answer by whom it was to be"
NO_QUALITY = "nobody said how good the answer was"


def answers_on_record(engine: Engine, experts: Sequence[str], first: str, left_out: Counter[str]) -> Answered:
    """First answers that were kept or not by a draw, and the quality of what was given.

    What was expected of every expert is what the router said before the answer.  `left_out` counts the rows that nothing can be
    learned from, by reason.  Those that lack an answer, or an opinion on it, alone are rows nevertheless, with nothing known, and
    the propensity of the others includes the share of the expert's draws that are answered and judged: who is judged more often,
    or fails less often, must not count for more.  DataError where nothing is known.
    """
    place = list(experts).index(first)
    columns = (
        decisions.c.id, decisions.c.expert, decisions.c.chosen, decisions.c.outcome, decisions.c.propensity,
        decisions.c.requested, decisions.c.expected, decisions.c.price, decisions.c.draw, cascades.c.ending, cascades.c.extra,
        cascades.c.confidence,
    )  # fmt: skip
    wanted = (
        select(*columns)
        .join(cascades, cascades.c.decision == decisions.c.id)
        .where(cascades.c.first == first, cascades.c.ending.in_(BY_ANSWER))
    )
    found, drawn, last = [], [], ""
    given: dict[str, list[bool]] = {name: [] for name in experts}
    while True:
        # In pages: a long transaction would keep the writer's journal from being emptied.
        with engine.connect() as connection:
            page = connection.execute(wanted.where(decisions.c.id > last).order_by(decisions.c.id).limit(_PAGE)).all()
            said = latest(connection, [row.id for row in page])
        for row in page:
            expected = json.loads(row.expected)
            if reason := _why_not(row, expected, experts, row.id in said):
                left_out[reason] += 1
            if reason in ("", NO_QUALITY, IN_VAIN):
                found.append(_known(row, expected, experts, place, said.get(row.id) if not reason else None))
                drawn.append(row.draw)
                given[row.chosen].append(not reason)
        if len(page) < _PAGE:
            break
        last = page[-1].id
    if not any(any(judged) for judged in given.values()):
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in left_out.most_common()) or "there is none at all"
        raise DataError(
            f"no answer that {first} gave first can be learned from ({reasons}).  Serve with --explore, "
            "with a cascade that pays, and judge answers (POST /v1/feedback)"
        )
    sure, *numbers = zip(*found, strict=True)
    estimate, expected_price, quality, price, mask, propensity = (np.array(column) for column in numbers)
    heard = np.array([np.mean(given[name]) if given[name] else 1.0 for name in experts])
    propensity = np.where(mask, propensity * heard, 1.0)
    query = alike(drawn)
    return Answered(tuple(experts), first, features(sure), estimate, expected_price, quality, price, mask, propensity, query)


def _why_not(row: Row, expected: dict, experts: Sequence[str], judged: bool) -> str:
    # Without log-probabilities the router drew, and not the cascade.
    if row.confidence is None or not (whole(row) or in_vain(row, row)):
        return _NO_ANSWER
    if row.propensity is None or not 0 < row.propensity < 1:
        return CERTAIN
    if set(expected) != set(experts) or any(None in numbers for numbers in expected.values()):
        return OTHERS
    if not whole(row):
        return IN_VAIN
    return "" if judged else NO_QUALITY


def _known(row: Row, expected: dict, experts: Sequence[str], place: int, quality: float | None) -> tuple:
    """A row of each array of `Answered`; `quality` is None where nobody said."""
    given, judged = list(experts).index(row.chosen), quality is not None
    estimate = [min(max(expected[name][0], 0.0), 1.0) for name in experts]
    prices = [expected[name][1] for name in experts]
    paid, good, mask, propensity = list(prices), [0.0] * len(experts), [False] * len(experts), [1.0] * len(experts)
    good[given], mask[given], propensity[given] = quality or 0.0, judged, row.propensity
    if whole(row):
        paid[given] = row.price - row.extra
    if given != place:
        paid[place] = row.extra
    return confidence_in(row), estimate, prices, good, paid, mask, propensity
