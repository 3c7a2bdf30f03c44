"""How a cascade is learned from answers with their log-probabilities, and what it is worth on rows that it did not see."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deferral.errors import DataError
from deferral.routing.cascade import Cascade, Paid, features, logit, network_input
from deferral.routing.encoders import FunctionEncoder
from deferral.routing.held_out import FOLDS, grid, mean_and_half, random_folds
from deferral.routing.outcomes import Log
from deferral.routing.partial_logs import LEAST_PROPENSITY, observed
from deferral.routing.persistence import check_unchanged, written
from deferral.routing.policies.networks import trained, two_layers
from deferral.routing.policies.rejector import priced_loss
from deferral.routing.prices import characters_of, error_range, fit_prices, repriced
from deferral.routing.router import Router
from deferral.routing.table import Table
from deferral.routing.vectors import Arrays
from deferral.threads import one_thread

__all__ = ["Answered", "add_cascade", "answers_in", "fit_cascade", "gain_over"]

_FEWEST = 200
_KEPT = 4000
_HIDDEN = 16
_FEWEST_STEPS = 400  # few weights, in a loss that is flat where qualities are off by a common factor
_RIDGE = 10.0
_FEWEST_KNOWN = 20
_FEWEST_QUERIES = 20  # a mean of fewer is no normal law
# 95% over all prices of an error together: somewhere among 25 an interval of one lies above 0 by chance alone.
_Z = 3.09


@dataclass(frozen=True)
class Answered:
    """N answers of the expert that is asked first, and what is known of E experts on the same queries.

    What was not observed is False in the mask; its quality counts for nothing, its price is the expected one.  `propensity` is
    the probability with which a known cell came to be known, 1 where that is not known: then it must not have depended on more
    than the query and the answer.  From a row of which nothing is known nothing is learned, but it is one of those that a cascade
    is judged on.
    """

    experts: tuple[str, ...]
    first: str
    confidence: np.ndarray  # (N, F)
    estimate: np.ndarray  # (N, E) expected quality, by a router that did not see these queries
    expected: np.ndarray  # (N, E) expected price, dollars
    quality: np.ndarray  # (N, E)
    price: np.ndarray  # (N, E) dollars
    mask: np.ndarray  # (N, E) bool
    propensity: np.ndarray  # (N, E)
    query: np.ndarray  # (N,) answers to the same query have the same number

    def __len__(self) -> int:
        return len(self.query)

    def rows(self, rows: np.ndarray) -> "Answered":
        """Some of them."""
        columns = {name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return Answered(self.experts, self.first, **columns)


def answers_in(
    log: Log, router: Router, first: str, *, seed: int = 0, on_fold: Callable[[int, int], None] = lambda done, of: None
) -> Answered:
    """The answers of `first` in a log that have a confidence.

    Where the router was fitted on queries of the log, what it expects of them would be too good: routers like it are then fitted
    to three quarters of the log, each to say what is expected of the fourth.  Calls `on_fold(done, of)` before each.
    """
    if first not in router.experts:
        raise ValueError(f"first: {first!r} is no expert of this router; it has {', '.join(router.experts)}")
    table, place = log.table(router.experts), router.experts.index(first)
    column, own = log.column("query"), log.column("expert")
    wanted = log.experts.index(first)
    rows = np.array([row for row in sorted(log.confidences) if own[row] == wanted], int)
    if len(rows) == 0:
        raise DataError(
            f"no answer of {first!r} in the log has a confidence; ask it with logprobs, and log what "
            "deferral.routing.confidence_of_reply says of each reply"
        )
    by_text = {text: number for number, text in enumerate(table.queries)}
    query = np.array([by_text[log.queries[code]] for code in column[rows]])
    estimate, expected = _foreseen(table, router, seed, on_fold)
    quality, mask = table.quality[query].astype(float), table.mask[query]
    paid = table.price[query]
    # This very answer, and not the mean of several.
    quality[:, place], paid[:, place], mask[:, place] = log.column("quality")[rows], log.column("price")[rows], True
    # The router's prices may be others than those of the log.
    characters = characters_of(table.queries)[query]
    before = fit_prices(table, observed(table))(characters)
    paid = np.maximum(repriced(paid, before, router.fitted.prices(characters)), 0)
    price = np.where(mask, paid, expected[query])
    propensity = _propensities(table.propensity[query].astype(float), mask)
    propensity[:, place] = 1.0
    sure = features([log.confidences[int(row)] for row in rows])
    return Answered(tuple(router.experts), first, sure, estimate[query], expected[query], quality, price, mask, propensity, query)


def _propensities(logged: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Of the known cells; where none is logged, the share of the answers that are beside one of the expert.  -> (N, E)

    That assumes, as elsewhere, that who was asked did not depend on the query; where all were asked it is 1.
    """
    plain = ~(mask & ~np.isnan(logged)).any(1)
    share = mask[plain if plain.any() else slice(None)].mean(0)
    chance = np.where(np.isnan(logged), np.maximum(share, LEAST_PROPENSITY), logged)
    return np.where(mask & ~mask.all(), chance, 1.0)


