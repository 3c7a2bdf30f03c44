"""The page of the published tables: current, complete, and true to the cells."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from click.testing import CliRunner

from benchmarks import multi_expert, people, predictor_rejector, realizable, regression, report, score_based, two_stage
from benchmarks.harness import tables
from benchmarks.harness.asking import NEVER
from benchmarks.harness.cells import Cell, Results
from benchmarks.harness.presets import ABSTENTION, PRESETS, Preset
from benchmarks.harness.running import RESULTS
from benchmarks.harness.settings import PRECISION, way_of
from benchmarks.harness.training import Recipe
from tests.bench_tables import SCRIPTS


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
    left_out = "1 cells of `laptop` on svhn; 1 cells of `tiny` on cifar10"
    assert f"Left out here, since this page has no place for them: {left_out}." in page
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
