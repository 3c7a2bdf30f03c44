"""Routers judged: what is the oracle's, what is chance, folds of subjects."""

from dataclasses import replace

import numpy as np
import pytest

from deferral.routing import Log, Outcome
from deferral.routing.judging import Held, evaluation, joined, query_folds, subjects, tag_folds
from deferral.routing.showing import show_evaluation
from tests.route_command import outcomes
from tests.routing_world import world


def decided(rows: int = 120) -> Held:
    """Decisions that are those of the oracle, beside random outcomes of two experts."""
    generator = np.random.default_rng(0)
    quality = (generator.random((rows, 2)) < [0.5, 0.8]).astype(float)
    price = np.tile([0.001, 0.01], (rows, 1))
    errors = np.geomspace(1e-4, 10, 12)
    perfect = np.stack([(quality - price / error).argmax(1) for error in errors])
    static = np.stack([np.full(rows, (quality.mean(0) - price.mean(0) / error).argmax()) for error in errors])
    return Held(["a", "b"], quality, price, errors, perfect, perfect, static, perfect < 0, quality[:, 1] - quality[:, 0])


def test_a_router_that_knows_all_is_the_oracle_in_every_figure() -> None:
    found = evaluation(decided(), resamples=100)
    assert found.best == "b"
    assert found.figures["learned, without fallback"]["APGR"] == found.figures["oracle"]["APGR"]
    assert found.figures["random"]["APGR"].estimate == pytest.approx(0.5)
    assert found.figures["random"]["CPT(80)"].estimate == pytest.approx(0.8)
    for name in ("AIQ", "saving at 95%"):
        assert found.figures["routed"][name].estimate == pytest.approx(found.figures["oracle"][name].estimate, abs=0.02)
    assert found.over_static["static mix of the fit"].estimate == 0
    assert found.over_static["routed"].low > 0
    assert found.figures["always a"]["price"].estimate == pytest.approx(0.001)
    assert set(found.hulls) == set(found.curves)
    twice = joined([decided(), decided()])
    assert twice.routed.shape == (12, 240)
    assert evaluation(twice, resamples=100).figures["routed"]["AIQ"].estimate == found.figures["routed"]["AIQ"].estimate


def test_folds_whose_routers_differ_in_their_means_are_not_ranked_by_these() -> None:
    rows = decided()
    # Of two folds that know nothing, each router takes the other fold for its own.
    gain = rows.quality[:, 1] - rows.quality[:, 0]
    better = np.argsort(gain, kind="stable")[60:]
    parts = [np.sort(better), np.setdiff1d(np.arange(120), better)]
    shares = [gain[part].mean() for part in parts]
    assert shares[0] > shares[1] + 0.5
    halves = [
        replace(decided(), quality=rows.quality[part], price=rows.price[part], margin=np.full(60, other))
        for part, other in zip(parts, reversed(shares), strict=True)
    ]
    halves = [
        replace(half, **{n: getattr(rows, n)[:, :60] for n in ("routed", "learned", "static", "fallback")}) for half in halves
    ]
    found = evaluation(joined(halves), resamples=20).figures["learned, without fallback"]
    assert found["APGR"].estimate == pytest.approx(0.5)


def test_a_saving_at_a_quality_that_many_samples_do_not_reach_is_no_proof() -> None:
    # Asking b for 10 of 200 queries is as good here as always asking b, and worse in four samples out of ten.
    quality = np.ones((200, 2))
    quality[:10, 1] = quality[10:30, 0] = 0.0
    price, asked = np.tile([[0.001, 0.02]], (200, 1)), np.zeros((1, 200), int)
    asked[0, 20:30] = 1
    rows = Held(["a", "b"], quality, price, np.ones(1), asked, asked, asked, asked < 0, np.zeros(200))
    saved = evaluation(rows, resamples=200).figures["routed"]["saving at 100%"]
    assert saved.estimate == pytest.approx(1 - (190 * 0.001 + 10 * 0.02) / 200 / 0.02)
    assert saved.low == -np.inf
    assert 0.9 < saved.high < 0.95


def test_a_quality_that_is_never_reached_is_said_to_be(capsys: pytest.CaptureFixture) -> None:
    quality = np.tile([[0.0, 1.0]], (20, 1))
    asked = np.zeros((1, 20), int)
    for dear, said in ((0.02, "never reached"), (0.0, "nothing to save")):
        price = np.tile([[0.0, dear]], (20, 1))
        rows = Held(["a", "b"], quality, price, np.ones(1), asked, asked, asked, asked < 0, np.zeros(20))
        show_evaluation(evaluation(rows, resamples=20))
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("routed"))
        assert line.count(said) == 3
        assert "nan" not in line.split(said)[1]


def test_folds_of_subjects_are_whole_and_need_tags() -> None:
    log = outcomes(90, 0)
    table = log.table()
    fold = tag_folds(log, table, 3)
    subject = world(90, seed=0)[1]
    assert len({(int(a), int(b)) for a, b in zip(subject, fold, strict=True)}) == 3
    with pytest.raises(ValueError, match=r"at least 4 subjects.*ask for fewer folds"):
        tag_folds(log, table, 4)
    alone = Log([Outcome("one", "a", 1.0, 0.1, tags="s"), Outcome("two", "a", 1.0, 0.1, tags="s")])
    with pytest.raises(ValueError, match=r"at least 2 subjects.*got 1: s; judge by folds of queries instead"):
        tag_folds(alone, alone.table())
    log.append(Outcome("no tag", "small", 1.0, 0.0))
    with pytest.raises(ValueError, match="1 queries have no tag"):
        tag_folds(log, log.table(), 3)
    late = Log(
        [Outcome("one", "a", 1.0, 0.1), Outcome("one", "b", 1.0, 0.1, tags=("s",)), Outcome("two", "a", 1.0, 0.1, tags=("t",))]
    )
    assert subjects(late, late.table())[0] == ["s", "t"]
    assert np.bincount(query_folds(table, 4)).tolist() == [23, 23, 22, 22]
    with pytest.raises(ValueError, match="at least 100 queries"):
        query_folds(table, 100)


def test_of_two_experts_the_better_may_be_the_cheaper() -> None:
    quality = np.random.default_rng(0).integers(0, 2, (200, 2)).astype(float)
    quality[:150, 0] = 1.0
    price, errors = np.tile([[0.001, 0.02]], (200, 1)), np.array([1.0])
    nobody, first = np.zeros((1, 200), bool), np.zeros((1, 200), int)
    rows = Held(["a", "b"], quality, price, errors, first, first, first, nobody, quality[:, 1] - quality[:, 0])
    found = evaluation(rows, resamples=20).figures
    assert found["learned, without fallback"]["APGR"].estimate == pytest.approx(found["oracle"]["APGR"].estimate)
    assert found["oracle"]["APGR"].estimate > found["random"]["APGR"].estimate
