"""On real outcomes of language models."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deferral.routing import Router
from deferral.routing.evaluation import aiq, apgr, curve, static_curve, trade_offs
from deferral.routing.policies import Clusters, Linear, Neighbours

QUICK = (Linear, Neighbours, Clusters)


@pytest.fixture(scope="module")
def folder(data_root: Path) -> Path:
    if not (data_root / "llm").is_dir():
        pytest.skip("real data: expected the folder llm/ in DEFERRAL_DATA")
    return data_root / "llm"


@pytest.mark.ci_slow
def test_no_outcome_of_a_test_query_reaches_what_is_said_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    routing = pytest.importorskip("benchmarks.routing")
    monkeypatch.setattr(routing, "POLICIES", QUICK)
    monkeypatch.setattr(routing, "OTHERS", {})
    # A few settings of the trade-off will do.
    monkeypatch.setattr("benchmarks.routers.pricing.trade_offs", lambda price: trade_offs(price)[::40])
    data = routing.routerbench(folder)
    some = np.random.default_rng(0).permutation(len(data.queries))[:150]
    queries = [data.queries[row] for row in some]
    small = replace(data, queries=queries, quality=data.quality[some], price=data.price[some], subject=data.subject[some])
    fold = routing.random_folds(150)
    monkeypatch.setattr(routing, "FOLDS", 1)  # the first fold alone
    turned = np.where(fold[:, None] == 0, 1 - small.quality, small.quality)
    one, other = routing.predicted(small, fold), routing.predicted(replace(small, quality=turned), fold)
    rows = fold == 0
    for name, estimate in one.estimates.items():
        np.testing.assert_array_equal(estimate[rows], other.estimates[name][rows], err_msg=name)
    np.testing.assert_array_equal(one.routed[:, rows], other.routed[:, rows])
    np.testing.assert_array_equal(one.fallback[:, rows], other.fallback[:, rows])
    # And what is said does depend on the outcomes that may be seen.
    turned = np.where(fold[:, None] != 0, 1 - small.quality, small.quality)
    assert (
        routing.predicted(replace(small, quality=turned), fold).estimates["linear"][rows] != one.estimates["linear"][rows]
    ).any()


@pytest.mark.slow
def test_a_router_of_real_outcomes_beats_the_static_mix(folder: Path) -> None:
    routing = pytest.importorskip("benchmarks.routing")
    data = routing.llmrouter(folder)
    test = routing.random_folds(len(data.queries)) == 0
    router = Router(0.01, policies=QUICK).fit(data.table(np.flatnonzero(~test)))
    queries = [data.queries[row] for row in np.flatnonzero(test)]
    estimate = router.fitted.estimate(router.encoder(queries))[0].astype(float)
    price, quality = data.price[test], data.quality[test]
    low, high = price.mean(0).min(), price.mean(0).max()
    routed, static = curve(estimate, price, quality).points(), static_curve(price, quality).points()
    assert aiq(routed, low, high) > aiq(static, low, high) + 0.02


@pytest.mark.slow
def test_two_models_are_told_apart_on_real_questions(folder: Path) -> None:
    routing = pytest.importorskip("benchmarks.routing")
    data = routing.routellm(folder)
    some = np.random.default_rng(0).permutation(len(data.queries))[:2500]
    train, test = some[:1500], some[1500:]
    router = Router(1.0, policies=(Linear,)).fit(data.table(train))
    estimate = router.fitted.estimate(router.encoder([data.queries[row] for row in test]))[0].astype(float)
    gain = data.quality[test, 1] - data.quality[test, 0]
    assert apgr(estimate[:, 1] - estimate[:, 0], gain) > 0.55
