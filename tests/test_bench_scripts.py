"""The scripts of the published tables: what they promise of their problems, the page, and two tiny cells of each."""

import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.io import loadmat, savemat
from sklearn.ensemble import GradientBoostingRegressor

from benchmarks import (
    judging,
    loss_table,
    losses,
    multi_expert,
    people,
    predictor_rejector,
    realizable,
    regression,
    report,
    router,
    score_based,
    training_step,
    two_stage,
)
from benchmarks import page as gateway_page
from benchmarks.harness import simulated, tables
from benchmarks.harness.asking import ALWAYS, METHODS, NEVER, Asked, Task
from benchmarks.harness.cells import Cell, Results
from benchmarks.harness.presets import ABSTENTION, PRESETS, Preset
from benchmarks.harness.running import RESULTS
from benchmarks.harness.settings import PRECISION, way_of
from benchmarks.harness.splits import Columns, Splits, experts_answers, parts_of
from benchmarks.harness.stage1 import Rows
from benchmarks.harness.training import Recipe
from deferral.datasets import RegressionTable, svhn, uci
from deferral.torchvision_compat import import_torchvision

IMAGE_SCRIPTS = [score_based, predictor_rejector, multi_expert, two_stage, people]
SCRIPTS = [*IMAGE_SCRIPTS, regression, realizable]


def run(script, *arguments: str) -> str:
    result = CliRunner().invoke(script.command, ["--preset", "tiny", "--quiet", *arguments])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


def test_the_page_is_current() -> None:
    assert report.PAGE.read_text(encoding="utf-8") == report.page(Results(RESULTS)), "run python -m benchmarks report"
    for name in report.PAGE.read_text(encoding="utf-8").split("](")[1:]:
        assert (report.PAGE.parent / name.partition(")")[0]).is_file()


def written(folder: Path, *records: dict) -> Results:
    results = Results(folder)
    for record in records:
        results.write(Cell(**record["cell"]), {key: value for key, value in record.items() if key != "cell"}, {})
    return results


def record_of(cell: Cell, cost: float = 0.1, **minus: float) -> dict:
    """A record whose intervals have no width."""

    def exactly(value: float) -> dict[str, float]:
        return {"estimate": value, "low": value, "high": value}

    differences = {name.replace("_", " "): exactly(value) for name, value in minus.items()}
    part = {"at": {"experts": 1}} | {name: exactly(cost) for name in ("cost", "natural_cost", "coverage", "accepted_cost")}
    machine = {"device": "cpu", "torch": "2", "commit": "abc"}
    return {
        "cell": asdict(cell),
        "parts": [part | {"difference": differences}],
        "settings": {},
        "machine": machine,
        "wall_seconds": 1.0,
    }


