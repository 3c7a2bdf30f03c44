"""Tables of figures on a terminal."""

import math
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from deferral.intervals import Interval

__all__ = ["plus_minus", "print_whole", "table_of"]

_WIDEST = 400


def table_of(title: str, *headings: str) -> Table:
    """A column of names, and one of figures for each other heading."""
    table = Table(title=escape(title) or None, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(escape(heading), justify="right" if place else "left", no_wrap=place == 0)
    return table


def plus_minus(interval: "Interval | None", written: str, *, scale: float = 1) -> str:
    """The estimate and half of its interval, as the format says, or the estimate alone where it has none."""
    if interval is None:
        return "none"
    if math.isnan(interval.half_width):
        return f"{scale * interval.estimate:{written}}"
    return f"{scale * interval.estimate:{written}} ±{scale * interval.half_width:{written}}"


def print_whole(table: Table) -> None:
    """Print it at its own width: a narrow terminal, or a pipe, must not cut figures or break rows."""
    console = Console()
    own = console.measure(table, options=console.options.update(width=_WIDEST)).maximum
    Console(width=max(console.width, own)).print(table)