def fit_cascade(answers: Answered, *, seed: int = 0) -> Cascade:
    """Learn when to keep an answer; `Cascade.paid` is what that is worth on folds of queries that were held out."""
    errors = grid(answers.expected)
    query, costs = _cross_fitted(answers, errors, seed)
    return Cascade(answers.experts, answers.first, _learned(answers, seed), _judged(errors, query, *costs))


def add_cascade(
    folder: Path,
    log: Log,
    first: str,
    *,
    encoder: Any = None,
    seed: int = 0,
    on_fold: Callable[[int, int], None] = lambda done, of: None,
    on_answers: Callable[[int], None] = lambda count: None,
) -> tuple[Cascade, float]:
    """Learn a cascade from a log, and save the router of a folder with it if it pays at some price of an error.

    -> the cascade, and the router's price of an error.  DataError where another router was saved there in the meantime.
    """
    before, router = written(folder), Router.load(folder, encoder=encoder)
    answers = answers_in(log, router, first, seed=seed, on_fold=on_fold)
    on_answers(len(answers))
    found = fit_cascade(answers, seed=seed)
    if found.paid.pays:
        check_unchanged(folder, before)
        router.cascade = found
        router.save(folder)
    return found, router.price_of_error


def gain_over(old: Cascade, answers: Answered, error: float, *, seed: int = 0) -> tuple[float, float]:
    """Errors a query that a cascade learned from these answers saves against an older one, and half its 95% interval.

    On folds of queries that were held out from the new one; the old one is taken to have seen none of them.  The interval allows
    for one more answer of the new one's choice that was wrong, or of the old one's that was right, where they differ: of the few
    that were explored, of heavy weight each, none may be, by luck.  It is infinite where one of the choices was never seen.
    """
    query, (new, before) = _cross_fitted(answers, np.array([error]), seed, old)
    differ = new[1] != before[1]
    saved = np.bincount(query, before[0] - new[0]) / np.bincount(query)
    gain, half = mean_and_half(saved)
    if not differ.any():
        return gain, half
    for weight, lost in ((new[2], new[3]), (before[2], 1 - before[3])):
        seen = differ & (weight > 0)
        if not seen.any():
            return gain, np.inf
        # It stands for no more than all on which they differ.
        once = (before[0] - new[0])[differ].mean() - min(weight[seen].mean(), differ.sum()) * lost[seen].mean()
        less, its_half = mean_and_half(np.append(saved, once))
        half = max(half, gain - less + its_half)
    return gain, half