def test_the_page_of_other_cells_is_written_beside_them(tmp_path: Path) -> None:
    before = report.PAGE.read_bytes()
    written(tmp_path, record_of(Cell("multi-expert", "cifar10", "PiCCE", "random, price 0", 0, "paper")))
    result = CliRunner().invoke(report.command, ["--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "reproduction.md").read_text(encoding="utf-8")
    assert f"from the cells in `{tmp_path}`" in page
    assert "| several experts on images | no | `paper` (1 cells) |" in page
    assert "| PiCCE | 1 of 3 | 10.00 ± 0.00 |" in page
    assert report.PAGE.read_bytes() == before


def test_a_report_of_no_cells_is_refused(tmp_path: Path) -> None:
    before = report.PAGE.read_bytes()
    for folder, code, said in ((tmp_path, 1, "expected cells, found none"), (tmp_path / "absent", 2, "does not exist")):
        result = CliRunner().invoke(report.command, ["--out", str(folder)])
        assert result.exit_code == code
        assert said in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert report.PAGE.read_bytes() == before


def test_cells_that_have_no_place_on_the_page_are_named(tmp_path: Path) -> None:
    shown, *others = (
        record_of(Cell("multi-expert", data, "PiCCE", "random, price 0", 0, preset))
        for data, preset in (("cifar10", "laptop"), ("svhn", "laptop"), ("cifar10", "tiny"))
    )
    page = report.page(written(tmp_path, shown, *others))
    assert "Left out here: 1 cells of `laptop` on svhn; 1 cells of `tiny` on cifar10." in page
    assert "Left out" not in report.page(Results(RESULTS))
    # Every preset of a script but those of tests and of choices.
    for section in report.SECTIONS[:3]:
        assert set(section.entries) == set(PRESETS) - {"tiny"}


def test_the_oracle_is_not_counted_against_a_predictor_that_learned_on() -> None:
    section = next(section for section in report.SECTIONS if section.table == "regression")
    cheaper = {"never_defer": -1.0, "never_defer,_trained_on": -1.0, "always_defer": -1.0}
    cells = [
        record_of(Cell("regression", "yacht", method, "1 expert", 0, "laptop"), **cheaper)
        for method in ("single-stage", regression.ORACLE)
    ]
    [*_, single, oracle] = tables.verdicts(section, cells, "laptop")
    assert single == "| single-stage | 1 / 0 / 0 | 1 / 0 / 0 | 1 / 0 / 0 |"
    assert oracle == "| oracle, by hindsight | 1 / 0 / 0 |  | 1 / 0 / 0 |"
    row = next(line for line in tables.matrix(section, cells, "laptop", "1 expert") if line.startswith("| yacht"))
    assert row == "| yacht | 0.1000 ± 0.0000 ** | 0.1000 ± 0.0000 * |"


def test_bars_of_another_classifier_are_not_compared_with() -> None:
    section = next(section for section in report.SECTIONS if section.table == "people")
    cells = [
        record_of(Cell("people", people.SPLIT, method, "price 0", 0, "laptop"), cost)
        for method, cost in ((NEVER, 0.265), ("one-vs-all", 0.05))
    ]
    said, _, head, _, *rows = tables.by_method(section, cells, "laptop", people.SPLIT, "price 0")
    assert said.endswith("alone that one is right on 93.9% of the rows, ours on 73.5%.")
    assert head.endswith("| bar of another classifier |")
    assert next(row for row in rows if row.startswith("| one-vs-all")).endswith("| 3.05 |")
    assert f"{people.ALONE:.2f}%" in people.__doc__


def test_little_that_is_kept_is_not_called_none() -> None:
    for coverage, said in ((0.0, "none kept"), (0.001, "too few kept")):
        record = record_of(Cell("people", people.SPLIT, NEVER, "price 0", 0, "laptop"))
        del record["parts"][0]["accepted_cost"]
        record["parts"][0]["coverage"]["estimate"] = coverage
        assert tables._over([record], "accepted_cost", 100.0) == said


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        *((script, ["--rounds", "0"], "'--rounds': 0 is not in the range") for script in (judging, losses, training_step)),
        (gateway_page, ["--rows", "-3"], "'--rows': -3 is not in the range"),
        (router, ["--largest", "0"], "'--largest': 0 is not in the range"),
        (training_step, ["--batch", "0"], "'--batch': 0 is not in the range"),
        (training_step, ["--threads", "-3"], "'--threads': -3 is not in the range"),
        (training_step, ["--device", "nowhere"], "--device nowhere: expected a torch device"),
        *(
            (script, ["--bogus"], "No such option")
            for script in (judging, losses, training_step, gateway_page, router, loss_table)
        ),
        (realizable, ["--root", "."], "No such option"),
    ],
)
def test_a_bad_option_is_told_without_a_traceback(
    script, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        script.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_help_of_the_table_of_losses_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loss_table, "PAGE", tmp_path / "losses.md")
    with pytest.raises(SystemExit) as ended:
        loss_table.main(["--help"])
    assert ended.value.code == 0
    assert list(tmp_path.iterdir()) == []


def test_the_page_shows_every_cell_that_a_script_would_run() -> None:
    shown = {section.table: set(section.methods) for section in report.SECTIONS}
    assert shown["abstention"] == {*score_based.METHODS, *predictor_rejector.METHODS}
    assert shown["multi-expert"] == {*multi_expert.METHODS, *two_stage.METHODS}
    assert shown["people"] == {*people.BASELINES, *people.LEARNED}
    assert shown["regression"] == set(regression.METHODS)
    assert shown["realizable"] == {method for methods in realizable.METHODS.values() for method in methods}


def cell_of(costs: tuple[float, float, float], seed: int, *, preset: str = "paper", epochs: int = 200) -> dict:
    low, estimate, high = costs
    cell = Cell("abstention", "cifar10", "two-stage score-based", "c=0.05", seed, preset)
    cost = {"estimate": estimate, "low": low, "high": high}
    fitted = {"estimate": 0.5, "low": 0.5, "high": 0.5}
    settings = {"network": "resnet34", "rows": {"predictor": 45_000}, "recipe": {"epochs": epochs, "bfloat16": bool(seed)}}
    return {"cell": vars(cell), "parts": [{"cost": fitted, "natural_cost": cost, "difference": {}}], "settings": settings}


