"""Experts in pictures: can their predicted skill be believed, how often are they asked, and for what."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deferral.arrays import numpy_or_torch
from deferral.intervals import Interval
from deferral.plots.style import HATCHES, finite, legend, style, whisker
from deferral.reliability import reliability as reliability_table
from deferral.validation import require_level, require_tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["expert_load", "reliability", "who_answers", "who_answers_map"]

# In points, around a mark: the counts of neighbouring experts stand on different sides of it.
_COUNT_PLACES = ((5, -6), (-5, 6), (5, 6), (-5, -6))


@numpy_or_torch
def reliability(
    axes: "Axes",
    predicted: Tensor,
    right: Tensor,
    names: Sequence[str],
    *,
    mask: Tensor | None = None,
    bins: int = 10,
    level: float = 0.95,
) -> "Axes":
    """Predicted P(right) against how often each expert is right, bin by bin, the rows of a bin beside its point.  (N, E) twice

    Bins are those of `deferral.reliability`; the interval is Wilson's score interval for a share ("Probable inference", 1927).
    `mask` (N, E) is True where the expert's answer is known.
    """
    require_tensor("predicted", predicted)
    require_tensor("right", right)
    if predicted.dim() != 2 or predicted.shape != right.shape or predicted.shape[-1] != len(names):
        raise ValueError(
            f"predicted and right: expected (N, E), one column for each of {len(names)} names, got {tuple(predicted.shape)} and "
            f"{tuple(right.shape)}"
        )
    require_level(level)
    known = torch.ones_like(predicted, dtype=torch.bool) if mask is None else mask.expand(predicted.shape)
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    for number, name in enumerate(names):
        look = style(number)
        if not bool(known[:, number].any()):
            axes.plot([], [], **look, label=f"{name} (no known answer)")
            continue
        table = reliability_table(predicted[:, number], right[:, number], bins=bins, mask=known[:, number])
        low, high = _wilson(table.observed, table.count, level)
        x, y = table.predicted.tolist(), table.observed.tolist()
        axes.plot(x, y, **look, markersize=5, label=f"{name} ({int(table.count.sum())} rows)")
        axes.errorbar(
            x,
            ((low + high) / 2).tolist(),
            yerr=((high - low) / 2).tolist(),
            fmt="none",
            ecolor=look["color"],
            elinewidth=1,
            capsize=3,
        )
        side, height = _COUNT_PLACES[number % len(_COUNT_PLACES)]
        for at, observed, count in zip(x, y, table.count.tolist(), strict=True):
            axes.annotate(
                f"{int(count)}",
                (at, observed),
                (side, height),
                textcoords="offset points",
                horizontalalignment="left" if side > 0 else "right",
                verticalalignment="center",
                fontsize="xx-small",
                color=look["color"],
            )
    axes.set_xlabel("predicted probability of a right answer")
    axes.set_ylabel("share of right answers")
    axes.set_xlim(-0.05, 1.05)
    axes.set_ylim(-0.05, 1.05)
    axes.set_aspect("equal")
    return legend(axes)


def expert_load(axes: "Axes", loads: Mapping[str, Interval], *, capacity: Mapping[str, float] | None = None) -> "Axes":
    """Bars: the share of rows that each expert is asked, with its interval; a line where its capacity ends.

    `loads` are intervals of `deferral.metrics.load`, column by column; `capacity` is in shares of the rows too.
    """
    if not loads:
        raise ValueError("loads: expected at least one expert, got none")
    unknown = sorted(set(capacity or {}) - set(loads))
    if unknown:
        raise ValueError(f"capacity: expected names among the loads {list(loads)}, got {unknown}")
    for row, (name, share) in enumerate(loads.items()):
        axes.bar(row, finite(name, share).estimate, color="0.8", edgecolor="black", width=0.7)
        whisker(axes, row, share, "black")
        if capacity and name in capacity:
            axes.plot([row - 0.45, row + 0.45], [capacity[name]] * 2, color="black", linestyle="--", linewidth=2)
    if capacity:
        axes.plot([], [], color="black", linestyle="--", linewidth=2, label="capacity")
        legend(axes)
    axes.set_xticks(range(len(loads)), list(loads))
    axes.set_xlim(-0.75, len(loads) - 0.25)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("share of rows that the expert is asked")
    return axes


@numpy_or_torch
def who_answers(axes: "Axes", actions: Tensor, groups: Tensor, names: Sequence[str], group_names: Sequence[str]) -> "Axes":
    """Stacked bars: for each group of rows (the true class, say), the share answered by each action.  (N,), (N,)"""
    _check_rows("groups", groups, len(groups), len(group_names))
    _check_rows("actions", actions, len(groups), len(names))
    positions = torch.arange(len(group_names))
    cells = torch.bincount(groups.cpu() * len(names) + actions.cpu(), minlength=len(group_names) * len(names))
    table = cells.reshape(len(group_names), len(names)).double()
    shares = table / table.sum(dim=-1, keepdim=True).clamp(min=1)
    bottom = torch.zeros(len(group_names), dtype=torch.float64)
    for number, name in enumerate(names):
        axes.bar(
            positions.tolist(),
            shares[:, number].tolist(),
            bottom=bottom.tolist(),
            label=name,
            color=f"C{number}",
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor="white",
        )
        bottom = bottom + shares[:, number]
    axes.set_xticks(positions.tolist(), list(group_names))
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of rows answered by")
    return legend(axes)


@numpy_or_torch
def who_answers_map(axes: "Axes", points: Tensor, actions: Tensor, names: Sequence[str]) -> "Axes":
    """The rows on a map of the inputs, with the marker of whoever answers.  (N, 2), (N,)

    `points` come from `embed_2d` or from any other embedding into two dimensions.
    """
    require_tensor("points", points)
    if points.dim() != 2 or points.shape[-1] != 2:
        raise ValueError(f"points: expected (N, 2), got shape {tuple(points.shape)}; embed_2d(features) makes them")
    if not bool(points.isfinite().all()):
        raise ValueError("points: expected finite coordinates, got NaN or infinity")
    _check_rows("actions", actions, len(points), len(names))
    places, taken = points.detach().double().cpu(), actions.cpu()
    for number, name in enumerate(names):
        rows = places[taken == number]
        look = style(number)
        axes.scatter(
            rows[:, 0].tolist(),
            rows[:, 1].tolist(),
            s=22,
            marker=look["marker"],
            facecolors=look["markerfacecolor"],
            edgecolors="black",
            linewidths=0.4,
            alpha=0.8,
            label=f"{name} ({len(rows)} rows)",
        )
    axes.set_xticks([])
    axes.set_yticks([])
    return legend(axes)


def _wilson(share: Tensor, count: Tensor, level: float) -> tuple[Tensor, Tensor]:
    z = math.sqrt(2) * torch.special.erfinv(torch.tensor(level, dtype=torch.float64)).item()
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)).sqrt()
    return middle - half, middle + half


def _check_rows(name: str, indices: Tensor, rows: int, count: int) -> None:
    require_tensor(name, indices)
    if indices.dtype != torch.int64 or indices.shape != (rows,):
        raise ValueError(f"{name}: expected int64 indices of shape ({rows},), got {indices.dtype} {tuple(indices.shape)}")
    if rows and not 0 <= int(indices.min()) <= int(indices.max()) < count:
        raise ValueError(
            f"{name}: expected indices in 0..{count - 1}, one for each name, got {int(indices.min())}..{int(indices.max())}"
        )
