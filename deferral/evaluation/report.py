"""What a comparison leaves behind: a printed table, a JSON file of all figures, two pictures."""

import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import deferral
from deferral.evaluation.comparison import Comparison
from deferral.intervals import Interval
from deferral.plots import cost_coverage, new_figure, save_figure, who_answers

__all__ = ["draw", "save", "show"]


def show(comparison: Comparison) -> None:
    """Print the table, the paired differences and the notes."""
    table = Table(title=comparison.title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("method", no_wrap=True)
    shares = ("accuracy %", "coverage %", *(f"to {name} %" for name in comparison.experts))
    for heading in ("cost", *shares, f"cost of {comparison.reference} minus it"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, figures in comparison.figures.items():
        percentages = (figures.accuracy, figures.coverage, *figures.loads)
        cells = [_plus_minus(figures.cost, digits=3), *(_plus_minus(share, digits=1, scale=100) for share in percentages)]
        gap = figures.difference
        mark = "" if gap.excludes_zero() else "  tie"
        versus = "" if name == comparison.reference else f"{gap.estimate:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]{mark:5}"
        table.add_row(name, *cells, versus, style="bold" if name == comparison.reference else None)
    # A pipe or a narrow terminal must not break rows: the table's own width is the least.
    console = Console()
    console = Console(width=max(console.width, console.measure(table, options=console.options.update(width=400)).maximum))
    console.print(table)
    legend = (
        "cost: in errors per row, prices included.  accuracy: of the rows that get an answer.  ±: half the 95% bootstrap interval.",
        "last column: paired over the test rows, with its 95% interval; below 0, "
        f"{comparison.reference} is cheaper than the method of the row.",
    )
    for note in (*legend, *comparison.notes):
        console.print(note, highlight=False)


def save(comparison: Comparison, folder: Path) -> Path:
    """All figures with their intervals, settings and versions, as JSON."""
    record = {
        "title": comparison.title,
        "settings": comparison.settings,
        "versions": {"deferral": deferral.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "methods": {name: asdict(figures) for name, figures in comparison.figures.items()},
        "difference": f"cost of {comparison.reference} minus cost of the method",
        "notes": comparison.notes,
    }
    path = folder / f"{comparison.name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def draw(comparison: Comparison, folder: Path) -> list[Path]:
    """Write both pictures, cost against coverage and who answers what, and return their paths."""
    # What abstains leaves rows without an answer: it belongs in the table, not on one axis with those that answer all.
    shown = [m for m in comparison.methods if "abstain" not in m.name]
    curves = {m.name: m.curve for m in shown if m.curve is not None and not m.name.startswith("retrained")}
    points = {m.name: (float(m.kept.mean()), comparison.figures[m.name].cost) for m in shown}
    figure, axes = new_figure(9.0, 4.8)
    cost_coverage(axes, curves, points)
    axes.set_title(comparison.title, fontsize="small", loc="left")
    paths = [save_figure(figure, folder / f"{comparison.name}-cost-coverage.png")]

    best = comparison[comparison.reference]
    figure, axes = new_figure()
    who_answers(axes, best.actions, comparison.targets, ["the model", *comparison.experts], comparison.classes)
    axes.set_xlabel("true class")
    axes.tick_params(axis="x", labelrotation=0 if len(comparison.classes[0]) == 1 else 40)
    axes.set_title(
        f"Who answers what: {best.name}, cost {comparison.figures[best.name].cost.estimate:.3f}", fontsize="small", loc="left"
    )
    return [*paths, save_figure(figure, folder / f"{comparison.name}-who-answers.png")]


def _plus_minus(interval: Interval | None, *, digits: int, scale: float = 1) -> str:
    if interval is None:
        return "none"
    return f"{scale * interval.estimate:.{digits}f} ±{scale * interval.half_width:.{digits}f}"