def test_a_published_figure_is_that_of_the_natural_threshold_and_agrees_or_is_above_or_below() -> None:
    def against(*cells: dict, preset: str = "paper") -> str:
        return tables._against(cells, "3.22 ± 0.04", 100.0, preset)

    assert against() == "not run"
    assert against(cell_of((0.030, 0.033, 0.036), 0)) == "+0.08 [-0.22, +0.38], agrees (one seed)"
    assert against(cell_of((0.030, 0.032, 0.036), 0)) == "-0.02 [-0.22, +0.38], agrees (one seed)"
    assert against(cell_of((0.033, 0.036, 0.039), 0)) == "+0.38 [+0.08, +0.68], above (one seed)"
    assert against(cell_of((0.029, 0.030, 0.031), 0)) == "-0.22 [-0.32, -0.12], below (one seed)"

    def three(rows: float) -> list[dict]:
        return [cell_of((cost - rows, cost, cost + rows), seed) for seed, cost in enumerate((0.0341, 0.0342, 0.0343))]

    # Student's interval of three, the mean -+ 4.303 deviations / sqrt(3), or that over the rows where it is wider.
    assert against(*three(1e-5)) == "+0.20 [+0.18, +0.22], above"
    assert against(*three(1e-5), preset="fast") == "+0.20 [+0.18, +0.22]"
    assert against(*three(0.003)) == "+0.20 [-0.10, +0.50], agrees"


def test_a_claim_is_judged_by_the_difference_of_the_same_seeds() -> None:
    """Costs that vary with the seed, and a difference that hardly does."""
    section = tables.Section(
        "", "", (), "abstention", ("mine", "theirs"), {"fast": [("cifar10", "c=0.05")]}, 3, claims={"mine": ("theirs", "nobody")}
    )

    def cells(method: str, lower: float) -> list[dict]:
        found = [cell_of((0.0, 0.1 * (seed + 1) - lower, 1.0), seed, preset="fast") for seed in range(3)]
        for cell, wiggle in zip(found, (0.0, 0.001, -0.001), strict=True):
            cell["cell"] = cell["cell"] | {"method": method}
            cell["parts"][0]["natural_cost"]["estimate"] += wiggle if lower else 0.0
        return found

    [_, _, row] = tables.claims(section, [*cells("mine", 0.01), *cells("theirs", 0.0)], "fast")
    assert row == ("| mine | theirs | cifar10, c=0.05 | -1.00 [-1.25, -0.75], cheaper | +0.00 [+0.00, +0.00], undecided |")
    assert tables.claims(section, cells("mine", 0.01), "fast") == []


def test_committed_cells_were_made_as_the_scripts_make_them_now() -> None:
    """Else what a later run adds would stand beside them as something else."""
    for section in report.SECTIONS:
        records = Results(RESULTS).read_all(section.table)
        assert report._mixed(records_of(records, "laptop")) == []
        for record in records:
            cell, settings = record["cell"], record["settings"]
            if section.table == "regression":
                assert settings == json.loads(json.dumps(regression.settings(regression.PRESETS[cell["preset"]])))
            elif section.table == "realizable":
                assert settings == {"steps": realizable.STEPS[cell["preset"]]}
            elif "recipe" in settings:
                preset = (ABSTENTION if section.table == "abstention" else PRESETS)[cell["preset"]]
                assert settings["network"] == preset.network["cifar10"]
                ways = way_of({"recipe": settings["recipe"]}), way_of({"recipe": asdict(recipe_of(preset, cell["data"]))})
                made, now = ({key: value for key, value in way.items() if key not in PRECISION} for way in ways)
                assert made == now
                assert settings["rows"]["predictor"] == preset.predictor_rows


def records_of(records: list[dict], preset: str) -> list[dict]:
    return [record for record in records if record["cell"]["preset"] == preset]


def recipe_of(preset: Preset, data: str) -> Recipe:
    return replace(preset.recipe, augmented=data != "svhn")


