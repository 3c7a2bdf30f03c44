"""`deferral evaluate`: files of any tool in, figures out; every bad file is named by row and column."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from deferral import cli, decide, error_costs, oracle, pick
from deferral.curves import aurc
from deferral.datasets import DataError
from deferral.evaluation.comparison import GRID
from deferral.evaluation.evaluate import evaluate
from deferral.evaluation.outputs import read_outputs
from deferral.evaluation.pictures import draw_evaluation
from deferral.evaluation.report import save_evaluation, show_evaluation

ROWS = 120
PRICES = {"Ann": 0.1, "Bob": 0.2}


def columns(seed: int = 0, missing: float = 0.0) -> dict[str, list]:
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randint(0, 3, (ROWS, 4), generator=torch.Generator().manual_seed(7)).tolist()
    scores = torch.randn(ROWS, 4, generator=generator, dtype=torch.float64).tolist()
    absent = (torch.rand(ROWS, generator=torch.Generator().manual_seed(8)) < missing).tolist()
    names = ["cat", "dog", "eel"]
    return {
        "target": [names[row[0]] for row in answers],
        "answer": [names[row[1]] for row in answers],
        "answer_Ann": [names[row[2]] for row in answers],
        "answer_Bob": [None if gone else names[row[3]] for row, gone in zip(answers, absent, strict=True)],
        "score": [row[0] for row in scores],
        "score_Ann": [row[1] for row in scores],
        "score_Bob": [None if gone else row[2] for row, gone in zip(scores, absent, strict=True)],
    }


def write(path: Path, table: dict[str, list]) -> Path:
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.table(table), path)
    else:
        rows = zip(*table.values(), strict=True)
        lines = [",".join(table), *(",".join("" if cell is None else str(cell) for cell in row) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


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


def test_labels_that_a_missing_answer_made_into_decimals_are_the_same_labels(tmp_path: Path) -> None:
    table = {"target": [0, 1, 2, 1], "answer": [0, 1, 1, 1], "answer_A": ["0.0", "", "2.0", "1.0"], "action": ["own"] * 4}
    outputs = read_outputs(write(tmp_path / "ours.csv", table))
    assert outputs.labels == ["0", "1", "2"]
    assert outputs.answers.tolist() == [[0, 0], [1, -1], [1, 2], [1, 1]]


def test_labels_are_taken_as_they_are_written(tmp_path: Path) -> None:
    table = {"target": ["1_12", "01", "9007199254740993"], "answer": ["11_2", "1", "9007199254740992"], "action": ["own"] * 3}
    evaluation = evaluate([write(tmp_path / "ours.csv", table)])
    assert evaluation.comparison.figures["ours"].cost.estimate == 1
    large = {"target": [2**60 + 1], "answer": [2**60], "action": ["own"]}
    assert evaluate([write(tmp_path / "large.parquet", large)]).comparison.figures["large"].cost.estimate == 1
    one, other = ({"target": [label, "3"], "answer": ["3", "3"], "action": ["own"] * 2} for label in ("1000001", "1000002"))
    with pytest.raises(DataError, match="the targets differ"):
        evaluate([write(tmp_path / "one.csv", one), write(tmp_path / "other.csv", other)])


@pytest.mark.parametrize("large", [10_000_000_000, 123_456_789_012, 2**53 - 1])
def test_whole_numbers_in_a_floating_column_are_the_labels_of_an_integer_column(tmp_path: Path, large: int) -> None:
    table = {"target": [large, 7, 0], "answer": [float(large), 7.0, -0.0], "answer_A": [large, None, 1.5], "action": ["own"] * 3}
    path = write(tmp_path / "ours.parquet", table)
    assert evaluate([path]).comparison.figures["ours"].cost.estimate == 0
    assert read_outputs(path).labels == ["0", "1.5", "7", str(large)]
    frame = pd.DataFrame(table | {"answer": pd.Categorical([float(large), 7.0, 7.0])})
    frame.to_parquet(tmp_path / "frame.parquet")
    assert read_outputs(tmp_path / "frame.parquet").labels == ["0", "1.5", "7", str(large)]


@pytest.mark.parametrize(("kind", "label"), [(pa.float64(), 2.0**53), (pa.float64(), -1e18), (pa.float32(), 2.0**24)])
def test_a_label_that_a_floating_column_may_have_rounded_is_refused(tmp_path: Path, kind: pa.DataType, label: float) -> None:
    table = {"target": pa.array([1, 2]), "answer": pa.array([1.0, label], kind), "score": pa.array([1e300, 0.0])}
    with pytest.raises(DataError, match=r"row 2, column 'answer': expected a label below 2\^(53|24)"):
        evaluate([write(tmp_path / "ours.parquet", table)])
    table["answer"] = pa.array([1.0, 2.0], kind)
    scores = read_outputs(write(tmp_path / "ours.parquet", table)).scores
    assert scores is not None
    assert scores[:, 0].tolist() == [1e300, 0.0]


def test_a_line_break_between_quotes_is_one(tmp_path: Path) -> None:
    path = tmp_path / "ours.csv"
    path.write_text('target,answer,"answer_Ann\nLee",action\n"a\nb",a,"a\nb","Ann\nLee"\n' + "a,a,a,own\n" * 20)
    outputs = read_outputs(path)
    assert outputs.experts == ["Ann\nLee"]
    assert outputs.labels == ["a", "a\nb"]
    evaluation = evaluate([path])
    assert evaluation.comparison.figures["ours"].cost.estimate == 0
    show_evaluation(evaluation)


def test_an_expert_gives_one_answer_to_a_row(tmp_path: Path) -> None:
    text = "target,answer,answer_A,answer_B,score,score_A,score_B\na,a,b,a,1,0,0\nb,a,b,c,1,0,0\na,a,,a,1,0,0\n"
    one, two, three = (tmp_path / f"{name}.csv" for name in ("one", "two", "three"))
    one.write_text(text)
    two.write_text(text.replace("b,a,b,c,1,0,0", "b,b,b,,0,0,").replace("a,a,,a", "a,b,a,b"))
    with pytest.raises(DataError, match=r"two.csv: row 3, column 'answer_B': expected 'a' as in .*one.csv, got 'b'"):
        evaluate([one, two])
    two.write_text(text.replace("b,a,b,c,1,0,0", "b,b,b,,0,0,").replace("a,a,,a", "a,b,a,a"))
    assert len(evaluate([one, two]).comparison.targets) == 3
    three.write_text(text.replace("a,a,,a", "a,a,b,a"))
    with pytest.raises(DataError, match=r"three.csv: row 3, column 'answer_A': expected 'a' as in .*two.csv, got 'b'"):
        evaluate([one, two, three])
    numbers = "target,answer,answer_A,score,score_A\n1,1,2,0,0\n2,2,{},0,0\n"
    one.write_text(numbers.format("2"))
    two.write_text(numbers.format("2.5"))
    with pytest.raises(DataError, match=r"row 2, column 'answer_A': expected 2.0 as in .*one.csv, got 2.5"):
        evaluate([one, two], regression=True)


def test_nan_is_a_missing_answer_in_both_kinds_of_file(tmp_path: Path) -> None:
    table = {"target": [1.0, 2.0], "answer": [1.0, 1.0], "answer_A": [float("nan"), 2.0], "score": [0.0, 0.0], "score_A": [1, 1]}
    for suffix in (".csv", ".parquet"):
        outputs = read_outputs(write(tmp_path / f"ours{suffix}", table))
        assert outputs.labels == ["1", "2"]
        assert outputs.mask.tolist() == [[True, False], [True, True]]
        assert outputs.actions.tolist() == [0, 1]


def test_a_spreadsheets_file_is_read_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "OURS.CSV"
    path.write_bytes(b'\xef\xbb\xbftarget, answer ,score\r\n"a, b","a, b",1\r\nc,c,0.5\r\n\r\n')
    outputs = read_outputs(path)
    assert outputs.labels == ["a, b", "c"]
    assert outputs.targets.tolist() == outputs.answers[:, 0].tolist()


def test_the_index_that_pandas_writes_is_no_column_of_ours(tmp_path: Path) -> None:
    table = pd.DataFrame(columns())
    table.to_csv(tmp_path / "ours.csv")
    table[table["score"] > 0].to_parquet(tmp_path / "part.parquet")
    assert read_outputs(tmp_path / "ours.csv").experts == ["Ann", "Bob"]
    assert len(read_outputs(tmp_path / "part.parquet").targets) == (table["score"] > 0).sum()


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


def test_names_are_printed_and_drawn_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "_m$a^{$ [b]"
    table = {key.replace("Ann", "x/y [z]"): cells for key, cells in columns().items()} | {"probability_x/y [z]": [0.5] * ROWS}
    cli.main(["evaluate", str(write(tmp_path / f"{name}.csv", table)), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert name in printed
    assert "x/y [z]" in printed


def test_no_name_is_left_out_of_a_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr("deferral.evaluation.pictures.save_figure", lambda figure, path: figures.append(figure) or path)
    files = [write(tmp_path / f"{name}.csv", columns()) for name in ("_mine", "other")]
    draw_evaluation(evaluate(files), tmp_path)
    legends = [axes.get_legend() for figure in figures for axes in figure.axes if axes.get_legend()]
    named = [{text.get_text().strip() for text in legend.get_texts()} for legend in legends]
    assert any({"_mine", "other"} <= names for names in named)


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


@pytest.mark.parametrize("unit", [1e-4, 1e8])
def test_squared_errors_are_printed_with_their_digits_in_any_unit(
    unit: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {"target": [0.0] * 4, "answer": [3 * unit] * 4, "answer_A": [unit] * 4, "score": [0.0] * 4, "score_A": [1.0] * 4}
    show_evaluation(evaluate([write(tmp_path / "ours.csv", table)], regression=True))
    printed = capsys.readouterr().out
    for cost in (unit**2, 9 * unit**2):
        assert f"{cost:.4g} ±0" in printed
    assert f"{-8 * unit**2:.4g} [{-8 * unit**2:.4g}, {-8 * unit**2:.4g}]" in printed


def test_the_command_writes_figures_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "ours.csv", columns() | {"probability_Ann": [0.5] * ROWS})
    cli.main(["evaluate", str(path), "--price", "Ann=0.1", "--calibrate", "0.3", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "always Ann" in printed
    assert "AURC" in printed
    written = [Path(line.removeprefix("wrote ")) for line in printed.splitlines() if line.startswith("wrote ")]
    kinds = {"cost-coverage", "who-answers", "risk-coverage", "methods", "load", "reliability-Ann"}
    assert {path.stem.removeprefix("ours-") for path in written if path.suffix == ".png"} == kinds
    assert all(path.stat().st_size > 0 for path in written)
    record = json.loads((tmp_path / "out/ours.json").read_text(encoding="utf-8"))
    rows = pd.read_csv(tmp_path / "out/ours-rows.csv")
    assert set(rows["row"]) < set(range(1, ROWS + 1))
    assert set(rows["who"]) == {"own", "Ann", "Bob"}
    for name, of_method in rows.groupby("method"):
        assert of_method["cost"].mean() == pytest.approx(record["methods"][name]["cost"]["estimate"])
        assert of_method["correct"].mean() == pytest.approx(record["methods"][name]["accuracy"]["estimate"])
    always = rows[rows["method"] == "always Ann"].set_index("row")
    table = pd.DataFrame(columns(), index=range(1, ROWS + 1)).loc[always.index]
    assert (always["correct"] == (table["answer_Ann"] == table["target"])).all()
    assert record["areas"]["ours"]["AURC"]["low"] <= record["areas"]["ours"]["AURC"]["high"]


GOOD = "target,answer,answer_A,score,score_A\na,a,b,0.5,0.25\nb,a,b,0.5,0.75\n"
BAD = {
    "row 2, column 'score_A': expected a number, got 'high'": GOOD.replace("0.75", "high"),
    "row 1, column 'score': expected a finite number, got 'nan'": GOOD.replace("a,a,b,0.5", "a,a,b,nan"),
    "row 2, column 'answer': expected a label": GOOD.replace("b,a,b", "b,,b"),
    "row 2, column 'score_A': expected a score, since the expert answered": GOOD.replace("0.75", ""),
    "there is no column 'target'": GOOD.replace("target", "truth"),
    "there is no column 'score_A'": "target,answer,answer_A,score\na,a,b,0.5\n",
    "column 'score_B' is not one of": GOOD.replace("score_A", "score_B"),
    "column 'Answer' is not one of": GOOD.replace("a,a,b", "a,a,b,a").replace("b,a,b", "b,a,b,a").replace("A,", "A,Answer,", 1),
    "column 'abstain_score' is not one of action, answer, answer_A, probability, probability_A, score, score_A, score_abstain, "
    "target; did you mean 'score_abstain'?  Rename it": GOOD.replace("score_A", "score_A,abstain_score").replace("5\n", "5,0\n"),
    "column 'actions' is not one of action, answer, probability, score, score_abstain, target; did you mean 'action'?": (
        "target,answer,score,actions\na,a,0.5,own\n"
    ),
    "column 'probabilities' is not one of": "target,answer,score,probabilities\na,a,0.5,0.9\n",
    "nothing says who answers": "target,answer,answer_A\na,a,b\n",
    "at least one row": "target,answer,score\n",
    "column 'answer' is there twice": "target,answer,answer,score\na,a,a,0.5\n",
    "row 1, column 'action': expected one of own, A, got 'C'": "target,answer,answer_A,action\na,a,b,C\n",
    "row 1, column 'action': expected someone who answered": "target,answer,answer_A,action\na,a,,A\n",
    "row 1, column 'probability': expected a probability": "target,answer,score,probability\na,a,0.5,1.5\n",
    "row 3: expected 5 cells, as in the header, got 2: 'a,b'": GOOD + "a,b\n",
    "row 2, column 'target': expected a label": GOOD.replace("\nb,", "\n\nb,"),
    "row 1, column 'score': expected a finite number, got '-inf'": GOOD.replace("a,a,b,0.5", "a,a,b,-inf"),
    "column 'answer': expected labels like those of the target (false, true), got 0, 1": (
        "target,answer,score\ntrue,1,1\nfalse,0,1\n"
    ),
    "column 'answer_A': expected labels like those of the target (cat, dog), got chat, chien": (
        "target,answer,answer_A,score,score_A\n" + "cat,cat,chat,0,1\ndog,cat,chien,0,1\n" * 5
    ),
    "row 2, column 'answer_A': expected 'cat', as the target spells it (the answer would count as wrong), got 'Cat'": (
        "target,answer,answer_A,score,score_A\n" + "dog,cat,dog,0,1\ncat,cat,Cat,0,1\n" * 5
    ),
    "separate the cells by commas": "target;answer;score\na;a;1\n",
    "two methods would be called 'oracle'": "",
    "an expert cannot be called ''": "target,answer,answer_,action\na,a,b,own\n",
    "row 2, column 'answer_A': expected text without the character NUL, got 'b\\x00'": GOOD.replace("b,a,b", "b,a,b\0"),
    "cannot be called 'own'": "target,answer,answer_own,score\na,a,b,0.5\n",
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_file_is_named_by_row_and_column(tmp_path: Path, message: str) -> None:
    path = tmp_path / ("oracle.csv" if "oracle" in message else "bad.csv")
    path.write_text(BAD[message] or GOOD, encoding="utf-8")
    with pytest.raises(DataError) as error:
        evaluate([path])
    assert message in str(error.value)
    assert "oracle" in message or str(path) in str(error.value)


def test_other_columns_are_not_read_and_a_note_says_so(tmp_path: Path) -> None:
    table = columns()
    plain = evaluate([write(tmp_path / "ours.csv", table)], prices=PRICES)
    more = {"id": list(range(ROWS)), "text": ["a, b"] * ROWS, "price_Ann": [0.1] * ROWS} | table
    many = write(tmp_path / "theirs.parquet", table | {f"x{number}": [0.0] * ROWS for number in range(7)})
    extended = tmp_path / "ours.parquet"
    evaluation = evaluate([write(extended, more), many], prices=PRICES)
    assert evaluation.comparison.notes == [
        "ours.parquet: columns that are not read: id, text, price_Ann.",
        "theirs.parquet: columns that are not read: x0, x1, x2, x3, x4, 2 more.",
    ]
    assert evaluation.comparison.figures["ours"] == plain.comparison.figures["ours"]
    assert plain.comparison.notes == []


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


def test_files_and_options_that_do_not_fit_together(tmp_path: Path) -> None:
    path, longer = tmp_path / "one.csv", tmp_path / "longer.csv"
    path.write_text(GOOD, encoding="utf-8")
    longer.write_text(GOOD + "a,a,a,0,0\n", encoding="utf-8")
    other = tmp_path / "other.csv"
    other.write_text(GOOD.replace("b,a,b", "a,a,b"), encoding="utf-8")
    with pytest.raises(DataError, match="3 rows instead of 2"):
        evaluate([path, longer])
    with pytest.raises(DataError, match="the targets differ"):
        evaluate([path, other])
    with pytest.raises(DataError, match="different names"):
        evaluate([path, path])
    one, two = tmp_path / "keeps.csv", tmp_path / "abstains.csv"
    one.write_text("target,answer,answer_ann,score,score_ann\na,a,b,0.5,0.25\n", encoding="utf-8")
    two.write_text("target,answer,answer_ann,score,score_ann,score_abstain\na,a,b,0.5,0.25,0\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"keeps.csv: in .*abstains.csv rows may abstain, in .*keeps.csv not"):
        evaluate([two, one], abstain_cost=0.1)
    one.write_text(GOOD.replace("_A", "_ann"), encoding="utf-8")
    with pytest.raises(DataError, match=r"keeps.csv: expected the experts of .* \(A\), got ann"):
        evaluate(
            [path, write(one, {"target": ["a", "b"], "answer": ["a", "a"], "answer_ann": ["b", "b"], "action": ["own"] * 2})]
        )
    for price in (-0.1, float("inf"), float("nan")):
        with pytest.raises(DataError, match="expected numbers >= 0"):
            evaluate([path], prices={"A": price})
    with pytest.raises(DataError, match="no such expert"):
        evaluate([path], prices={"Zoe": 1.0})
    with pytest.raises(DataError, match="less than one row"):
        evaluate([path], calibration_share=0.1)
    abstaining = tmp_path / "abstaining.csv"
    abstaining.write_text("target,answer,score,score_abstain\na,a,0.5,0.25\n", encoding="utf-8")
    with pytest.raises(DataError, match="cost of abstaining"):
        evaluate([abstaining])
    with pytest.raises(DataError, match="abstaining, 5: expected at most 1"):
        evaluate([abstaining], abstain_cost=5)
    with pytest.raises(DataError, match="fits no file"):
        evaluate([path], abstain_cost=0.5)
    latin = tmp_path / "latin.csv"
    latin.write_bytes(GOOD.encode() + "é,a,b,0,0\n".encode("latin-1"))
    with pytest.raises(DataError, match="row 3 is not UTF-8"):
        evaluate([latin])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        evaluate([tmp_path / "broken.parquet"])
    (tmp_path / "outputs.txt").write_text(GOOD, encoding="utf-8")
    with pytest.raises(DataError, match=r"ends in \.csv or \.parquet"):
        evaluate([tmp_path / "outputs.txt"])


def test_text_in_parquet_that_is_not_utf_8(tmp_path: Path) -> None:
    latin = pa.Array.from_buffers(pa.string(), 1, [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xe9t")])
    table = pa.Table.from_arrays([latin, latin, pa.array([0.5])], ["target", "answer", "score"])
    pa.parquet.write_table(table, tmp_path / "latin.parquet")
    with pytest.raises(DataError, match=r"latin\.parquet: column 'target': a text in it is not UTF-8"):
        evaluate([tmp_path / "latin.parquet"])


@pytest.mark.parametrize("sentinel", [-1.797e308, 1e154])
def test_a_number_that_stands_for_a_missing_one_is_named(tmp_path: Path, sentinel: float) -> None:
    table = {"target": [1.0] * 9, "answer": [1.5] * 9, "answer_A": [1.0] * 9, "score": [0.0] * 9, "score_A": [1.0] * 9}
    assert evaluate([write(tmp_path / "good.csv", table)], regression=True).comparison.figures["oracle"].cost.estimate == 0
    table["answer_A"][4] = sentinel
    path = write(tmp_path / "ours.csv", table)
    with pytest.raises(DataError, match=r"ours\.csv: row 5, column 'answer_A': .* for the target 1 is too far off"):
        evaluate([tmp_path / "good.csv", path], regression=True)


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


def test_a_price_is_given_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(write(tmp_path / "ours.csv", columns())), "--price", "Ann=0.1", "--price", "Ann=0.2"])
    assert "has two prices" in capsys.readouterr().err


@pytest.mark.parametrize("price", ["Ann", "Ann=cheap"])
def test_a_price_that_is_no_price(tmp_path: Path, price: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(write(tmp_path / "ours.csv", columns())), "--price", price])
    assert "expected NAME=COST" in capsys.readouterr().err


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


def test_every_expert_has_a_picture_of_its_own(tmp_path: Path) -> None:
    table = {"target": ["a", "b"] * 5, "answer": ["a"] * 10, "answer_A b": ["a"] * 10, "answer_A-b": ["b"] * 10}
    table |= {"action": ["own"] * 10, "probability_A b": [0.5] * 10, "probability_A-b": [0.6] * 10}
    paths = draw_evaluation(evaluate([write(tmp_path / "ours.csv", table)]), tmp_path)
    assert len(set(paths)) == len(paths)


def test_without_matplotlib_the_figures_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {"target": ["a", "b", "a", "b"], "answer": ["a", "b", "b", "b"], "score": [0.9, 0.8, 0.1, 0.7]}
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    cli.main(["evaluate", str(write(tmp_path / "ours.csv", table)), "--out", str(tmp_path / "out")])
    assert "the pictures are left out: pictures need Matplotlib" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ours.json", "ours-rows.csv"}
