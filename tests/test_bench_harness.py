"""The harness of the published tables: cells, images, heads, training that resumes, figures, the page."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import click
import numpy as np
import pytest
import scipy
import sklearn
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import training
from benchmarks.harness.abstention import SINGLE_STAGE
from benchmarks.harness.abstention import Loss as CostLoss
from benchmarks.harness.cells import Cell, NotFinite, Results, write_whole
from benchmarks.harness.heads import Head, at, fit
from benchmarks.harness.images import augment
from benchmarks.harness.judging import Judged, Outputs, figures, fixed, judge, single_stage
from benchmarks.harness.networks import NETWORKS
from benchmarks.harness.presets import PRESETS
from benchmarks.harness.progress import Display
from benchmarks.harness.running import RESULTS, Busy, Finding, Part, Run, running
from benchmarks.harness.training import Diverged, OutOfTime, Recipe, Watch, _utilisation, outputs_of, train
from deferral.costs import single_stage_costs
from deferral.datasets import DataError, Images, cifar10h_counts
from deferral.decision import decide
from deferral.metrics import deferral_cost

CELL = Cell("abstention", "cifar10", "Cao et al. (mu=1.7)", "c=0.2", 3, "tiny")
RECIPE = Recipe(epochs=4, batch=50, learning_rate=0.02)


def synthetic(rows: int = 150) -> Images:
    generator = torch.Generator().manual_seed(0)
    return Images(
        torch.randint(0, 256, (rows, 3, 32, 32), generator=generator, dtype=torch.uint8),
        torch.randint(10, (rows,), generator=generator),
    )


def started(folder: Path, *, device: str = "cpu", budget_minutes: float | None = None) -> AbstractContextManager[Run]:
    return running(
        out=folder,
        seeds=1,
        device=device,
        threads=1,
        root=None,
        budget_minutes=budget_minutes,
        most_cells=None,
        quiet=True,
    )


def partial_cost(loss: CostLoss) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda scores, labels: loss(scores, labels, 0.05)


def cross_entropy(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(scores, labels, reduction="none")


# ------------------------------------------------------------------------------------------------------------ cells


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
        with pytest.raises(DataError, match=r"seed3\.json: expected the JSON of a finished cell .*; delete it to run it again"):
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


# ----------------------------------------------------------------------------------------------------------- images


def test_augmentation_is_pad_crop_flip_image_by_image() -> None:
    images = synthetic(40).images
    got = augment(images, torch.Generator().manual_seed(7))
    draws = torch.Generator().manual_seed(7)
    top, left = torch.randint(0, 9, (2, 40, 1), generator=draws)
    flips = torch.rand(40, 1, generator=draws) < 0.5
    assert 5 < flips.sum() < 35
    for image, out, y, x, flip in zip(images, got, top.flatten().tolist(), left.flatten().tolist(), flips, strict=True):
        crop = F.pad(image, (4, 4, 4, 4))[:, y : y + 32, x : x + 32]
        assert torch.equal(out, crop.flip(-1) if flip else crop)


def test_networks_have_the_sizes_of_the_papers() -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in build(10).parameters()) / 1e6 for name, build in NETWORKS.items()}
    assert sizes["resnet34"] == pytest.approx(21.28, abs=0.01)
    assert sizes["wrn28_10"] == pytest.approx(36.48, abs=0.01)
    assert sizes["small"] < 0.25
    # Weights and momentum in float32 stay under 16 MiB.
    assert sizes["fast"] * 8 < 16 * 1.048576
    for name in ("small", "fast"):
        assert NETWORKS[name](7)(synthetic(2).images).shape == (2, 7)


# ------------------------------------------------------------------------------------------------------------ heads


def test_many_problems_at_once_are_as_good_as_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 60, 4, generator=generator)
    y = x @ torch.randn(3, 4, 1, generator=generator)

    def train_on(problems: slice) -> torch.Tensor:
        inputs, targets = x[problems], y[problems]
        together = Head(x, 1, hidden=8, seed=0)
        head = Head(inputs, 1, hidden=8, seed=0)
        for mine, first in zip(head.parameters(), together.parameters(), strict=True):
            mine.data = first.data[problems].clone()

        def loss(i: torch.Tensor) -> torch.Tensor:
            return (head(at(inputs, i)) - at(targets, i)).squeeze(-1).square()

        fit([head], loss, len(inputs), 60, steps=150, seed=1, learning_rate=0.02)
        return head(inputs)

    together = train_on(slice(0, 3))
    alone = torch.cat([train_on(slice(k, k + 1)) for k in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    assert (together - y).square().mean() < 0.1 * y.square().mean()


def test_a_head_learns_from_the_rows_it_is_given_alone() -> None:
    x = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    only = torch.stack([torch.arange(10, 25), torch.arange(15)])
    for batch in (4, 100):
        seen: list[torch.Tensor] = []
        head = Head(x, 1, hidden=0, seed=0)

        def loss(i: torch.Tensor, head: Head = head, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(i)
            return head(at(x, i)).squeeze(-1).square()

        fit([head], loss, 2, 30, only=only, steps=20, seed=0, batch=batch)
        rows = torch.cat(seen, dim=1)
        assert [set(rows[k].tolist()) for k in range(2)] == [set(only[k].tolist()) for k in range(2)]


def test_each_head_has_its_own_weight_decay() -> None:
    heads = [Head(torch.randn(1, 10, 2), 1, hidden=0, seed=0) for _ in range(2)]
    before = [p.clone() for p in heads[0].parameters()]

    def still(i: torch.Tensor) -> torch.Tensor:
        return torch.stack([0 * head(torch.ones(1, 10, 2)).squeeze(-1) for head in heads]).sum(dim=0)

    # Without a gradient, what moves a parameter is its decay.
    fit(heads, still, 1, 10, steps=3, seed=0, weight_decay=[0.0, 9.0])
    assert all(torch.equal(a, b) for a, b in zip(before, heads[0].parameters(), strict=True))
    assert all((a.abs() > b.abs()).all() for a, b in zip(before, heads[1].parameters(), strict=True))


def test_a_gradient_that_is_not_finite_stops_a_head_before_the_step() -> None:
    head = Head(torch.randn(1, 10, 2), 1, hidden=0, seed=0)
    before = [p.clone() for p in head.parameters()]
    with pytest.raises(Diverged, match="step 1 of 1: the loss is 0, the size of its gradient nan"):
        # sqrt at 0 is finite and its slope is not.
        fit([head], lambda i: (0 * head(torch.ones(1, 10, 2)).squeeze(-1)).sqrt(), 1, 10, steps=1, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))


def test_a_head_that_diverges_says_where() -> None:
    head = Head(torch.randn(1, 10, 2), 1, hidden=0, seed=0)
    before = [p.clone() for p in head.parameters()]
    with pytest.raises(Diverged, match="step 1 of 5: the loss is nan"):
        fit([head], lambda i: head(torch.full((1, 10, 2), torch.nan)).squeeze(-1), 1, 10, steps=5, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))


# ---------------------------------------------------------------------------------------------------------- judging


def test_a_single_stage_decides_alike_over_classes_and_over_keep_or_ask() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 7, generator=generator)
    targets = torch.randint(4, (200,), generator=generator)
    costs = torch.rand(200, 3, generator=generator)
    outputs = single_stage(scores, targets, 4, costs)
    whole = deferral_cost(single_stage_costs(targets, costs, 4), decide(scores))
    assert torch.equal(deferral_cost(outputs.costs, decide(outputs.scores)), whole)
    judged = judge(outputs, outputs)
    assert torch.equal(judged.natural_cost, whole)
    assert judged.cost.mean() <= judged.natural_cost.mean()  # on its own rows a fitted threshold cannot lose


def test_figures_meet_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, costs = torch.randn(300, 2, generator=generator), torch.rand(300, 2, generator=generator)
    outputs = Outputs(scores, costs, (costs > 0.5).float())
    judged, never = judge(outputs, outputs), fixed(outputs, 0)
    found = figures(judged, {"never": never})
    rho, accepted = 1 - found["coverage"]["estimate"], found["accepted_cost"]["estimate"]
    asked = float((judged.cost * (1 - judged.kept)).sum() / (1 - judged.kept).sum())
    # The identity of the abstention loss: (1 - rho) * cost of what is kept + rho * cost of asking.
    assert found["cost"]["estimate"] == pytest.approx((1 - rho) * accepted + rho * asked, abs=1e-4)
    assert found["load"] == [pytest.approx(rho, abs=1e-5)]
    gap = found["difference"]["never"]
    assert gap["estimate"] == pytest.approx(float((judged.cost - costs[:, 0]).mean()), abs=1e-5)
    assert gap["low"] < gap["estimate"] < gap["high"]
    assert found["error"]["estimate"] == pytest.approx(float(judged.error.mean()), abs=1e-5)
    assert "accepted_cost" not in figures(fixed(outputs, 1), {})


def test_a_threshold_that_is_not_ahead_by_its_error_is_not_taken() -> None:
    scores = torch.tensor([[0.0, -1.0], [0.0, -0.5], [0.0, 1.0], [0.0, 2.0]])
    costs = torch.tensor([[0.3, 0.2], [0.3, 0.1], [0.3, 0.1], [0.3, 0.1]])
    calibration = Outputs(scores, costs)
    # Deferring everything gains 0.1, 0.2, 0 and 0: 0.075 on average, 1.57 standard errors.
    taken, left = judge(calibration, calibration, errors_ahead=1.5), judge(calibration, calibration, errors_ahead=1.6)
    assert taken.kept.tolist() == [0, 0, 0, 0]
    assert left.kept.tolist() == left.natural_kept.tolist() == [1, 1, 0, 0]
    assert judge(calibration, calibration).kept.sum() == 0


def test_rows_may_have_actions_of_their_own() -> None:
    outputs = Outputs(torch.zeros(3, 2), torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]]))
    assert fixed(outputs, torch.tensor([0, 1, 0])).cost.tolist() == pytest.approx([0.1, 0.8, 0.3])


def test_rows_of_several_splits_are_averaged() -> None:
    rows = torch.tensor([0, 2, 0, 3])
    ones = torch.ones(4)
    judged = Judged(
        cost=torch.tensor([1.0, 2.0, 3.0, 4.0]),
        natural_cost=ones,
        kept=torch.tensor([1.0, 1.0, 0.0, 0.0]),
        natural_kept=ones,
        own_cost=torch.tensor([5.0, 6.0, 7.0, 8.0]),
        load=torch.tensor([[0.0], [0.0], [1.0], [1.0]]),
    )
    mean = judged.mean_over(rows, 5)
    assert mean.cost.tolist() == [2.0, 2.0, 4.0]
    assert mean.kept.tolist() == [0.5, 1.0, 0.0]
    assert (mean.own_cost * mean.kept).tolist() == pytest.approx([2.5, 6.0, 0.0])  # of row 0 one of two splits kept it
    assert mean.load.flatten().tolist() == [0.5, 0.0, 1.0]


# --------------------------------------------------------------------------------------------------------- training


def test_out_of_time_stops_behind_a_checkpoint_and_resuming_changes_nothing(tmp_path: Path) -> None:
    data = synthetic()
    recipe = Recipe(epochs=4, batch=50, learning_rate=0.02, warm_up=0.3)
    seen: list[int] = []

    def run(path: Path, deadline: float) -> torch.nn.Module:
        watch = Watch(lambda epoch, loss: seen.append(epoch), deadline)
        return train(lambda: NETWORKS["small"](10), data, cross_entropy, recipe, path, seed=3, watch=watch)[0]

    whole = run(tmp_path / "whole.pt", float("inf"))
    for _ in range(3):
        with pytest.raises(OutOfTime):
            run(tmp_path / "cut.pt", time.monotonic() - 1)
    resumed = run(tmp_path / "cut.pt", time.monotonic() - 1)  # the last epoch is not cut off
    assert seen == [1, 2, 3, 4] * 2
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    again = run(tmp_path / "cut.pt", float("inf"))
    assert torch.equal(
        outputs_of(again, data.images[:5], bfloat16=False)[1], outputs_of(whole, data.images[:5], bfloat16=False)[1]
    )


def test_a_checkpoint_of_another_run_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "network.pt"

    def run(**changed) -> None:
        given = {"seed": 0, "data": synthetic(60), "recipe": Recipe(epochs=1, batch=60)} | changed
        train(lambda: NETWORKS["small"](10), given["data"], cross_entropy, given["recipe"], path, seed=given["seed"])

    run()
    with pytest.raises(ValueError, match=r"another run \(seed differ\)"):
        run(seed=1)
    with pytest.raises(ValueError, match=r"another run \(data, rows differ\)"):
        run(data=synthetic(70))
    with pytest.raises(ValueError, match=r"another run \(learning_rate differ\)"):
        run(recipe=Recipe(epochs=1, batch=60, learning_rate=0.3))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="delete the file to train again"):
        run()


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_step_and_says_where(tmp_path: Path, bad: str) -> None:
    data, steps = synthetic(), [0]

    def loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        steps[0] += 1
        values = cross_entropy(scores, labels)
        if steps[0] < 5:
            return values
        # sqrt at 0 is finite and its slope is not.
        return values * torch.nan if bad == "loss" else values + (0 * scores.sum(-1)).sqrt()

    with pytest.raises(Diverged, match=r"epoch 2, step 2: .*stopped before the step"):
        train(lambda: NETWORKS["small"](10), data, loss, RECIPE, tmp_path / "network.pt", seed=0)
    state = torch.load(tmp_path / "network.pt", weights_only=True)
    assert state["epoch"] == 1
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


def test_a_gpu_that_cannot_be_asked_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_bindings(device: torch.device) -> int:
        raise ModuleNotFoundError("pynvml does not seem to be installed or it can't be imported.")

    monkeypatch.setattr(torch.cuda, "utilization", without_bindings)
    assert _utilisation(torch.device("cuda:0")) == []
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 87)
    assert _utilisation(torch.device("cuda:0")) == [87]
    assert _utilisation(torch.device("cpu")) == []


class OneDevice(TorchDispatchMode):
    """Stands for a device of its own, `meta`: only copies may cross to it, and it says 1 where it is asked for a number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype == torch.bool or 1.0
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor) and (a.dim() or a.is_meta)]
        copied = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if not copied and len({a.device for a in tensors}) > 1:
            raise AssertionError(f"{func} of tensors on several devices")
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    "recipe", [replace(PRESETS[name].recipe, epochs=1, batch=4) for name in ("fast", "paper")], ids=["fast", "paper"]
)
def test_a_step_of_every_method_keeps_to_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: Recipe) -> None:
    monkeypatch.setattr(training, "_fingerprint", lambda data: "")
    monkeypatch.setattr(training, "_save", lambda path, *given: path.touch())
    for number, loss in enumerate([cross_entropy, *(partial_cost(loss) for loss in SINGLE_STAGE.values())]):
        with OneDevice():
            data = Images(
                torch.empty(6, 3, 32, 32, dtype=torch.uint8, device="meta"), torch.zeros(6, dtype=torch.long, device="meta")
            )
            model, _ = train(lambda: NETWORKS["small"](11), data, loss, recipe, tmp_path / f"{number}.pt", seed=0)
            features, scores = outputs_of(model, data.images, bfloat16=False)
        assert (features.device.type, scores.device.type, scores.shape) == ("meta", "meta", (6, 11))


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_a_device_that_is_not_there_is_told(tmp_path: Path, device: str) -> None:
    with pytest.raises(click.UsageError, match=f"--device {device}: "), started(tmp_path, device=device):
        pass