def test_cells_of_several_settings_in_one_table_are_told() -> None:
    alike = [cell_of((0.0, 0.03, 0.1), seed) for seed in range(2)]
    assert report._mixed(alike) == []  # the precision is the machine's
    assert report._mixed([*alike, cell_of((0.0, 0.03, 0.1), 2, epochs=100)]) == ["cifar10"]
    other = cell_of((0.0, 0.03, 0.1), 2)
    other["settings"]["head_steps"] = 500
    assert report._mixed([*alike, other]) == ["cifar10"]


def test_every_script_says_claim_numbers_and_command() -> None:
    for script in SCRIPTS:
        name = script.__name__.rpartition(".")[2].replace("_", "-")
        assert f"python -m benchmarks {name}" in script.__doc__.splitlines()[0]
        assert "Claim:" in script.__doc__
        assert "ublished" in script.__doc__ or "recomputed" in script.__doc__


def test_published_figures_stand_in_the_docstrings() -> None:
    for script in (score_based, predictor_rejector):
        own = script.__doc__.replace("+-", "±")
        assert all(figure in own for (_, _, method), figure in script.PUBLISHED.items() if method != "two-stage score-based")
    for (_, _, _), error in people.PUBLISHED.items():
        assert f"{100 - float(error.split()[0]):.2f}" in people.__doc__


# --------------------------------------------------------------------------------------------------------- problems


@pytest.mark.parametrize("kind", simulated.KINDS)
def test_simulated_experts_are_what_their_kind_says(kind: str) -> None:
    skills = torch.stack([matrix.diagonal() for matrix in simulated.confusions(kind, 10)])
    assert skills.shape == (20, 10)
    if kind == "specialised":
        assert ((skills == 1).sum(-1) == 2).all()
        assert (skills[:5].amax(0) == 1).all()  # five of them know everything together
    elif kind == "overlapping":
        assert ((skills == 1).sum(-1) == 5).all()
        assert len(torch.unique(skills, dim=0)) > 10
    else:
        assert (skills == skills[:, :1]).all()
        assert ((skills >= 0.5) & (skills <= 0.95)).all()
        assert (len(torch.unique(skills[:, 0])) == 1) == (kind == "equal")


def test_a_smaller_group_of_experts_is_the_beginning_of_a_larger_one() -> None:
    rows = Rows(torch.arange(50), torch.randint(10, (50,)), torch.zeros(50, 1), torch.zeros(50, 10))
    many = simulated.answers(rows, "random", 16, 10, seed=2)
    assert torch.equal(simulated.answers(rows, "random", 4, 10, seed=2), many[:, :4])
    right = (many == rows.labels.unsqueeze(-1)).float()
    assert len(torch.unique(right, dim=1).T) > 10  # each errs on its own rows


def test_one_linear_rule_decides_the_realizable_problem_without_error() -> None:
    for seed in range(3):
        sample = realizable.one_expert(2000, seed, 0)
        label, region = torch.randn(2, 30, generator=torch.Generator().manual_seed(seed))
        asks = sample.x @ region > 0
        assert 0.02 < asks.float().mean() < 0.98
        assert (sample.costs[asks, 0] == 0).all()
        assert torch.equal(sample.targets[~asks], (sample.x @ label > 0)[~asks].long())
        weights = torch.randn(10, 3, generator=torch.Generator().manual_seed(seed))
        routed = realizable.three_models(2000, seed, 0)
        assert routed.costs.gather(1, (routed.x @ weights).argmax(-1, keepdim=True)).sum() == 0
        assert routed.costs.mean(0).min() > 0.2


def test_a_split_is_a_partition_and_inner_splits_leave_its_test_rows_out() -> None:
    parts = parts_of(101, 3)
    assert [len(part) for part in parts] == [50, 21, 10, 20]
    assert sorted(np.concatenate(parts)) == list(range(101))
    inner = parts_of(101, 3, inner=True)
    assert sorted(np.concatenate(inner)) == sorted(np.concatenate(parts[:3]))
    assert [len(part) for part in inner] == [40, 17, 8, 16]


def test_as_many_test_rows_have_a_twin_as_the_page_says(data_root: Path) -> None:
    said = regression.__doc__ or ""
    for name, file in regression.DATA.items():
        table = uci(data_root / "uci", file)
        rows = np.column_stack([table.features.numpy(), table.targets.numpy()])
        same = np.unique(rows, axis=0, return_inverse=True)[1].ravel()
        shares = []
        for split in range(regression.PRESETS["laptop"].splits):
            *others, test = parts_of(len(rows), split)
            shares.append(np.isin(same[test], same[np.concatenate(others)]).mean())
        share = f"{100 * np.mean(shares):.1f}".lstrip("0")
        assert (f"{share}% of {name}" in said or f"{share}% of the test rows of {name}" in said) == (share != ".0")


