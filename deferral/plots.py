"""Pictures: Matplotlib axes in and out, readable without colour (line styles, markers, hatches)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deferral.intervals import Interval
from deferral.metrics import CostCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["cost_coverage", "new_figure", "save_figure", "who_answers"]

_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "8")
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo")


def new_figure(width: float = 7.0, height: float = 4.5) -> "tuple[Figure, Axes]":
    """A figure with one pair of axes, outside pyplot's global state."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("pictures need Matplotlib: pip install 'deferral[plots]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def save_figure(figure: "Figure", path: Path) -> Path:
    """Write a PNG and return its path."""
    figure.savefig(path, dpi=150)
    return path


def cost_coverage(
    axes: "Axes",
    curves: Mapping[str, CostCurve],
    points: Mapping[str, tuple[float, Interval]],
) -> "Axes":
    """Mean cost against the share of rows kept: a curve per method over its threshold, a point with its interval per policy.

    `points` maps a name to (coverage, cost).
    """
    for number, (name, curve) in enumerate(curves.items()):
        axes.plot(
            curve.coverage.cpu(),
            curve.cost.cpu(),
            _LINES[number % len(_LINES)],
            color=f"C{number}",
            label=f"{name}, any threshold",
        )
    colours = {name: f"C{number}" for number, name in enumerate(curves)}
    for number, (name, (coverage, cost)) in enumerate(points.items()):
        axes.errorbar(
            coverage,
            cost.estimate,
            yerr=[[cost.estimate - cost.low], [cost.high - cost.estimate]],
            marker=_MARKERS[number % len(_MARKERS)],
            color=colours.get(name, "0.25"),
            linestyle="none",
            capsize=3,
            label=name,
            zorder=3,
        )
    axes.set_xlabel("coverage: share of rows that the model answers itself")
    axes.set_ylabel("cost per row, in errors")
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return axes


def who_answers(axes: "Axes", actions: Tensor, groups: Tensor, names: Sequence[str], group_names: Sequence[str]) -> "Axes":
    """Stacked bars: for each group of rows (the true class, say), the share answered by each action."""
    positions = torch.arange(len(group_names))
    table = torch.zeros(len(group_names), len(names)).index_put_(
        (groups.cpu(), actions.cpu()), torch.ones(len(actions)), accumulate=True
    )
    shares = table / table.sum(dim=-1, keepdim=True).clamp(min=1)
    bottom = torch.zeros(len(group_names))
    for number, name in enumerate(names):
        axes.bar(
            positions.tolist(),
            shares[:, number].tolist(),
            bottom=bottom.tolist(),
            label=name,
            color=f"C{number}",
            hatch=_HATCHES[number % len(_HATCHES)],
            edgecolor="white",
        )
        bottom = bottom + shares[:, number]
    axes.set_xticks(positions.tolist(), group_names)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of rows answered by")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return axes