@pytest.mark.cuda
def test_a_network_on_a_gpu_tells_its_memory(tmp_path: Path) -> None:
    speed = train(lambda: NETWORKS["small"](10), synthetic().to("cuda"), cross_entropy, RECIPE, tmp_path / "n.pt", seed=0)[1]
    assert speed["peak_memory_mebibytes"] > 0
    assert 0 <= speed.get("gpu_utilisation_percent", 0) <= 100


PROGRAM = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from tests.test_bench_harness import Watch, long_run
model = long_run(Path({path!r}), Watch(lambda epoch, loss: print(epoch, flush=True)))
torch.save(model.state_dict(), {path!r} + ".done")
"""


def long_run(checkpoint: Path, watch: Watch) -> torch.nn.Module:
    recipe = Recipe(epochs=8, batch=50, learning_rate=0.02)
    return train(lambda: NETWORKS["small"](10), synthetic(200), cross_entropy, recipe, checkpoint, seed=5, watch=watch)[0]


@pytest.mark.slow
def test_killed_three_times_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    root = str(Path(__file__).parent.parent)

    def run(name: str, kill_after: int | None = None, wait: float = 0.0) -> list[int]:
        """The epochs it told, until it was killed `wait` seconds behind the epoch of that number."""
        program = PROGRAM.format(root=root, path=str(tmp_path / name))
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            told: list[int] = []
            while kill_after and (not told or told[-1] < kill_after):
                told.append(int(process.stdout.readline()))
            if kill_after is not None:
                time.sleep(wait)
                process.kill()
            told += [int(line) for line in process.stdout.read().split()]
        assert process.returncode == (0 if kill_after is None else -9)
        return told

    # Killed before anything is there, right behind a checkpoint, and some way into an epoch.
    parts = [run("killed.pt", 0, 0.3), run("killed.pt", 2), run("killed.pt", 4, 0.05), run("killed.pt")]
    told = [epoch for part in parts for epoch in part]
    # No epoch is told twice; one may go untold, whose checkpoint was written when it was killed.
    assert told == sorted(set(told))
    assert told[-1] == 8
    assert all(parts[1:])
    whole = long_run(tmp_path / "whole.pt", Watch()).state_dict()
    killed = torch.load(tmp_path / "killed.pt.done", weights_only=True)
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert not list(tmp_path.glob("*.partial*"))