def test_an_expert_knows_a_third_and_is_judged_there_by_what_it_did_not_learn_from() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(300, 3)) * [10, 0, 0]
    target = features[:, 0] + generator.normal(size=300)
    rows = parts_of(300, 0)[0]
    answers = experts_answers(features, target, rows, seed=0)
    thirds = np.array_split(rows[np.argsort(features[rows, 0])], 3)
    own = [[np.square(answers[third, j] - target[third]).mean() for j in range(3)] for third in thirds]
    # In the third that it was trained on each is by far the best; the sign of a component may reverse their order.
    order = np.argmin(own, axis=1)
    assert sorted(order) == [0, 1, 2]
    # Nobody foresees the noise, whose variance is 1.
    assert min(np.min(row) for row in own) > 0.8
    # Elsewhere stand the answers of the expert itself.
    expert = GradientBoostingRegressor(random_state=0).fit(features[thirds[0]], target[thirds[0]])
    others = np.setdiff1d(np.arange(300), thirds[0])
    np.testing.assert_allclose(answers[others, order[0]], expert.predict(features[others]))


def test_what_a_training_row_is_answered_does_not_depend_on_its_own_target() -> None:
    generator = torch.Generator().manual_seed(0)

    def columns(count: int) -> Columns:
        x = torch.randn(2, count, 3, generator=generator)
        return Columns(torch.arange(count).expand(2, count), x, torch.randn(2, count, generator=generator), x)

    train, *others = (columns(count) for count in (203, 20, 10, 10))
    moved = replace(train, y=train.y.clone())
    moved.y[:, 7] += 100
    before, after = (
        regression.Problem(Splits(243, rows, *others), regression.Size(2, 3, 3)).learning.own for rows in (train, moved)
    )
    assert torch.equal(before[:, 7], after[:, 7])
    assert (before != after).float().mean() > 0.7  # four of five predictors have learned from it


