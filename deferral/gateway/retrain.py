"""A new router from the gateway's own traffic, put in the place of the old one only if it is better with confidence."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Engine

from deferral.errors import DataError
from deferral.gateway.export import Logged, logged, nothing_left
from deferral.gateway.off_policy import FEWEST_SEEN, Comparison, Draws, compare, of_no_use, stakes
from deferral.routing import Log, Needs, Outcome, Router
from deferral.routing.persistence import check_unchanged, keep_previous, written
from deferral.routing.prices import characters_of

__all__ = ["Verdict", "choices", "draws_of", "learned", "promote", "retrain"]

_HELD_OUT = 0.3
_FEWEST_ROWS = 100


@dataclass(frozen=True)
class Verdict:
    """Whether the new router is better with confidence, whether it took the old one's place, and why."""

    better: bool
    promoted: bool
    why: str
    trained_on: int
    comparison: Comparison | None
    left_out: dict[str, int]
    of_log: int = 0  # rows of the old log that it has learned from as well

    def __str__(self) -> str:
        lines = [f"learned from {self.trained_on} rows of the record" + (f" and {self.of_log} of the log" if self.of_log else "")]
        if (judged := self.comparison) is not None:
            lines += [
                f"judged on {judged.rows} others; the routers differ on {judged.differ}, where {judged.seen[0]} different "
                f"queries had drawn the old one's choice and {judged.seen[1]} the new one's",
                f"cost in errors a query (95%): old {_shown(judged.old)}, new {_shown(judged.new)}",
                f"gain: {_shown(judged.gain)} (doubly robust), {_shown(judged.gain_weighted)} (self-normalised weights)",
            ]
        lines += [f"{count} rows left out: {reason}" for reason, count in self.left_out.items()]
        end = "promoted" if self.promoted else "it would be promoted" if self.better else "not promoted"
        return "\n".join([*lines, f"{end}: {self.why}"])


