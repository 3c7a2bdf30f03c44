"""The pictures of a comparison and of an evaluation, written as PNG files."""

from pathlib import Path

from deferral.evaluation.comparison import Comparison
from deferral.evaluation.evaluate import GRID, Evaluation
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

__all__ = ["draw", "draw_evaluation"]


def draw(comparison: Comparison, folder: Path) -> list[Path]:
    """Cost against coverage, and who answers which class; their paths."""
    # What abstains leaves rows without an answer: it belongs in the table, not on one axis with those that answer all.
    shown = [m for m in comparison.methods if "abstain" not in m.name]
    curves = {m.name: m.curve for m in shown if m.curve is not None and not m.name.startswith("retrained")}
    points = {m.name: (float(m.kept.mean()), comparison.figures[m.name].cost) for m in shown}
    figure, axes = new_figure(9.0, 4.8)
    cost_coverage(axes, curves, points)
    axes.set_title(comparison.title, fontsize="small", loc="left")
    paths = [save_figure(figure, folder / f"{comparison.name}-cost-coverage.png")]

    best, figures = comparison[comparison.reference], comparison.figures[comparison.reference]
    if comparison.classes and len(comparison.classes) <= 30:
        names = ["the model", *comparison.experts, *(["nobody"] if int(best.actions.max()) > len(comparison.experts) else [])]
        figure, axes = new_figure()
        who_answers(axes, best.actions, comparison.targets, names, comparison.classes)
        axes.set_xlabel("true class")
        axes.tick_params(axis="x", labelrotation=0 if len(comparison.classes[0]) == 1 else 40)
        axes.set_title(f"Who answers what: {best.name}, cost {figures.cost.estimate:.3f}", fontsize="small", loc="left")
        paths.append(save_figure(figure, folder / f"{comparison.name}-who-answers.png"))
    return paths


def draw_evaluation(evaluation: Evaluation, folder: Path) -> list[Path]:
    """The pictures of `draw`, and: risk against coverage, methods side by side, load and reliability of the experts."""
    comparison = evaluation.comparison
    paths = draw(comparison, folder)
    if evaluation.risk:
        figure, axes = new_figure()
        risk_coverage(
            axes,
            {name: curve for name, (curve, _, _) in evaluation.risk.items()},
            bands={name: (low, high) for name, (_, low, high) in evaluation.risk.items()},
            grid=GRID,
        )
        paths.append(save_figure(figure, folder / f"{comparison.name}-risk-coverage.png"))
    figure, axes = new_figure(height=1.5 + 0.35 * len(comparison.methods))
    costs = {name: figures.cost for name, figures in comparison.figures.items()}
    methods_side_by_side(axes, costs, "cost per row", reference=costs[comparison.reference].estimate)
    paths.append(save_figure(figure, folder / f"{comparison.name}-methods.png"))
    if comparison.experts:
        figure, axes = new_figure(height=1.5 + 0.35 * len(comparison.experts))
        expert_load(axes, dict(zip(comparison.experts, comparison.figures[comparison.reference].loads, strict=True)))
        paths.append(save_figure(figure, folder / f"{comparison.name}-load.png"))
    for name, (probability, right) in evaluation.probabilities.items():
        figure, axes = new_figure(5.0, 5.0)
        reliability(axes, probability.unsqueeze(-1), right.unsqueeze(-1), [name])
        paths.append(save_figure(figure, folder / f"{comparison.name}-reliability-{name.replace(' ', '-')}.png"))
    return paths