@pytest.mark.ci_slow
def test_regression_on_a_set_whose_halves_belong_to_two_people(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(240, 2, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0])
    y = x[:, 0] * x[:, 1] + 0.1 * torch.randn(240, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(regression, "uci", lambda folder, name: RegressionTable(x, y, ("a", "b")))
    run(regression, "--data", "yacht", "--root", str(tmp_path), "--out", str(tmp_path))
    records = Results(tmp_path).read_all("regression")
    assert len(records) == 3 * 9 + 8
    costs = {(r["cell"]["cost"], r["cell"]["method"]): r["parts"][0]["cost"]["estimate"] for r in records}
    assert costs[regression.ABSTENTION, ALWAYS] == pytest.approx(0.1)
    assert costs["1 expert", NEVER] == costs["3 experts", NEVER]
    for setting in regression.COSTS:
        # Whoever keeps the same predictor's answers cannot be cheaper than hindsight.
        others = (NEVER, ALWAYS, "two-stage", regression.VARIANCE)
        assert all(costs[setting, regression.ORACLE] <= costs[setting, method] for method in others)
    never = next(r for r in records if r["cell"]["method"] == NEVER)["parts"][0]
    assert never["coverage"]["estimate"] == 1
    assert never["accepted_cost"]["estimate"] == pytest.approx(never["cost"]["estimate"])
    assert len(Results(tmp_path).samples(regression.Cell(**records[0]["cell"]))["cost0"]) <= 240


def tasks_of_two_halves(experts: int) -> Task:
    """The network is right on x > 0, expert 0 on x < 0; more experts are useless."""
    generator = torch.Generator().manual_seed(0)

    def asked(count: int) -> Asked:
        x = torch.randn(count, 2, generator=generator)
        labels = torch.randint(4, (count,), generator=generator)
        known = x[:, 0] > 0
        network = torch.where(known, labels, (labels + 1) % 4)
        scores = (3.0 * torch.nn.functional.one_hot(network, 4) + torch.randn(count, 4, generator=generator)).log_softmax(-1)
        answers = torch.stack([torch.where(known, (labels + 2) % 4, labels), *[(labels + 3) % 4] * (experts - 1)], dim=-1)
        return Asked(Rows(torch.arange(count), labels, torch.cat([x, scores], -1), scores), answers)

    return Task(asked(500), asked(300), asked(500), 0.05, 4, seed=0, steps=200)


@pytest.mark.parametrize("experts", [1, pytest.param(3, marks=pytest.mark.ci_slow)])
def test_every_method_learns_whom_to_ask_where_the_inputs_tell(experts: int) -> None:
    task = tasks_of_two_halves(experts)
    baselines = task.baselines()
    for name, method in METHODS.items():
        # The losses of one expert, and one method of each kind beside them.
        if (name in people.ONE_EXPERT) == (experts > 1) and name not in ("one-vs-all", "two-stage mu=2"):
            continue
        judged = method(task)
        assert judged.cost.mean() < 0.8 * min(baselines[NEVER].cost.mean(), baselines[ALWAYS].cost.mean()), name
        if experts > 1:
            assert judged.load[:, 0].mean() > 5 * judged.load[:, 1:].mean(), name


def test_the_docstrings_name_the_methods_that_are_trained_without_knowing_the_price() -> None:
    """Those whose natural threshold decides alike whatever the price is."""
    free = replace(tasks_of_two_halves(1), price=0.0, steps=5)
    dear = replace(free, price=0.9)
    alike = {name for name, method in METHODS.items() if torch.equal(method(free).natural_kept, method(dear).natural_kept)}
    for script, methods in ((multi_expert, multi_expert.METHODS), (people, people.LEARNED)):
        sentences = (script.__doc__ or "").replace("\n", " ").split(".  ")
        told = next(sentence for sentence in sentences if "without knowing the price" in sentence)
        assert {name for name in methods if name in told} == alike.intersection(methods)


# -------------------------------------------------------------------------------------------------------- tiny cells


@pytest.mark.ci_slow
def test_realizable_cells_are_skipped_when_they_are_finished(tmp_path: Path) -> None:
    arguments = ["--seeds", "1", "--cells", "2", "--out", str(tmp_path)]
    run(realizable, *arguments)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert len(files) == 2
    run(realizable, *arguments)
    assert len(list(tmp_path.rglob("*.json"))) == 4
    assert all(path.read_bytes() == content for path, content in files.items())
    record = json.loads(next(iter(files)).read_text())
    assert [part["at"] for part in record["parts"]] == [{"training rows": 100}, {"training rows": 200}]
    assert set(record["machine"]) >= {"commit", "torch", "device", "python"}


def test_no_time_is_a_clean_end(tmp_path: Path) -> None:
    run(realizable, "--seeds", "1", "--budget-minutes", "0", "--out", str(tmp_path))
    assert not list(tmp_path.rglob("*.json"))


def test_an_interrupt_ends_cleanly_and_says_how_to_continue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(realizable, "baselines", interrupt)
    result = CliRunner().invoke(realizable.command, ["--preset", "tiny", "--quiet", "--out", str(tmp_path)])
    assert result.exit_code == 130
    assert result.stderr == "stopped; the same command continues from the last checkpoint\n"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that a server of this machine gives out, with a small SVHN that torchvision takes for the real one."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    generator = np.random.default_rng(0)
    with ThreadingHTTPServer(("localhost", 0), partial(Quiet, directory=str(folder))) as server:
        files = {}
        for split, rows in (("train", 600), ("test", 200)):
            name = f"{split}_32x32.mat"
            pixels = generator.integers(0, 256, (32, 32, 3, rows), dtype=np.uint8)
            savemat(folder / name, {"X": pixels, "y": generator.integers(1, 11, (rows, 1), dtype=np.uint8)})
            md5 = hashlib.md5((folder / name).read_bytes()).hexdigest()
            files[split] = [f"http://localhost:{server.server_port}/{name}", name, md5]
        monkeypatch.setattr(import_torchvision().datasets.SVHN, "split_list", files)
        monkeypatch.setenv("no_proxy", "*")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield folder
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_svhn_is_downloaded_checked_and_run(mirror: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "cells"
    arguments = ["--data", "svhn", "--seeds", "1", "--root", str(root), "--out", str(out), "--cells", "5"]
    run(score_based, "--download", *arguments)
    records = {record["cell"]["method"]: record for record in Results(out).read_all("abstention")}
    assert len(records) == 5
    assert records["always abstain"]["parts"][0]["cost"]["estimate"] == pytest.approx(0.2)
    single = records["Mozannar-Sontag (mu=1)"]["settings"]
    assert single["speed"]["images_per_second"] > 0
    assert records["two-stage score-based"]["settings"]["first_stage"]["images_per_second"] > 0
    cell = Cell(**records["two-stage score-based"]["cell"])
    assert len(Results(out).samples(cell)["cost0"]) == 200
    # The loader: digit 0 is written as 10, and channels come last but one.
    written = loadmat(mirror / "train_32x32.mat")
    data = svhn(root, train=True)
    assert torch.equal(data.labels, torch.from_numpy(written["y"].astype(np.int64)).flatten() % 10)
    assert torch.equal(data.images[7, 2], torch.from_numpy(written["X"][:, :, 2, 7]))
    # What is there is not loaded again.
    for file in mirror.iterdir():
        file.unlink()
    run(score_based, "--download", *arguments[:-1], "1")


@pytest.mark.parametrize("fault", ["no network", "another file"])
def test_a_download_that_fails_says_what_to_do(mirror: Path, tmp_path: Path, fault: str) -> None:
    if fault == "no network":
        import_torchvision().datasets.SVHN.split_list["train"][0] = "http://localhost:1/train_32x32.mat"  # nobody listens there
    else:
        (mirror / "train_32x32.mat").write_bytes(b"another file")
    arguments = ["--preset", "tiny", "--quiet", "--data", "svhn", "--download", "--root", str(tmp_path), "--out", str(tmp_path)]
    result = CliRunner().invoke(score_based.command, arguments)
    assert result.exit_code == 1
    reason = {"no network": r"<urlopen error .*>", "another file": "File not found or corrupted."}[fault]
    what_to_do = r"without a network, copy the unpacked files there and leave --download out"
    assert re.search(rf"Error: svhn: could not be downloaded to .* \({reason}\); {what_to_do}", result.stderr)


def in_ci(script) -> bool:
    """Scripts on the same images differ by their losses: in CI one of them, the others with the slow tests."""
    return script not in (predictor_rejector, multi_expert, two_stage)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, marks=pytest.mark.ci_slow if in_ci(script) else pytest.mark.slow, id=script.__name__)
        for script in SCRIPTS
    ],
)
def test_two_tiny_cells_on_real_data(script, data_root: Path, tmp_path: Path) -> None:
    methods = {score_based: 6, predictor_rejector: 7, multi_expert: 9, two_stage: 8}.get(script, 5)
    seeds = () if script is regression else ("--seeds", "1")
    root = () if script is realizable else ("--root", str(data_root))
    run(script, *seeds, "--cells", str(methods), *root, "--out", str(tmp_path))
    records = [json.loads(path.read_text()) for path in tmp_path.rglob("*.json")]
    assert len(records) == methods
    for record in records:
        for part in record["parts"]:
            assert part["cost"]["low"] <= part["cost"]["estimate"] <= part["cost"]["high"]


