"""LLMRouter's table with a quarter of its cells observed, under a logging policy that is known.  A table of `benchmarks.routing`.

The first three of the five test folds, and of the router's estimators those that are no networks: a fit for every line and fold.

`random`: every cell is observed with probability 1/4.  `biased`: on average as many, but the harder the task (by the mean quality
of all experts on it), the more of them are answers of dear experts: probability (1 + 0.9 a b) / 4, with a from -1 for the easiest
task to 1 for the hardest and b from -1 for the cheapest expert to 1 for the dearest.  `naive` is a fit of the same log that takes
it for one where who was asked did not depend on the query, as if no propensity had been logged.  Which cells are observed is
one draw (seed 0): the intervals, over the test rows, do not hold what another would change.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks.routers.data import SEED, Data, llmrouter, random_folds
from benchmarks.routers.pricing import MIX, RESAMPLES, figure, priced_figures, settings
from deferral.intervals import bootstrap
from deferral.routing.evaluation import PriceQualityCurve, best_expert
from deferral.routing.policies import Clusters, Features, Linear, Neighbours
from deferral.routing.router import Router
from deferral.routing.table import Table

SHARE, BIAS, SOME = 0.25, 0.9, 3
QUICK = (Linear, Neighbours, Clusters, Features)


def chances(data: Data, *, biased: bool) -> np.ndarray:
    """The probability that a cell is observed.  -> (N, E)"""
    if not biased:
        return np.full(data.quality.shape, SHARE)
    names, member = np.unique(data.subject, return_inverse=True)
    hardness = -np.array([data.quality[member == number].mean() for number in range(len(names))])
    dearness = data.price.mean(0)
    a, b = (2 * np.argsort(np.argsort(values)) / (len(values) - 1) - 1 for values in (hardness, dearness))
    return SHARE * (1 + BIAS * a[member][:, None] * b)


def observed_part(data: Data, train: np.ndarray, chance: np.ndarray, *, logged: bool) -> Table:
    """The training rows as a log that observed every cell with its probability; rows without an answer are no part of it."""
    mask = np.random.default_rng(SEED).random(chance.shape)[train] < chance[train]
    kept = train[mask.any(1)]
    whole, mask = data.table(kept), mask[mask.any(1)]
    propensity = np.where(mask & logged, chance[kept], np.nan).astype(np.float32)
    hidden = [np.where(mask, values, 0) for values in (whole.quality, whole.price)]
    return Table(whole.queries, whole.experts, hidden[0], hidden[1], mask, whole.latency, propensity)


def _decided(
    data: Data, fold: np.ndarray, errors: np.ndarray, kind: tuple[np.ndarray, bool] | None, number: int
) -> tuple[np.ndarray, float, np.ndarray]:
    """Whom the router asks on a test fold at every price of an error, its fallbacks, and the mix.  -> (S, n), (), (S,)"""
    torch.set_num_threads(1)
    train, test = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
    queries = [data.queries[row] for row in test]
    with threadpool_limits(1):
        table = data.table(train) if kind is None else observed_part(data, train, kind[0], logged=kind[1])
        router = Router(1.0, policies=QUICK, seed=SEED).fit(table)
        estimated = router.fitted.estimate(router.encoder(queries))
    asked, fell, mix = np.empty((len(errors), len(test)), int), 0.0, np.empty(len(errors), int)
    for place, error in enumerate(errors):
        decisions = router.decide_estimated(router.plan(price_of_error=float(error)), estimated, queries)
        asked[place] = decisions.actions
        fell += decisions.fallback.sum()
        mix[place] = router.plan(price_of_error=float(error), learned=False).mix.argmax()
    return asked, fell, mix


def partial_logs(folder: Path) -> Iterator[dict]:
    """AIQ of the router as it comes, its gain over the static mix of the full table, and the share of the full table's gain."""
    data = llmrouter(folder)
    fold, errors = random_folds(len(data.queries)), settings(data.price)
    judged = np.flatnonzero(fold < SOME)
    kinds = {
        "full": None,
        "random": (chances(data, biased=False), True),
        "biased": (chances(data, biased=True), True),
        "biased, naive": (chances(data, biased=True), False),
    }
    actions = {name: np.zeros((len(errors), len(fold)), int) for name in (MIX, *kinds)}
    fallback = dict.fromkeys(kinds, 0.0)
    jobs = [(name, number) for number in range(SOME) for name in kinds]
    # A process each: most of a fit of a partial log is in one thread.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as processes:
        done = processes.map(_decided, *zip(*((data, fold, errors, kinds[name], number) for name, number in jobs), strict=True))
        for (name, number), (decided, fell, mix) in zip(jobs, done, strict=True):
            test = np.flatnonzero(fold == number)
            actions[name][:, test] = decided
            fallback[name] += fell / len(judged) / len(errors)
            if kinds[name] is None:
                actions[MIX][:, test] = mix[:, None]
    tested = data.rows(judged)
    rows, best = np.arange(len(judged)), best_expert(tested.quality, tested.price)
    figures = {
        name: priced_figures(
            PriceQualityCurve(tested.price[rows, one[:, judged]], tested.quality[rows, one[:, judged]]), tested, best
        )
        for name, one in actions.items()
    }
    resampled = {name: bootstrap(of, len(rows), resamples=RESAMPLES, seed=SEED)[:, 0] for name, of in figures.items()}
    ones = torch.ones(1, len(rows), dtype=torch.float64)
    found = {name: float(of(ones)[0, 0]) for name, of in figures.items()}
    whole = found["full"] - found[MIX]
    for name in actions:
        gain, gains = found[name] - found[MIX], resampled[name] - resampled[MIX]
        naive = f"{name}, naive"
        yield {
            "method": name,
            **figure("AIQ", found[name], resampled[name]),
            **figure("over_static", gain, gains),
            **figure("share_of_full_gain", gain / whole, gains / (resampled["full"] - resampled[MIX])),
            **(figure("over_naive", found[name] - found[naive], resampled[name] - resampled[naive]) if naive in found else {}),
            **({"fallback": fallback[name]} if name in fallback else {}),
        }