def _cross_fitted(
    answers: Answered, errors: np.ndarray, seed: int, old: Cascade | None = None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The numbers of the queries, and the costs of each answer by what was learned from those to the other folds of queries.

    With an old cascade instead what is taken by the new one, and by that, at the first of the prices of an error.
    """
    known = answers.mask.any(1)
    if known.sum() < _FEWEST:
        raise DataError(f"{known.sum()} answers with a confidence are too few to learn from, expected at least {_FEWEST}")
    if (queries := len(np.unique(answers.query[known]))) < _FEWEST_QUERIES:
        raise DataError(
            f"the answers with a confidence are to {queries} different queries, expected at least {_FEWEST_QUERIES}: answers to "
            "the same query are no news to each other; log more queries"
        )
    if len(answers.experts) < 2:
        raise DataError(f"{answers.first} is the only expert; a cascade needs one more to defer to")
    codes, query = np.unique(answers.query, return_inverse=True)
    fold = random_folds(len(codes), seed=seed)[query]
    parts = []
    for number in range(FOLDS):
        rest, held = answers.rows(np.flatnonzero(fold != number)), answers.rows(np.flatnonzero(fold == number))
        guess, new = _guess(rest, held), Cascade(answers.experts, answers.first, _learned(rest, seed), _nothing(errors))
        if old is None:
            parts.append(_costs(new, held, guess, errors))
        else:
            parts.append(tuple(_taken(one, held, guess, errors[0]) for one in (new, old)))
    order = np.concatenate([np.flatnonzero(fold == number) for number in range(FOLDS)])
    return query[order], [np.concatenate(part, axis=1) for part in zip(*parts, strict=True)]


def _foreseen(table: Table, router: Router, seed: int, on_fold: Callable[[int, int], None]) -> tuple[np.ndarray, np.ndarray]:
    """Expected quality and price of every query, by routers that did not see it.  -> (N, E), (N, E)"""
    characters = characters_of(table.queries)
    if not router.knows(table.queries).any():
        known = router.fitted.estimate(router.encoder(table.queries))
        return np.clip(known.quality, 0, 1).astype(float), router.fitted.priced(characters, known.dearness)
    encode = router.encoder.encode if isinstance(router.encoder, FunctionEncoder) else None
    fold = random_folds(len(table.queries), seed=seed)
    quality, dearness = np.empty((2, *table.quality.shape))
    for number in range(FOLDS):
        on_fold(number, FOLDS)
        held = np.flatnonzero(fold == number)
        like = Router(router.price_of_error, encoder=encode, policies=router.policies, seed=router.seed)
        like.fit(table.rows(np.flatnonzero(fold != number)))
        found = like.fitted.estimate(like.encoder([table.queries[row] for row in held]))
        quality[held], dearness[held] = found.quality, found.dearness
    return np.clip(quality, 0, 1), router.fitted.priced(characters, dearness)


@one_thread()
def _learned(answers: Answered, seed: int) -> Arrays:
    """The network, and the answers it was learned from as examples of answers to come.

    The loss of `deferral.routing.policies.Rejector`, `priced_loss`, with the answer that is there as the action that has no
    price; log-odds are those of the estimate and the network's shift.
    """
    import torch
    from torch import Tensor, nn

    answers = answers.rows(np.flatnonzero(answers.mask.any(1)))
    place = answers.experts.index(answers.first)
    centre, scale = _standard(answers.confidence)
    to_come = answers.price.copy()
    to_come[:, place] = 0.0
    x = torch.from_numpy(network_input(answers.confidence, answers.estimate, centre, scale))
    start = torch.from_numpy(logit(answers.estimate)).float()
    wrong = torch.from_numpy(1 - np.where(answers.mask, answers.quality, _guess(answers, answers))).float()
    dollars = torch.from_numpy(to_come).float()
    at_any_price = priced_loss(error_range(to_come), seed=seed)

    def loss(outputs: Tensor, rows: Tensor) -> Tensor:
        return at_any_price(outputs + start[rows], wrong[rows], dollars[rows])

    def network() -> nn.Sequential:
        return two_layers(x.shape[1], _HIDDEN, len(answers.experts), dropout=(0.1, 0.1))

    weights = trained(network, x, loss, start=torch.zeros(len(answers.experts)), seed=seed, fewest_steps=_FEWEST_STEPS)
    arrays = {**weights, "centre": centre.astype(np.float32), "scale": scale.astype(np.float32)}
    kept = np.random.default_rng(seed).permutation(len(answers))[:_KEPT]
    kept = kept[np.argsort(answers.estimate[kept, place], kind="stable")]
    bare = Cascade(answers.experts, answers.first, arrays, _nothing(np.ones(1)))
    shifts = bare.shifts(answers.confidence[kept], answers.estimate[kept])
    return {**arrays, "held": answers.estimate[kept, place], "shifts": shifts.astype(np.float32)}


def _guess(known: Answered, asked: Answered) -> np.ndarray:
    """Quality of every cell, from the estimate and the confidence: a ridge on the cells that are known.  -> (N, E)

    Where an expert was seen on fewer than 20 of the answers, the estimate itself.
    """
    if known.mask.all() and asked.mask.all():
        return asked.estimate
    centre, scale = _standard(known.confidence)
    x, wanted = (_with_ones(network_input(one.confidence, one.estimate, centre, scale)) for one in (known, asked))
    found = asked.estimate.copy()
    for column in range(len(known.experts)):
        seen = known.mask[:, column]
        if seen.sum() < _FEWEST_KNOWN:
            continue
        mass = 1 / known.propensity[seen, column]
        mass /= mass.mean()
        off = known.quality[seen, column] - known.estimate[seen, column]
        inside = (x[seen] * mass[:, None]).T
        slope = np.linalg.solve(inside @ x[seen] + _RIDGE * np.eye(x.shape[1]), inside @ off)
        found[:, column] += wanted @ slope
    return np.clip(found, 0, 1)


def _standard(confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of every feature, over the answers in which it is known.  (N, F) -> (F,), (F,)"""
    known = ~np.isnan(confidence)
    count = np.maximum(known.sum(0), 1)
    centre = np.where(known, confidence, 0).sum(0) / count
    scale = np.sqrt((np.where(known, confidence - centre, 0) ** 2).sum(0) / count)
    return centre, np.where(scale > 1e-6, scale, 1.0)


def _with_ones(x: np.ndarray) -> np.ndarray:
    return np.column_stack([np.ones(len(x)), x]).astype(float)


def _costs(cascade: Cascade, held: Answered, guess: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, ...]:
    """Cost of every answer at every price of an error: alone, always asked first, by the cascade; who was asked first, and then
    deferred; the cost of always asking each expert.  -> (G, N) three times, (G, N) bool twice, (G, N, E)

    Unknown qualities are guessed, unknown prices expected, and known ones correct that by 1 / propensity: doubly robust.
    """
    place, rows = cascade.place, np.arange(len(held))
    quality = guess + np.where(held.mask, (held.quality - guess) / held.propensity, 0.0)
    price = held.expected + np.where(held.mask, (held.price - held.expected) / held.propensity, 0.0)
    single, alone, always, cascaded, asked, deferred = [], [], [], [], [], []
    for error in errors:
        cost = 1 - quality + price / error
        usual, action, asks = _choices(cascade, held, error)
        direct, other = cost[rows, usual], action != place
        through = cost[rows, action] + np.where(other, price[:, place] / error, 0.0)
        single.append(cost)
        alone.append(direct)
        always.append(through)
        cascaded.append(np.where(asks, through, direct))
        asked.append(asks)
        deferred.append(asks & other)
    stacked = (np.stack(part) for part in (alone, always, cascaded, asked, deferred))
    return (*stacked, np.stack(single))


def _choices(cascade: Cascade, held: Answered, error: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whom the router asks alone, whom the cascade after the first answer, and whether it asks for that.  -> (N,) each"""
    order = np.argsort(held.expected.mean(0), kind="stable")
    expected = 1 - held.estimate + held.expected / error
    action, _, _ = cascade.after(held.confidence, held.estimate, held.expected, error)
    first, going = cascade.before(held.estimate, held.expected, error)
    return order[expected[:, order].argmin(1)], action, first < going


def _taken(cascade: Cascade, held: Answered, guess: np.ndarray, error: float) -> np.ndarray:
    """Cost of every answer by a cascade, whose it is, 1 / propensity where its quality is known and else 0, and the guess of it.

    -> (4, N)
    """
    usual, action, asks = _choices(cascade, held, error)
    chosen, rows = np.where(asks, action, usual), np.arange(len(held))
    weight = np.where(held.mask[rows, chosen], 1 / held.propensity[rows, chosen], 0.0)
    return np.stack([_costs(cascade, held, guess, np.array([error]))[2][0], chosen, weight, guess[rows, chosen]])


def _judged(
    errors: np.ndarray,
    query: np.ndarray,
    alone: np.ndarray,
    always: np.ndarray,
    cascaded: np.ndarray,
    asked: np.ndarray,
    deferred: np.ndarray,
    single: np.ndarray,
) -> Paid:
    """The verdict.  Intervals are over queries: answers to the same one are no news to each other."""
    counts = np.bincount(query)
    best = single.mean(1).argmin(1)
    columns = []
    for place in range(len(errors)):
        rivals = (alone[place], single[place, :, best[place]])
        gains = [mean_and_half(np.bincount(query, rival - cascaded[place]) / counts, _Z) for rival in rivals]
        columns.append(min(gains, key=lambda gain: gain[0] - gain[1]))
    gain, half = np.array(columns).T
    queries_asked = np.array([len(np.unique(query[one])) for one in asked])
    half = np.where(queries_asked < _FEWEST_QUERIES, np.inf, half)
    return Paid(
        errors=np.asarray(errors, float),
        alone=alone.mean(1),
        single=single.mean(1).min(1),
        always=always.mean(1),
        cascaded=cascaded.mean(1),
        gain=gain,
        half_width=half,
        asked=asked.mean(1),
        deferred=deferred.mean(1),
    )


def _nothing(errors: np.ndarray) -> Paid:
    return Paid(errors, *(np.full(len(errors), np.nan) for _ in range(8)))