def retrain(
    engine: Engine,
    folder: str | Path,
    *,
    old_log: Log | None = None,
    assumed_quality: float | None = None,
    drop_cascade: bool = False,
    dry_run: bool = False,
    load: Callable[[Path], Router] = Router.load,
    seed: int = 0,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Verdict:
    """Fit a router on most of the record, and on the log that the old one was fitted on; judge both on the rest.

    Three queries in ten are held out, always the same ones, so that no router of this gateway has seen them.  The new router
    replaces the folder if the 95% interval of its gain lies above 0; what was there is kept beside it, as FOLDER.previous.
    A new router has no cascade: one that pays is replaced with `drop_cascade` only, since its worth is no part of the comparison.
    A router with an encoder of your own needs a `load` that passes it.  `on_stage` is told what is begun.
    """
    folder = Path(folder)
    on_stage("reading the record")
    before = written(folder)
    old, new = load(folder), load(folder)
    left_out: Counter[str] = Counter()
    judged, unheard = Counter[str](), Counter[str]()
    train, judge = [], []
    for row in logged(engine, left_out, assumed_quality=assumed_quality, unheard=unheard):
        # The routers are compared on draws by chance: of those before exploration another share may have been judged.
        if row.by_chance:
            judged[row.outcome.expert] += 1
        if not set(row.allowed) <= set(old.experts):
            left_out["it was drawn among experts that the router does not have"] += 1
        elif not _is_held_out(row.outcome.query):
            train.append(row.outcome)
        elif not row.by_chance:
            left_out["held out, but the draw was certain: nothing can be said of the others (explore was 0)"] += 1
        elif not row.price_of_error > 0:
            left_out["held out, but the price of an error is not known"] += 1
        else:
            judge.append(row)
    # A router that was fitted on all of a log has learned some of what is held out here.
    known = old.knows([row.outcome.query for row in judge])
    left_out["held out, but the old router has learned from the query"] += int(known.sum())
    judge = [row for row, learned_from in zip(judge, known, strict=True) if not learned_from]
    reasons = {reason: count for reason, count in left_out.most_common() if count}
    if not train and not judge:
        raise DataError(nothing_left(Counter(reasons)))
    if len(judge) < _FEWEST_ROWS or not train:
        more = math.ceil(max(_FEWEST_ROWS - len(judge), 1) / _HELD_OUT)
        why = (
            f"{len(judge)} rows to judge by are too few, expected at least {_FEWEST_ROWS} to judge at all: about {more} more "
            "judged answers; to show that a router is better takes thousands"
        )
        return Verdict(False, False, why, len(train), None, reasons)
    both = "" if old_log is None else f" and {len(old_log):,} of the log"
    on_stage(f"fitting a router to {len(train):,} outcomes of the record{both}, which may take minutes")
    unseen = {row.outcome.query for row in judge}
    learned(new, train, old_log, unseen=unseen)
    of_log = 0 if old_log is None else sum(row.query not in unseen for row in old_log)
    on_stage(f"judging both routers on {len(judge):,} other outcomes")
    heard = {name: count / (count + unheard[name]) for name, count in judged.items()}
    draws = draws_of(new, judge, heard)
    comparison = compare(draws, choices(old, judge), choices(new, judge), seed=seed)
    why = _why_not(comparison)
    if not why and old.cascade is not None and not old.cascade.why_not(old.price_of_error) and not drop_cascade:
        why = (
            f"it saves {_shown(comparison.gain)} errors a query where neither has a cascade, but the one that is there pays, and "
            "would be lost: promote it nevertheless with --drop-cascade, then make another with `deferral route cascade`"
        )
    if not why and not dry_run:
        promote(new, folder, before)
    saves = f"it saves {_shown(comparison.gain)} errors a query"
    return Verdict(not why, not why and not dry_run, why or saves, len(train), comparison, reasons, of_log)


def learned(router: Router, outcomes: Sequence[Outcome], old_log: Log | None = None, unseen: Collection[str] = ()) -> Router:
    """Fit the router again, for the experts that it has, on new outcomes and an old log, but for the queries in `unseen`.

    It keeps no text of the new outcomes.
    """
    log = Log(outcomes)
    if old_log is not None:
        # In a table without gaps nobody was drawn: every cell was certain to be seen.
        certain = old_log.table().full
        log.extend(replace(row, propensity=1.0) if certain else row for row in old_log if row.query not in unseen)
    if missing := [name for name in router.experts if name not in log.experts]:
        raise DataError(
            f"no usable row of the record was answered by {', '.join(missing)}; pass the log that the router was fitted on as "
            "well, or remove the expert from the router"
        )
    table = log.table(router.experts)
    # A router shows the queries nearest to a new one.  Those of the record must not outlive their time in its folder: only their
    # lengths stay, by which short follow-ups are known.
    return router.fit(table).without_texts(table.queries, () if old_log is None else old_log.queries)


def choices(router: Router, rows: Sequence[Logged]) -> np.ndarray:
    """Whom the router would ask, exploration left out, each row under its own constraints and price of an error.  -> (N,)"""
    vectors = router.encoder([row.outcome.query for row in rows])
    groups: dict[tuple, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault((row.price_of_error, row.allowed), []).append(place)
    explore, router.explore = router.explore, 0.0
    actions = np.empty(len(rows), int)
    try:
        for (price_of_error, allowed), places in groups.items():
            # What the query needed was looked at when it was decided: whoever was allowed was able.
            plan = router.plan(price_of_error=price_of_error, needs=Needs.of(allow=allowed))
            some = np.array(places)
            queries = [rows[place].outcome.query for place in places]
            actions[some] = router.decide(plan, vectors.rows(some), queries).actions
    finally:
        router.explore = explore
    return actions


def draws_of(model: Router, rows: Sequence[Logged], heard: Mapping[str, float]) -> Draws:
    """The rows as draws, with the cost that `model` expects of every expert.  It must not have seen them.

    `heard` is the share of an expert's draws that were answered and judged.

    (e (1 - quality) + price) / the router's price of an error, with e the row's own: dollars, said in errors.  A client's e
    counts up to ten times the router's, so that nobody's setting outweighs all others.
    """
    experts, queries = model.experts, [row.outcome.query for row in rows]
    unit = model.price_of_error
    error = stakes([row.price_of_error for row in rows], unit)
    quality = np.array([row.outcome.quality for row in rows])
    price = np.array([row.outcome.price for row in rows])
    expected = model.fitted.estimate(model.encoder(queries))
    prices = model.fitted.priced(characters_of(queries), expected.dearness)
    _, group = np.unique(queries, return_inverse=True)
    action = np.array([experts.index(row.outcome.expert) for row in rows])
    return Draws(
        action=action,
        propensity=np.array([row.outcome.propensity for row in rows]),
        cost=error * (1 - quality) + price / unit,
        estimate=error[:, None] * (1 - np.clip(expected.quality, 0, 1)) + prices / unit,
        group=group,
        heard=np.array([heard[row.outcome.expert] for row in rows]),
        worst=of_no_use(error, price / unit, action),
        perfect=price / unit,
    )


def _why_not(judged: Comparison) -> str:
    """Why the new router may not be better; "" if it is."""
    if judged.differ == 0:
        return "it decides every held-out query as the old one does"
    if min(judged.seen) < FEWEST_SEEN:
        return (
            f"where the two differ, too few different queries had drawn the choice of one of them ({judged.seen[0]} and "
            f"{judged.seen[1]}; expected at least {FEWEST_SEEN} of each): wait for more traffic{_until_seen(judged)}, or explore "
            "more"
        )
    if judged.gain.low <= 0:
        return f"the gain of {_shown(judged.gain)} errors a query may be nothing{_until_shown(judged)}"
    if judged.cautious <= 0:
        return (
            f"the gain of {_shown(judged.gain)} errors a query rests on {judged.seen[1]} draws of the new choice, and might be "
            f"nothing had one more of them failed, or one more than {judged.seen[0]} of the old choice been perfect: wait for "
            "more traffic, or explore more"
        )
    if not judged.gain_weighted.estimate > 0:
        return f"the two estimates disagree: {_shown(judged.gain)} and {_shown(judged.gain_weighted)}"
    return ""


def _until_seen(judged: Comparison) -> str:
    """How much traffic would have drawn either choice often enough, at the present rate."""
    fewest = min(judged.seen)
    return f", about {_rounded(FEWEST_SEEN / fewest * judged.rows / _HELD_OUT)} judged answers in all" if fewest else ""


def _until_shown(judged: Comparison) -> str:
    """How much traffic would show a gain of this size: intervals shrink with the root of the rows."""
    gain = judged.gain.estimate
    # To show what is next to nothing is worth nobody's while.
    if gain <= 0 or (gain - judged.gain.low) / gain > 100:
        return ""
    times = ((gain - judged.gain.low) / gain) ** 2
    answers = _rounded(times * judged.rows / _HELD_OUT)
    return f": were it as large as it seems, about {answers} judged answers in all would show it, fewer with more exploration"


def _rounded(count: float) -> str:
    return f"{float(f'{math.ceil(count):.2g}'):,.0f}"


def promote(router: Router, folder: Path, before: str) -> None:
    """Save a router in the place of the one that was `written` there before, which is kept beside it as FOLDER.previous."""
    check_unchanged(folder, before)
    keep_previous(folder)
    router.save(folder)


def _is_held_out(query: str) -> bool:
    digest = blake2b(query.encode("utf-8", "replace"), digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "big") < _HELD_OUT * 2**64


def _shown(interval: Any) -> str:
    return f"{interval.estimate:.4f} [{interval.low:.4f}, {interval.high:.4f}]"
