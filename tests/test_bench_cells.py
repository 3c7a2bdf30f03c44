"""Cells of the published tables: written whole, claimed by one process, left open where they failed."""

import errno
import json
import os
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import click
import numpy as np
import pytest
import scipy
import sklearn
import torch

from benchmarks.harness.cells import Cell, NotFinite, Results, write_whole
from benchmarks.harness.judging import Outputs, fixed, judge
from benchmarks.harness.networks import NETWORKS
from benchmarks.harness.progress import Display
from benchmarks.harness.running import RESULTS, Busy, Finding, Part
from benchmarks.harness.training import train
from deferral.datasets import DataError, cifar10h_counts
from tests.bench_runs import RECIPE, cross_entropy, started, synthetic

CELL = Cell("abstention", "cifar10", "Cao et al. (mu=1.7)", "c=0.2", 3, "tiny")


def test_a_cell_is_finished_when_its_figures_are_there(tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert not results.finished(CELL)
    results.write(CELL, {"parts": [{"cost": 0.1}, {"cost": 0.2}], "settings": {"a": None}}, {"cost": np.arange(3.0)})
    assert results.finished(CELL)
    (record,) = results.read_all("abstention")
    assert record["parts"] == [{"cost": 0.1}, {"cost": 0.2}]
    assert Cell(**record["cell"]) == CELL
    assert results.samples(CELL)["cost"].tolist() == [0, 1, 2]
    assert results.path(CELL).name == "cifar10_Cao-et-al.-mu-1.7_c-0.2_seed3.json"


def test_a_file_that_is_no_cell_or_another_cell_is_told(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.write(CELL, {"parts": [{"cost": 0.1}]}, {"cost": np.zeros(1)})
    whole = results.path(CELL).read_text()
    for damaged in ("", '{"cell":', "[]", whole.replace('"parts"', '"figures"'), whole.replace('"seed"', '"s"')):
        results.path(CELL).write_text(damaged)
        with pytest.raises(DataError, match=r"seed3\.json: no finished cell; run the experiment again, which replaces it"):
            results.read_all("abstention")
        # A run makes it anew.
        assert not results.finished(CELL)
    for another in (whole.replace('"preset": "tiny"', '"preset": "paper"'), whole.replace('"seed": 3', '"seed": 4')):
        results.path(CELL).write_text(another)
        with pytest.raises(DataError, match="expected the figures of the cell that it is named after"):
            results.read_all("abstention")


def test_a_figure_that_is_not_finite_leaves_the_cell_open(tmp_path: Path) -> None:
    for figure in (float("nan"), float("inf")):
        with pytest.raises(NotFinite, match=r"expected finite figures \(.*\)"):
            Results(tmp_path).write(CELL, {"parts": [{"cost": figure}]}, {"cost": np.zeros(1)})
    assert not list(tmp_path.rglob("*.*"))


def test_committed_cells_are_json_as_others_read_it() -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    paths = list(RESULTS.glob("*/*/*.json"))
    assert paths
    for path in paths:
        json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    with pytest.raises(KeyboardInterrupt), write_whole(path) as partial:  # noqa: PT012
        partial.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with write_whole(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "figures.json", []

    def fsync(number: int) -> None:
        assert not path.exists()
        synced.append((os.fstat(number).st_ino, os.fstat(number).st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    with write_whole(path) as partial:
        partial.write_text("whole")
    assert synced == [(path.stat().st_ino, 5)]


def test_a_claim_keeps_others_out_until_it_ends(tmp_path: Path) -> None:
    results = Results(tmp_path)
    with results.claim("cell") as mine:
        assert mine
        with results.claim("cell") as second:
            assert not second
        with results.claim("another") as other:
            assert other
    with results.claim("cell") as again:
        assert again


def test_what_needs_what_another_process_makes_comes_last(tmp_path: Path) -> None:
    order: list[int] = []
    with started(tmp_path) as run:
        other = ExitStack()
        other.enter_context(run.results.claim("stage"))

        def work(cell: Cell) -> Finding:
            if cell.seed == 0:
                with run.claim("stage") as mine:
                    if not mine:
                        # It ends only after the next cell has begun.
                        order.append(-1)
                        raise Busy("stage")
            else:
                other.close()
            order.append(cell.seed)
            outputs = Outputs(torch.zeros(4, 2), torch.ones(4, 2))
            return Finding([Part(judge(outputs, outputs), {})])

        run.each([Cell("table", "data", "method", "c=0.2", seed, "laptop") for seed in (0, 1)], work, lambda cell: {})
    assert order == [-1, 1, 0]


def test_a_cell_whose_figures_are_not_finite_stays_open_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(cell: Cell) -> Finding:
        costs = torch.full((4, 2), torch.nan if cell.seed == 0 else 1.0)
        return Finding([Part(fixed(Outputs(torch.zeros(4, 2), costs), 0), {})])

    cells = [replace(CELL, seed=seed) for seed in (0, 1)]
    with pytest.raises(click.ClickException, match="1 cells diverged"), started(tmp_path) as run:  # noqa: PT012
        left_by_a_killed_run = run.results.checkpoint(cells[1])
        run.each(cells[1:], work, lambda cell: {})
        left_by_a_killed_run.touch()
        run.each(cells, work, lambda cell: {})
    assert [run.results.finished(cell) for cell in cells] == [False, True]
    assert "_seed0: expected finite figures on every test row, not so: cost, natural_cost" in capsys.readouterr().err
    assert not left_by_a_killed_run.exists()


def found(cell: Cell) -> Finding:
    """Something that any work may find."""
    return Finding([Part(fixed(Outputs(torch.zeros(4, 2), torch.ones(4, 2)), 0), {})], {"speed": {"seconds": 1.0}})


def test_cells_that_other_settings_made_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [replace(CELL, seed=seed) for seed in range(3)]
    recipe = replace(RECIPE, clip=1.0)
    float32 = {"rows": (1, 2), "recipe": asdict(recipe)}
    with started(tmp_path) as run:
        run.each(cells[:2], found, lambda cell: float32)
        run.each(cells[2:], found, lambda cell: {**float32, "recipe": {"average": None, **asdict(recipe)}})
        run.each(cells, found, lambda cell: float32)
        assert "kept" not in capsys.readouterr().err
        run.each(cells, found, lambda cell: {**float32, "recipe": asdict(replace(recipe, bfloat16=cell.seed > 0))})
    said = capsys.readouterr().err
    assert "kept 2 finished cells that were made with other settings (bfloat16); --out DIR makes them with these" in said


def test_a_damaged_cell_is_made_anew(tmp_path: Path) -> None:
    with started(tmp_path) as run:
        run.each([CELL], found, lambda cell: {})
        path = run.results.path(CELL)
        whole = json.loads(path.read_text())
        path.write_text("")
        run.each([CELL], found, lambda cell: {})
    assert json.loads(path.read_text())["parts"] == whole["parts"]


def test_a_cell_names_the_versions_of_what_made_it(tmp_path: Path) -> None:
    with started(tmp_path) as run:
        run.each([CELL], found, lambda cell: {})
    machine = Results(tmp_path).record(CELL)["machine"]
    assert (machine["scikit-learn"], machine["scipy"], machine["numpy"]) == (
        sklearn.__version__,
        scipy.__version__,
        np.__version__,
    )


def test_data_that_is_not_there_is_told_by_the_option_that_names_its_folder(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException) as told, started(tmp_path):
        cifar10h_counts(tmp_path)
    assert "cifar10h_counts.npy, and it is not there; --root, or DEFERRAL_DATA, names the folder" in told.value.message
    assert "people" not in told.value.message


def test_a_first_write_that_fails_promises_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(click.ClickException) as told, started(tmp_path / "file") as run:
        run.each([CELL], found, lambda cell: {})
    assert "Not a directory" in told.value.message
    assert "stays" not in told.value.message
    assert "continues" not in told.value.message


def test_a_full_disk_is_told_with_the_way_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    Results(tmp_path).write(CELL, {"parts": [{"cost": 0.1}]}, {"cost": np.zeros(1)})
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(click.ClickException, match=r"No space left on device .*the same command continues"), started(tmp_path):
        train(lambda: NETWORKS["small"](10), synthetic(50), cross_entropy, replace(RECIPE, epochs=1), tmp_path / "n.pt", seed=0)
    assert not list(tmp_path.rglob("n*.pt"))


def test_waiting_for_another_process_ends_with_the_time_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work(cell: Cell) -> Finding:
        raise Busy("stage")

    with (
        started(tmp_path, budget_minutes=0.002) as run,
        run.results.claim("stage"),
    ):
        run.each([CELL], work, lambda cell: {})
    assert "the time budget is spent" in capsys.readouterr().err
    assert not run.results.finished(CELL)


def test_the_time_left_comes_from_all_cells_however_long_they_take(capsys: pytest.CaptureFixture[str]) -> None:
    display, clock = Display(quiet=True), [0.0]
    display._progress.get_time = lambda: clock[0]
    display.start([CELL] * 6, done=1)
    for minutes in (10, 30, 50):  # the first cell counts from the second on
        clock[0] = 60.0 * minutes
        display.finished(CELL, {"parts": [{"cost": {"estimate": 0.1, "low": 0.0, "high": 0.2}}], "wall_seconds": 1200.0})
    (cells,) = display._progress.tasks
    assert cells.time_remaining == 60 * 40
    for epoch, minute in enumerate((60, 61, 62), start=1):
        clock[0] = 60.0 * minute
        display.epoch("first network", epoch, 5, 0.1)
    assert display._progress.tasks[1].time_remaining == 60 * 2
    display.epoch("second network", 1, 3, 0.1)
    assert display._progress.tasks[1].completed == 1
    assert display._progress.tasks[1].time_remaining is None
    assert len(capsys.readouterr().err.splitlines()) == 3
    Display(quiet=False, silent=True).say("nothing")
    assert capsys.readouterr().err == ""
