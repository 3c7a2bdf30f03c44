"""`deferral evaluate`: files of any tool in, figures out; every bad file is named by row and column."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from deferral import cli, decide, error_costs, oracle, pick
from deferral.curves import aurc
from deferral.datasets import DataError
from deferral.evaluation.evaluate import evaluate
from deferral.evaluation.outputs import read_outputs

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
    assert figures["always Bob"].cost.estimate == pytest.approx(float(costs[mask[:, 2], 2].double().mean()))
    assert figures["never deferring"].coverage.estimate == 1
    best = outputs.scores[:, 1:].amax(-1)
    expected = aurc(outputs.scores[:, 0] - best, costs[:, 0])
    assert evaluation.areas["ours"]["AURC"].estimate == pytest.approx(float(expected))


def test_two_methods_are_paired_and_thresholds_are_fitted_on_other_rows(tmp_path: Path) -> None:
    one, other = (write(tmp_path / f"{name}.csv", columns(seed)) for seed, name in enumerate(("one", "other")))
    evaluation = evaluate([one, other], calibration_share=0.5)
    comparison = evaluation.comparison
    assert comparison.reference == "one, threshold fitted"
    assert len(comparison.targets) == ROWS // 2
    assert {"other", "other, threshold fitted", "always Ann", "oracle"} <= set(comparison.figures)
    again = evaluate([one, other], calibration_share=0.5).comparison
    assert again.figures == comparison.figures
    assert evaluate([one, other], calibration_share=0.5, seed=1).comparison.figures != comparison.figures


def test_baselines_appear_where_the_file_has_probabilities(tmp_path: Path) -> None:
    table = columns(missing=0.3) | {
        "probability": torch.rand(ROWS).tolist(),
        "probability_Ann": [0.7] * ROWS,
        "probability_Bob": [0.6] * ROWS,
    }
    evaluation = evaluate([write(tmp_path / "ours.csv", table)], prices=PRICES, calibration_share=0.4)
    assert {"compare-confidence", "selective prediction"} <= set(evaluation.comparison.figures)
    assert set(evaluation.calibration) == {"the model", "Ann", "Bob"}
    share_right = evaluation.probabilities["Ann"][1].mean()
    assert evaluation.calibration["Ann"]["ECE"].estimate == pytest.approx(abs(float(share_right) - 0.7))


def test_labels_that_a_missing_answer_made_into_decimals_are_the_same_labels(tmp_path: Path) -> None:
    table = {"target": [0, 1, 2, 1], "answer": [0, 1, 1, 1], "answer_A": ["0.0", "", "2.0", "1.0"], "action": ["own"] * 4}
    outputs = read_outputs(write(tmp_path / "ours.csv", table))
    assert outputs.labels == ["0", "1", "2"]
    assert outputs.answers.tolist() == [[0, 0], [1, -1], [1, 2], [1, 1]]


def test_a_file_of_selective_prediction_needs_a_score_only(tmp_path: Path) -> None:
    table = {"target": ["a", "b", "a", "b"], "answer": ["a", "b", "b", "b"], "score": [0.9, 0.8, 0.1, 0.7]}
    evaluation = evaluate([write(tmp_path / "ours.csv", table)])
    assert evaluation.areas["ours"]["AURC"].estimate == pytest.approx(1 / 16)
    assert evaluation.areas["ours"]["excess AURC"].estimate == pytest.approx(0)


def test_abstaining_costs_what_it_is_said_to_cost(tmp_path: Path) -> None:
    table = {"target": ["a", "b"], "answer": ["a", "a"], "action": ["own", "abstain"]}
    figures = evaluate([write(tmp_path / "ours.csv", table)], abstain_cost=0.25).comparison.figures["ours"]
    assert figures.cost.estimate == pytest.approx(0.125)
    assert figures.accuracy is not None
    assert figures.accuracy.estimate == 1


def test_regression_is_judged_by_squared_errors(tmp_path: Path) -> None:
    table = {"target": [1.0, 2.0], "answer": [1.5, 2.0], "answer_A": [1.0, None], "score": [0, 1], "score_A": [1, None]}
    figures = evaluate([write(tmp_path / "ours.csv", table)], prices={"A": 0.1}, regression=True).comparison.figures
    assert figures["ours"].cost.estimate == pytest.approx(0.05)
    assert figures["ours"].accuracy is None


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
    "nothing says who answers": "target,answer,answer_A\na,a,b\n",
    "at least one row": "target,answer,score\n",
    "column 'answer' is there twice": "target,answer,answer,score\na,a,a,0.5\n",
    "row 1, column 'action': expected one of own, A, got 'C'": "target,answer,answer_A,action\na,a,b,C\n",
    "row 1, column 'action': expected someone who answered": "target,answer,answer_A,action\na,a,,A\n",
    "row 1, column 'probability': expected a probability": "target,answer,score,probability\na,a,0.5,1.5\n",
    "cannot be read as csv": GOOD + "a,b\n",
    "cannot be called 'own'": "target,answer,answer_own,score\na,a,b,0.5\n",
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_file_is_named_by_row_and_column(tmp_path: Path, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(BAD[message], encoding="utf-8")
    with pytest.raises(DataError) as error:
        evaluate([path])
    assert message in str(error.value)
    assert str(path) in str(error.value)


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
    with pytest.raises(DataError, match="no such expert"):
        evaluate([path], prices={"Zoe": 1.0})
    with pytest.raises(DataError, match="less than one row"):
        evaluate([path], calibration_share=0.1)
    abstaining = tmp_path / "abstaining.csv"
    abstaining.write_text("target,answer,score,score_abstain\na,a,0.5,0.25\n", encoding="utf-8")
    with pytest.raises(DataError, match="cost of abstaining"):
        evaluate([abstaining])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        evaluate([tmp_path / "broken.parquet"])
    (tmp_path / "outputs.txt").write_text(GOOD, encoding="utf-8")
    with pytest.raises(DataError, match=r"ends in \.csv or \.parquet"):
        evaluate([tmp_path / "outputs.txt"])


@pytest.mark.parametrize("price", ["Ann", "Ann=cheap"])
def test_a_price_that_is_no_price(tmp_path: Path, price: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(write(tmp_path / "ours.csv", columns())), "--price", price])
    assert "expected NAME=COST" in capsys.readouterr().err
