"""Methods compared: their curves over the threshold, and one figure of each side by side."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deferral.curves import Curve
from deferral.intervals import Interval
from deferral.plots.style import HATCHES, finite, legend, style, whisker

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["cost_coverage", "methods_side_by_side", "risk_coverage"]

# A mark at every eighth of a curve tells curves apart and leaves the line to be seen.
_MARKS = 8


def risk_coverage(
    axes: "Axes",
    curves: Mapping[str, Curve],
    *,
    bands: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    grid: Tensor | None = None,
) -> "Axes":
    """Mean loss of the rows that are kept against their share: a curve per method, from `risk_coverage_curve`.

    `bands` maps a name to the (low, high) ends of its interval at the coverages of `grid` (M,), or at the curve's own points.
    """
    if not curves:
        raise ValueError("curves: expected at least one, got none")
    _draw_curves(axes, curves, {name: name for name in curves}, bands, grid)
    axes.set_xlabel("coverage: share of rows that are answered")
    axes.set_ylabel("selective risk: mean loss of those rows")
    return _finish_coverage(axes)


def cost_coverage(
    axes: "Axes",
    curves: Mapping[str, Curve],
    points: Mapping[str, tuple[float, Interval]] | None = None,
    *,
    bands: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    grid: Tensor | None = None,
) -> "Axes":
    """Mean cost against the share of rows kept: a curve per method over its threshold, a point with its interval per policy.

    `points` maps a name to (coverage, cost).  `bands` are those of `risk_coverage`.
    """
    points = points or {}
    if not curves and not points:
        raise ValueError("curves and points: expected at least one, got none")
    _draw_curves(axes, curves, {name: f"{name}, any threshold" for name in curves}, bands, grid)
    numbers = {name: number for number, name in enumerate([*curves, *(name for name in points if name not in curves)])}
    for name, (coverage, cost) in points.items():
        if not math.isfinite(coverage):
            raise ValueError(f"{name}: expected a finite coverage, got {coverage}; leave it out of the picture")
        look = style(numbers[name], None if name in curves else "0.25")
        whisker(axes, coverage, finite(name, cost), look["color"])
        axes.plot(coverage, cost.estimate, **look | {"linestyle": "none", "markersize": 7}, label=name, zorder=3)
    axes.set_xlabel("coverage: share of rows that the model answers itself")
    axes.set_ylabel("cost per row, in errors")
    return _finish_coverage(axes)


def methods_side_by_side(axes: "Axes", figures: Mapping[str, Interval], label: str, *, reference: float | None = None) -> "Axes":
    """One figure of several methods as points with intervals, the first on top; `reference` draws a line to compare with.

    `label` names the figure and its unit.  Whether two methods on the same rows differ is seen from the intervals of their
    paired differences (`paired_difference`, reference 0), not from whether two intervals of this picture overlap.
    """
    if not figures:
        raise ValueError("figures: expected at least one method, got none")
    if reference is not None:
        axes.axvline(reference, color="0.4", linestyle="--", linewidth=1)
    for row, (name, figure) in enumerate(figures.items()):
        whisker(axes, row, finite(name, figure), "black", horizontal=True)
        axes.plot(figure.estimate, row, color="black", marker="o", linestyle="none")
    axes.set_yticks(range(len(figures)), list(figures))
    axes.set_ylim(len(figures) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    return axes


def _draw_curves(
    axes: "Axes",
    curves: Mapping[str, Curve],
    labels: Mapping[str, str],
    bands: Mapping[str, tuple[Tensor, Tensor]] | None,
    grid: Tensor | None,
) -> None:
    bands = bands or {}
    if set(bands) - set(curves):
        raise ValueError(f"bands: expected names among the curves {list(curves)}, got {sorted(set(bands) - set(curves))}")
    for number, (name, curve) in enumerate(curves.items()):
        if not isinstance(curve, Curve):
            raise TypeError(f"curve {name!r}: expected a Curve, as of risk_coverage_curve, got {type(curve).__name__}")
        coverage, value = _columns(name, coverage=curve.coverage, value=curve.value)
        step = math.ceil(len(coverage) / _MARKS)
        look = style(number)
        # Staggered, so that the marks of curves that meet do not hide each other.
        first = number * step // len(curves)
        axes.plot(coverage.tolist(), value.tolist(), **look, markersize=4, markevery=(first, step), label=labels[name])
        if name in bands:
            at, low, high = _columns(name, grid=curve.coverage if grid is None else grid, low=bands[name][0], high=bands[name][1])
            axes.fill_between(
                at.tolist(),
                low.tolist(),
                high.tolist(),
                facecolor=(look["color"], 0.12),
                edgecolor=(look["color"], 0.5),
                hatch=HATCHES[number % len(HATCHES)],
                linewidth=0.6,
            )


def _columns(curve: str, **columns: Any) -> list[Tensor]:
    table = [torch.as_tensor(column).detach().double().cpu() for column in columns.values()]
    if any(column.dim() != 1 or column.shape != table[0].shape for column in table) or len(table[0]) == 0:
        shapes = ", ".join(str(tuple(column.shape)) for column in table)
        raise ValueError(f"curve {curve!r}: expected {', '.join(columns)} as vectors of one length, got {shapes}")
    if not all(bool(column.isfinite().all()) for column in table):
        raise ValueError(f"curve {curve!r}: expected finite {', '.join(columns)}, got NaN or infinity")
    return table


def _finish_coverage(axes: "Axes") -> "Axes":
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    return legend(axes, size="x-small")
