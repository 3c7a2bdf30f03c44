"""Tables on a terminal."""

from rich.console import Console
from rich.table import Table

__all__ = ["print_whole"]

_WIDEST = 400


def print_whole(table: Table) -> None:
    """Print it at its own width: a narrow terminal, or a pipe, must not cut figures or break rows."""
    console = Console()
    own = console.measure(table, options=console.options.update(width=_WIDEST)).maximum
    Console(width=max(console.width, own)).print(table)
