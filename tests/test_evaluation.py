"""The figures of `deferral evaluate`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deferral import cli, decide, error_costs, oracle, pick
from deferral.curves import aurc
from deferral.evaluation.comparison import GRID
from deferral.evaluation.evaluate import evaluate
from deferral.evaluation.outputs import read_outputs
from deferral.evaluation.report import save_evaluation, show_evaluation
from tests.method_outputs import PRICES, ROWS, columns, write


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_figures_are_those_of_the_library(tmp_path: Path, suffix: str, missing: float) -> None:
    path = write(tmp_path / f"ours{suffix}", columns(missing=missing))
    evaluation = evaluate([path], prices=PRICES)
    outputs = read_outputs(path)
    costs, mask = error_costs(outputs.answers, outputs.targets, price=[0, 0.1, 0.2], ceiling=1.2, missing=-1)
    assert outputs.scores is not None
    assert torch.equal(outputs.actions, decide(outputs.scores, mask=mask))
    figures = evaluation.comparison.figures
    assert figures["ours"].cost.estimate == pytest.approx(float(pick(costs, outputs.actions).double().mean()))
    assert figures["oracle"].cost.estimate == pytest.approx(float(pick(costs, oracle(costs, mask=mask)).double().mean()))
    bob = f"always Bob, only its {int(mask[:, 2].sum())} rows" if missing else "always Bob"
    assert figures[bob].cost.estimate == pytest.approx(float(costs[mask[:, 2], 2].double().mean()))
    assert figures["never deferring"].coverage.estimate == 1
    best = outputs.scores[:, 1:].amax(-1)
    areas = evaluation.areas["ours"]
    assert 0 <= areas["excess system AURC"].estimate < areas["system AURC"].estimate
    expected = aurc(outputs.scores[:, 0] - best, costs[:, 0])
    assert evaluation.areas["ours"]["AURC"].estimate == pytest.approx(float(expected))


def test_two_methods_are_paired_and_thresholds_are_fitted_on_other_rows(tmp_path: Path) -> None:
    one, other = (write(tmp_path / f"{name}.csv", columns(seed)) for seed, name in enumerate(("one", "other")))
    evaluation = evaluate([one, other], calibration_share=0.5)
    comparison = evaluation.comparison
    assert comparison.reference == "one, threshold fitted"
    assert len(comparison.targets) == ROWS // 2
    # 0.29 * 100 is a little less than 29.
    hundred = {name: cells[:100] for name, cells in columns().items()}
    assert len(evaluate([write(tmp_path / "hundred.csv", hundred)], calibration_share=0.29).comparison.targets) == 71
    assert {"other", "other, threshold fitted", "always Ann", "oracle"} <= set(comparison.figures)
    assert comparison["one"].curve is comparison["other"].curve is None
    assert evaluation.cost.keys() == {"one, threshold fitted", "other, threshold fitted"}
    for name, (low, high) in evaluation.cost.items():
        curve = comparison[name].curve
        assert curve is not None
        assert ((low <= curve.at(GRID)) & (curve.at(GRID) <= high)).all()
    with pytest.raises(KeyError, match="no method is called 'three'"):
        comparison["three"]
    again = evaluate([one, other], calibration_share=0.5).comparison
    assert again.figures == comparison.figures
    assert evaluate([one, other], calibration_share=0.5, seed=1).comparison.figures != comparison.figures


def test_baselines_appear_where_the_file_has_probabilities(tmp_path: Path) -> None:
    table = columns(missing=0.3) | {
        "probability": torch.rand(ROWS).tolist(),
        "probability_Ann": [0.7] * ROWS,
        "probability_Bob": [0.9] * ROWS,
    }
    evaluation = evaluate([write(tmp_path / "ours.csv", table)], prices=PRICES, calibration_share=0.4)
    assert {"compare-confidence", "selective prediction", "post-hoc deferral"} <= set(evaluation.comparison.figures)
    assert set(evaluation.calibration) == {"the model", "Ann", "Bob"}
    share_right = evaluation.probabilities["Ann"][1].mean()
    assert evaluation.calibration["Ann"]["ECE"].estimate == pytest.approx(abs(float(share_right) - 0.7))
    # Bob is the surest, and is not asked where he gave no answer.
    methods = evaluate([tmp_path / "ours.csv"], prices=PRICES).comparison.methods
    (surest,) = [method for method in methods if method.name == "compare-confidence"]
    assert surest.load[:, 1].any()
    assert not surest.cost.isnan().any()


def test_scores_moved_or_scaled_together_have_the_same_areas(tmp_path: Path) -> None:
    """1.8 - 1.7, 0.8 - 0.7 and 80 - 70 differ by rounding alone: ties, in every area and curve."""
    table = columns() | {
        name: [place % 7 / 10 for place in range(step, ROWS + step)] for name, step in (("score", 0), ("score_Ann", 3))
    }
    moves = {"plain": lambda score: score, "moved": lambda score: score + 1, "scaled": lambda score: 100 * score}
    areas = []
    for name, move in moves.items():
        moved = {
            key: list(map(move, cells)) if key in ("score", "score_Ann", "score_Bob") else cells for key, cells in table.items()
        }
        evaluation = evaluate([write(tmp_path / f"{name}.csv", moved | {"score_Bob": [-100.0] * ROWS})])
        areas.append({figure: interval.estimate for figure, interval in evaluation.areas[name].items()})
    assert areas[1] == pytest.approx(areas[0])
    assert areas[2] == pytest.approx(areas[0])


def test_differences_are_over_the_rows_that_both_have(tmp_path: Path) -> None:
    """The own answer is wrong on the first half; B answers only those, and is right on half of them."""
    experts = (["a", "b"] * 25) + [None] * 50
    table = {"target": ["a"] * 100, "answer": ["b"] * 50 + ["a"] * 50, "answer_B": experts, "action": ["own"] * 100}
    figures = evaluate([write(tmp_path / "ours.csv", table)]).comparison.figures
    assert "always B" not in figures
    assert figures["always B, only its 50 rows"].difference.estimate == pytest.approx(0.5)
    assert figures["always B, only its 50 rows"].difference.low > 0.3


def test_an_expert_who_never_answers_has_no_row(tmp_path: Path) -> None:
    table = columns() | {"answer_Bob": [None] * ROWS, "score_Bob": [None] * ROWS}
    cli.main(["evaluate", str(write(tmp_path / "ours.csv", table)), "--calibrate", "0.5", "--out", str(tmp_path / "out")])
    assert "always Bob" not in json.loads((tmp_path / "out/ours.json").read_text(encoding="utf-8"))["methods"]


def test_a_file_of_selective_prediction_needs_a_score_only(tmp_path: Path) -> None:
    table = {"target": ["a", "b", "a", "b"], "answer": ["a", "b", "b", "b"], "score": [0.9, 0.8, 0.1, 0.7]}
    evaluation = evaluate([write(tmp_path / "ours.csv", table)])
    assert evaluation.areas["ours"]["AURC"].estimate == pytest.approx(1 / 16)
    assert evaluation.areas["ours"]["excess AURC"].estimate == pytest.approx(0)


def test_who_answered_a_row_says_nothing_of_how_sure_the_model_is(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    score = generator.random(300)
    table = {
        "target": ["a"] * 300, "answer": np.where(generator.random(300) < score, "a", "b").tolist(),
        "answer_Ann": ["a"] * 300, "score": score.tolist(), "score_Ann": [0.8] * 300,
    }  # fmt: skip
    some = table | {"answer_Ann": ["a" if known else "" for known in generator.random(300) < 0.7]}
    alone = {name: cells for name, cells in table.items() if not name.endswith("Ann")}
    areas = [evaluate([write(tmp_path / "ours.csv", each)]).areas["ours"] for each in (table, some, alone)]
    for name in ("AURC", "excess AURC", "AUGRC"):
        assert len({each[name].estimate for each in areas}) == 1, name
    assert areas[0]["system AURC"].estimate < areas[1]["system AURC"].estimate


def test_abstaining_costs_what_it_is_said_to_cost(tmp_path: Path) -> None:
    table = {"target": ["a", "b"], "answer": ["a", "a"], "action": ["own", "abstain"]}
    path = write(tmp_path / "ours.csv", table)
    outputs, comparison = read_outputs(path), evaluate([path], abstain_cost=0.25).comparison
    assert outputs.answers.tolist() == [[0, -1], [0, -1]], "abstaining answers nothing"
    assert outputs.mask.tolist() == [[True, True], [True, True]]
    assert comparison["ours"].correct.isnan().tolist() == [False, True]
    figures = comparison.figures["ours"]
    assert figures.cost.estimate == pytest.approx(0.125)
    assert figures.accuracy is not None
    assert figures.accuracy.estimate == 1


def test_who_may_abstain_does_where_everybody_is_expected_to_cost_more(tmp_path: Path) -> None:
    table = {
        "target": ["a", "b", "a"], "answer": ["a", "a", "a"], "answer_A": ["b", "b", "a"], "action": ["own", "A", "abstain"],
        "probability": [0.9, 0.4, 0.4], "probability_A": [0.9, 0.99, 0.6],
    }  # fmt: skip
    path = write(tmp_path / "ours.csv", table)
    assert read_outputs(path).answers.tolist() == [[0, 1, -1], [0, 1, -1], [0, 0, -1]]
    comparison = evaluate([path], prices={"A": 0.1}, abstain_cost=0.2).comparison
    expected = torch.tensor([[0.1, 0.2, 0.2], [0.6, 0.11, 0.2], [0.6, 0.5, 0.2]])
    assert torch.equal(comparison["compare-confidence"].actions, expected.argmin(-1))
    assert comparison.figures["always abstaining"].cost.estimate == pytest.approx(0.2)


def test_regression_is_judged_by_squared_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = {"target": [1.0, 2.0], "answer": [1.5, 2.0], "answer_A": [1.0, None], "score": [0, 1], "score_A": [1, None]}
    evaluation = evaluate([write(tmp_path / "ours.csv", table)], prices={"A": 0.1}, regression=True)
    figures = evaluation.comparison.figures
    assert figures["ours"].cost.estimate == pytest.approx(0.05)
    assert figures["ours"].accuracy is None
    show_evaluation(evaluation)
    printed = capsys.readouterr().out
    assert "in squared errors" in printed
    assert "there is no accuracy" in printed
    assert "of one error" not in printed


def test_the_level_is_that_of_all_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = columns() | {"probability": [0.1 + 0.8 * (row % 7) / 6 for row in range(ROWS)]}
    path = write(tmp_path / "ours.csv", table)
    wide, usual = (evaluate([path], prices=PRICES, level=level) for level in (0.99, 0.95))
    assert usual.comparison.figures == evaluate([path], prices=PRICES).comparison.figures
    both = wide.comparison.figures, usual.comparison.figures
    pairs = [tuple(figures[name].cost for figures in both) for name in both[0]]
    pairs.append(tuple(figures["oracle"].difference for figures in both))
    pairs += [tuple(each.areas["ours"][name] for each in (wide, usual)) for name in usual.areas["ours"]]
    pairs += [
        tuple(each.calibration["the model"][name] for each in (wide, usual)) for name in ("Brier", "debiased squared error")
    ]
    for one, other in pairs:
        assert one.estimate == other.estimate
        assert one.low < other.low
        assert other.high < one.high
    for bands in ("risk", "cost"):
        (*_, one_low, one_high), (*_, low, high) = getattr(wide, bands)["ours"], getattr(usual, bands)["ours"]
        assert bool((one_low <= low).all() & (high <= one_high).all() & (one_high - one_low > high - low).any())
    assert json.loads(save_evaluation(wide, tmp_path).read_text(encoding="utf-8"))["settings"]["level"] == 0.99
    show_evaluation(wide)
    shown = capsys.readouterr().out
    assert "half the 99%" in shown
    assert "half the 99% interval" in " ".join(shown.split())
    assert "95%" not in shown
    with pytest.raises(ValueError, match="level: expected a number between 0 and 1, got 95"):
        evaluate([path], level=95)


def test_the_baselines_that_need_no_probability_learn_from_the_scores(tmp_path: Path) -> None:
    """The expert is right where a score says so: post-hoc deferral finds it, a constant cannot."""
    generator = torch.Generator().manual_seed(0)
    hint = torch.randn(400, generator=generator, dtype=torch.float64)
    table = {
        "target": ["a"] * 400,
        "answer": ["b" if right else "a" for right in (hint > 0).tolist()],
        "answer_A": ["a" if right else "b" for right in (hint > 0).tolist()],
        "score": torch.zeros(400).tolist(),
        "score_A": hint.tolist(),
    }
    figures = evaluate([write(tmp_path / "ours.csv", table)], calibration_share=0.5).comparison.figures
    assert figures["post-hoc deferral"].cost.estimate < 0.05
    assert figures["selective prediction"].cost.estimate > 0.3


def test_an_expert_as_dear_as_abstaining_ties_with_it(tmp_path: Path) -> None:
    table = {"target": ["a", "b"] * 20, "answer": ["b", "a"] * 20, "answer_A": ["a", "b"] * 20, "action": ["abstain"] * 40}
    figures = evaluate([write(tmp_path / "ours.csv", table)], prices={"A": 0.2}, abstain_cost=0.2).comparison.figures
    assert figures["always A"].cost == figures["ours"].cost
    assert not figures["always A"].difference.excludes_zero()


def test_calibration_has_the_intervals_it_can_have_and_the_file_is_json(tmp_path: Path) -> None:
    table = columns() | {"probability": torch.rand(ROWS, generator=torch.Generator().manual_seed(0)).tolist()}
    evaluation = evaluate([write(tmp_path / "ours.csv", table)])
    figures = evaluation.calibration["the model"]
    for name in ("debiased squared error", "Brier"):
        assert figures[name].low < figures[name].estimate < figures[name].high
    record = json.loads(save_evaluation(evaluation, tmp_path).read_text(), parse_constant=pytest.fail)
    assert record["calibration"]["the model"]["ECE"] == {"estimate": figures["ECE"].estimate, "low": None, "high": None}


def test_few_rows_are_said_to_be_few(tmp_path: Path) -> None:
    for rows, few in ((29, True), (30, False)):
        table = {"target": ["a"] * rows, "answer": ["a"] * rows, "action": ["own"] * rows}
        notes = evaluate([write(tmp_path / f"ours{rows}.csv", table)]).comparison.notes
        assert any("too short" in note for note in notes) is few
