"""What all pictures share: figures, the marks that tell names apart without colour, whiskers, legends."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deferral.errors import installing
from deferral.intervals import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["HATCHES", "finite", "legend", "new_figure", "save_figure", "style", "whisker"]

# The ten of Matplotlib, then ten that are darker or paler: fifteen methods are no rarity.
_COLOURS = (
    *(f"C{number}" for number in range(10)),
    "#0b3c5d", "#8c4a00", "#0e5c2f", "#7a0c0c", "#3d2170", "#5ab4e6", "#e6ac00", "#8fce5a", "#ff8fa3", "#b9a3e3",
)  # fmt: skip
_LINES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (4, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "d", "h", "8")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "---", "+++", "|||", "**", "//..", "xx--")


def new_figure(width: float = 7.0, height: float = 4.5) -> "tuple[Figure, Axes]":
    """A figure with one pair of axes, outside pyplot's global state."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(f"pictures need Matplotlib: {installing('plots')}") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def save_figure(figure: "Figure", path: Path) -> Path:
    """Write the figure, as a PNG or in the format of the path's suffix (.pdf, .svg ..), and return the path."""
    # Without a format Matplotlib would add a suffix where there is none, and the path returned would not be the file.
    figure.savefig(path, dpi=150, format=path.suffix[1:].lower() or "png")
    return path


def style(number: int, colour: str | None = None) -> dict[str, Any]:
    """Colour, line and marker of a name; hollow markers once the filled ones are used up."""
    colour = colour or _COLOURS[number % len(_COLOURS)]
    hollow = number // len(_MARKERS) % 2
    return {
        "color": colour,
        "linestyle": _LINES[number % len(_LINES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markerfacecolor": "white" if hollow else colour,
    }


def finite(name: str, figure: Interval) -> Interval:
    """The figure, if it and its interval are numbers."""
    if not all(map(math.isfinite, (figure.estimate, figure.low, figure.high))):
        raise ValueError(f"{name}: expected a finite figure with a finite interval, got {figure}; leave it out of the picture")
    return figure


def whisker(axes: "Axes", at: float, figure: Interval, colour: str, *, horizontal: bool = False) -> None:
    """The interval of a figure as a line with caps."""
    # Around its own middle: a percentile interval need not hold the estimate.
    middle, half = (figure.low + figure.high) / 2, figure.half_width
    if horizontal:
        axes.errorbar(middle, at, xerr=half, fmt="none", ecolor=colour, elinewidth=1, capsize=3)
    else:
        axes.errorbar(at, middle, yerr=half, fmt="none", ecolor=colour, elinewidth=1, capsize=3)


def legend(axes: "Axes", *, size: str = "small") -> "Axes":
    """The legend beside the axes, where it hides nothing; its lines are long enough to show their dashes."""
    axes.legend(fontsize=size, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, handlelength=4)
    return axes
