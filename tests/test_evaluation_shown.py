"""What `deferral evaluate` prints, writes and draws."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from deferral import cli
from deferral.evaluation.evaluate import evaluate
from deferral.evaluation.pictures import draw_evaluation
from deferral.evaluation.report import show_evaluation
from tests.method_outputs import ROWS, columns, write


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


def test_a_price_is_given_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(write(tmp_path / "ours.csv", columns())), "--price", "Ann=0.1", "--price", "Ann=0.2"])
    assert "has two prices" in capsys.readouterr().err


@pytest.mark.parametrize("price", ["Ann", "Ann=cheap"])
def test_a_price_that_is_no_price(tmp_path: Path, price: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(write(tmp_path / "ours.csv", columns())), "--price", price])
    assert "expected NAME=COST" in capsys.readouterr().err


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
