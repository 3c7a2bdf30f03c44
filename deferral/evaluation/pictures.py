"""The pictures of a comparison and of an evaluation, written as PNG files."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from deferral.evaluation.comparison import GRID, MODEL, Comparison
from deferral.plots import (
    cost_coverage,
    expert_load,
    methods_side_by_side,
    new_figure,
    reliability,
    risk_coverage,
    save_figure,
    who_answers,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from deferral.evaluation.evaluate import Evaluation

__all__ = ["draw", "draw_evaluation"]


def draw(comparison: Comparison, folder: Path, cost: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> list[Path]:
    """Cost against coverage, and who answers which class; their paths.  `cost`: ends of the curves of some methods on GRID."""
    shown = [m for m in comparison.methods if m.drawn]
    curves = {_plain(m.name): m.curve for m in shown if m.curve is not None}
    points = {_plain(m.name): (float(m.kept.mean()), comparison.figures[m.name].cost) for m in shown}
    figure, axes = new_figure(9.0, 4.8)
    cost_coverage(axes, curves, points, bands={_plain(name): ends for name, ends in (cost or {}).items()}, grid=GRID)
    if not comparison.classes:
        axes.set_ylabel("cost per row, in squared errors")
    axes.set_title(_plain(comparison.title), fontsize="small", loc="left")
    paths = [_save(figure, folder, comparison, "cost-coverage")]

    best, figures = comparison[comparison.reference], comparison.figures[comparison.reference]
    if comparison.classes and len(comparison.classes) <= 30:
        names = [
            MODEL,
            *map(_plain, comparison.experts),
            *(["nobody"] if int(best.actions.max()) > len(comparison.experts) else []),
        ]
        figure, axes = new_figure()
        who_answers(axes, best.actions, comparison.targets, names, list(map(_plain, comparison.classes)))
        axes.set_xlabel("true class")
        axes.tick_params(axis="x", labelrotation=0 if len(comparison.classes[0]) == 1 else 40)
        axes.set_title(f"Who answers what: {_plain(best.name)}, cost {figures.cost.estimate:.3f}", fontsize="small", loc="left")
        paths.append(_save(figure, folder, comparison, "who-answers"))
    return paths


def draw_evaluation(evaluation: "Evaluation", folder: Path) -> list[Path]:
    """The pictures of `draw`, and: risk against coverage, methods side by side, load and reliability of the experts."""
    comparison = evaluation.comparison
    paths = draw(comparison, folder, evaluation.cost)
    if evaluation.risk:
        figure, axes = new_figure()
        risk_coverage(
            axes,
            {_plain(name): curve for name, (curve, _, _) in evaluation.risk.items()},
            bands={_plain(name): (low, high) for name, (_, low, high) in evaluation.risk.items()},
            grid=GRID,
        )
        paths.append(_save(figure, folder, comparison, "risk-coverage"))
    figure, axes = new_figure(height=1.5 + 0.35 * len(comparison.methods))
    costs = {_plain(name): figures.cost for name, figures in comparison.figures.items()}
    label = f"cost per row; the line is {_plain(comparison.reference)}"
    methods_side_by_side(axes, costs, label, reference=costs[_plain(comparison.reference)].estimate)
    paths.append(_save(figure, folder, comparison, "methods"))
    if comparison.experts:
        figure, axes = new_figure(width=2.5 + 0.9 * len(comparison.experts))
        loads = comparison.figures[comparison.reference].loads
        expert_load(axes, dict(zip(map(_plain, comparison.experts), loads, strict=True)))
        paths.append(_save(figure, folder, comparison, "load"))
    for number, (name, (probability, right)) in enumerate(evaluation.probabilities.items()):
        figure, axes = new_figure(5.0, 5.0)
        reliability(axes, probability.unsqueeze(-1), right.unsqueeze(-1), [_plain(name)])
        kind = f"reliability-{name}"
        if _path(folder, comparison, kind) in paths:
            # "A b" and "A-b" have one name among files.
            kind += f"-{number}"
        paths.append(_save(figure, folder, comparison, kind))
    return paths


def _plain(name: str) -> str:
    # Matplotlib reads what stands between two dollar signs as a formula, and leaves names with a leading _ out of legends.
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _save(figure: "Figure", folder: Path, comparison: Comparison, kind: str) -> Path:
    return save_figure(figure, _path(folder, comparison, kind))


def _path(folder: Path, comparison: Comparison, kind: str) -> Path:
    return folder / (re.sub(r"[^\w.-]+", "-", f"{comparison.name}-{kind}") + ".png")
