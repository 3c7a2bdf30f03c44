"""What a run shows on the terminal: cell x of y, epochs, loss, time left; or one line a cell with --quiet."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from benchmarks.harness.cells import Cell

__all__ = ["Display"]


class Display:
    """Two bars, the cells and the epochs of the network in training, on stderr; nothing at all if `silent`."""

    def __init__(self, quiet: bool, *, silent: bool = False) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._console = Console(stderr=True, highlight=False, quiet=silent)
        # The time left comes from all that was done: a cell may take longer than any shorter memory.
        self._progress = Progress(*columns, console=self._console, disable=quiet or silent, speed_estimate_period=float("inf"))
        self._cells: TaskID | None = None
        self._epochs: TaskID | None = None
        self._network = ""

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def start(self, cells: Sequence[Cell], done: int) -> None:
        """The cells of a script, of which some are finished."""
        self._cells = self._progress.add_task("cells", total=len(cells), completed=done)

    def cell(self, cell: Cell) -> None:
        """A cell begins."""
        if self._cells is not None:
            self._progress.update(self._cells, description=f"{cell.data}, {cell.method}, {cell.cost}, seed {cell.seed}")

    def epoch(self, what: str, epoch: int, epochs: int, loss: float | None = None) -> None:
        """An epoch of a network is over, or a part of other long work, which has no loss."""
        if self._epochs is None:
            self._epochs = self._progress.add_task("", total=epochs)
        if what != self._network:
            self._progress.reset(self._epochs, total=epochs)
            self._network = what
        self._progress.update(
            self._epochs, completed=epoch, description=f"  {what}" if loss is None else f"  {what}, loss {loss:.4f}"
        )

    def finished(self, cell: Cell, record: dict[str, Any]) -> None:
        """A cell has its figures."""
        last = record["parts"][-1]["cost"]
        self.say(
            f"{cell.table}: {cell.data}, {cell.method}, {cell.cost}, seed {cell.seed}: cost {last['estimate']:.4f} "
            f"[{last['low']:.4f}, {last['high']:.4f}] in {record['wall_seconds']:.0f} s"
        )
        if self._cells is not None:
            self._progress.advance(self._cells)

    def say(self, line: str) -> None:
        """A line above the bars."""
        self._console.print(line, soft_wrap=True)