@pytest.mark.slow
def test_a_script_killed_three_times_has_the_same_cells(data_root: Path, tmp_path: Path) -> None:
    def start(folder: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "benchmarks", "score-based", "--preset", "tiny", "--seeds", "1", "--data", "cifar10"]
        command += ["--root", str(data_root), "--out", str(tmp_path / folder), "--quiet"]
        return subprocess.Popen(command, cwd=Path(__file__).parent.parent, stderr=subprocess.DEVNULL)

    def killed_when(pattern: str, count: int) -> None:
        with start("killed") as process:
            while len(list((tmp_path / "killed").rglob(pattern))) < count and process.poll() is None:
                time.sleep(0.002)
            process.kill()
        assert process.returncode == -9

    killed_when("stage1*.pt", 1)
    killed_when("*_seed0.json", 3)
    killed_when("abstention*.pt", 1)
    for folder in ("killed", "whole"):
        with start(folder) as process:
            pass
        assert process.returncode == 0
    whole, other = ({p.name: p for p in (tmp_path / folder / "abstention").rglob("*.*")} for folder in ("whole", "killed"))
    assert set(whole) == set(other)
    for name, path in whole.items():
        if path.suffix == ".json":
            assert json.loads(path.read_text())["parts"] == json.loads(other[name].read_text())["parts"], name
        else:
            with np.load(path) as left, np.load(other[name]) as right:
                assert all(np.array_equal(left[key], right[key]) for key in left.files), name
