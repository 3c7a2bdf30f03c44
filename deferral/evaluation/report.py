"""What a comparison or an evaluation leaves behind beside its pictures: printed tables, and a JSON file of all figures."""

import csv
import math
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape

import deferral
from deferral.evaluation.comparison import ABSTAIN, OWN, RESAMPLES, Comparison
from deferral.printed import plus_minus, print_whole, table_of
from deferral.strict_json import as_json
from deferral.whole_files import written_whole

if TYPE_CHECKING:
    from deferral.evaluation.evaluate import Evaluation

__all__ = ["save", "save_evaluation", "save_rows", "show", "show_evaluation"]


def show(comparison: Comparison) -> None:
    """Print the table, the paired differences and the notes."""
    cost_as = _cost_format(comparison, digits=3)
    shares = ("accuracy %", "coverage %", *(f"to {name} %" for name in comparison.experts))
    table = table_of(comparison.title, "method", "cost", *shares, f"cost of {comparison.reference} minus it")
    for name, figures in comparison.figures.items():
        percentages = (figures.accuracy, figures.coverage, *figures.loads)
        cells = [plus_minus(figures.cost, cost_as), *(plus_minus(share, "z.1f", scale=100) for share in percentages)]
        gap = figures.difference
        mark = "" if gap.excludes_zero() else "  tie"
        versus = f"{gap.estimate:+{cost_as}} [{gap.low:+{cost_as}}, {gap.high:+{cost_as}}]{mark:5}"
        reference = name == comparison.reference
        table.add_row(escape(name), *cells, "" if reference else versus, style="bold" if reference else None)
    print_whole(table)
    units = "units of one error.  accuracy: of the rows that get an answer" if comparison.classes else "squared errors"
    legend = (
        f"cost: per row, prices included, in {units}.  ±: half the {100 * comparison.level:g}%",
        f"bootstrap interval.  last column: paired over the test rows; below 0, {comparison.reference} is cheaper than the row.",
    )
    for note in (*legend, *comparison.notes):
        Console().print(note, highlight=False, markup=False, soft_wrap=True)


def show_evaluation(evaluation: "Evaluation") -> None:
    """Print the table of methods, the areas under their curves, and how far the probabilities can be believed."""
    show(evaluation.comparison)
    figure_as, level = _cost_format(evaluation.comparison, digits=4), f"{100 * evaluation.comparison.level:g}%"
    for title, rows in (("areas under the curves of the own loss", evaluation.areas), ("calibration", evaluation.calibration)):
        headings = list(dict.fromkeys(heading for figures in rows.values() for heading in figures))
        if not rows:
            continue
        table = table_of(f"\n{title}, ± half the {level} interval of {RESAMPLES} resamples", "", *headings)
        for name, figures in rows.items():
            table.add_row(escape(name), *(plus_minus(figures.get(heading), figure_as) for heading in headings))
        print_whole(table)


def save(comparison: Comparison, folder: Path) -> Path:
    """All figures with their intervals, settings and versions, as JSON."""
    return _write(_record(comparison), folder / (comparison.name + ".json"))


def save_evaluation(evaluation: "Evaluation", folder: Path) -> Path:
    """The same, with the areas and the calibration."""
    named = {
        kind: {name: {figure: asdict(interval) for figure, interval in figures.items()} for name, figures in rows.items()}
        for kind, rows in (("areas", evaluation.areas), ("calibration", evaluation.calibration))
    }
    return _write(_record(evaluation.comparison) | named, folder / (evaluation.comparison.name + ".json"))


def save_rows(evaluation: "Evaluation", folder: Path) -> Path:
    """Row by row who answers by each method, whether that is right, and what it costs, as CSV.

    `correct` is empty where nobody answers, and in regression; all three are where an expert is to answer who did not.
    """
    comparison = evaluation.comparison
    names = [OWN, *comparison.experts, ABSTAIN]
    path = folder / f"{comparison.name}-rows.csv"
    with written_whole(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        write = csv.writer(file)
        write.writerow(("row", "method", "who", "correct", "cost"))
        for method in comparison.methods:
            columns = (evaluation.rows + 1, method.actions, method.correct, method.cost)
            for row, action, correct, cost in zip(*(column.tolist() for column in columns), strict=True):
                right = "" if math.isnan(correct) else int(correct)
                known = ("", "", "") if math.isnan(cost) else (names[action], right, f"{cost:.6g}")
                write.writerow((row, method.name, *known))
    return path


def _record(comparison: Comparison) -> dict[str, Any]:
    return {
        "title": comparison.title,
        "settings": comparison.settings,
        "versions": {"deferral": deferral.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "methods": {name: asdict(figures) for name, figures in comparison.figures.items()},
        "difference": f"cost of {comparison.reference} minus cost of the method",
        "notes": comparison.notes,
    }


def _write(record: dict[str, Any], path: Path) -> Path:
    path.write_text(as_json(record), encoding="utf-8")
    return path


def _cost_format(comparison: Comparison, *, digits: int) -> str:
    """Errors have a unit; squared errors have that of the targets, of any size, and are written with significant digits."""
    return f"z.{digits}f" if comparison.classes else "z.4g"
