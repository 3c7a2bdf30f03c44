"""A cell is one entry of a table: what was run, its figures in one JSON file, its per-sample outputs in an npz beside it.

A cell is finished when its JSON file is there and can be read; the file appears whole or not at all, so a run that is killed at
any moment loses no finished cell.  Claims are locks that end with their process: started twice, a command shares its cells.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deferral.datasets import DataError

__all__ = ["Cell", "NotFinite", "Results", "write_whole"]


class NotFinite(ValueError):
    """A figure of a cell is NaN or infinite."""


@dataclass(frozen=True)
class Cell:
    """What identifies one entry; `cost` names the costs of asking or abstaining, say "c=0.2"."""

    table: str
    data: str
    method: str
    cost: str
    seed: int
    preset: str

    @property
    def name(self) -> str:
        """The name of its files."""
        words = (re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-") for part in (self.data, self.method, self.cost))
        return "_".join([*words, f"seed{self.seed}"])


class Results:
    """A folder of cells: `<table>/<preset>/<cell>.json`, and `work/` for what may be thrown away."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"

    def path(self, cell: Cell) -> Path:
        """Where the JSON file of a cell lies."""
        return self.folder / cell.table / cell.preset / f"{cell.name}.json"

    def finished(self, cell: Cell) -> bool:
        """True if the cell has its figures; a file that cannot be read has none, and is written anew."""
        try:
            return self.path(cell).is_file() and bool(_read(self.path(cell)))
        except DataError:
            return False

    def record(self, cell: Cell) -> dict[str, Any]:
        """What is known of a finished cell."""
        return _read(self.path(cell))

    def begun(self) -> bool:
        """True if there is a finished cell, or work that a run would continue from."""
        kept = ("*/*/*.json", "work/*.pt", "work/*.npz", "work/experts/*.npy")
        return any(any(self.folder.glob(pattern)) for pattern in kept)

    def write(self, cell: Cell, record: Mapping[str, Any], samples: Mapping[str, np.ndarray]) -> None:
        """The per-sample outputs first, then the figures, which make the cell a finished one.

        NotFinite, and nothing written, where a figure is not a finite number: JSON has no word for it.
        """
        path = self.path(cell)
        try:
            text = _lines({"cell": asdict(cell), **record})
        except ValueError as error:
            raise NotFinite(f"expected finite figures ({error})") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(path.with_suffix(".npz")) as unfinished:
            np.savez_compressed(unfinished, **samples)
        with write_whole(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")

    def read_all(self, table: str) -> list[dict[str, Any]]:
        """The records of all finished cells of a table, in the order of their names.

        DataError for a file that is not whole, or lies where another cell belongs.
        """
        records, unreadable = [], []
        for path in sorted((self.folder / table).glob("*/*.json")):
            try:
                record = _read(path)
            except DataError:
                unreadable.append(str(path))
                continue
            cell = Cell(**record["cell"])
            if self.path(cell) != path:
                raise DataError(f"{path}: expected the figures of the cell that it is named after, found those of {cell}")
            records.append(record)
        if unreadable:
            raise DataError(f"{', '.join(unreadable)}: no finished cell; run the experiment again, which replaces it")
        return records

    def samples(self, cell: Cell) -> dict[str, np.ndarray]:
        """The per-sample outputs of a finished cell, where they are still on this machine."""
        with np.load(self.path(cell).with_suffix(".npz"), allow_pickle=False) as arrays:
            return dict(arrays)

    def checkpoint(self, cell: Cell) -> Path:
        """Where an unfinished cell keeps its training."""
        return self.work / f"{cell.table}-{cell.preset}-{cell.name}.pt"

    @contextmanager
    def claim(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Hold the lock of that name; False where another process holds it and `wait` is not set."""
        path = self.work / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


def _read(path: Path) -> dict[str, Any]:
    """The record in the file of a cell.  Raises DataError where it is not whole."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        Cell(**record["cell"])
        if not [part["cost"] for part in record["parts"]]:
            raise ValueError("it has no figures")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no finished cell; run the experiment again, which replaces it") from error
    return record


def _lines(record: Mapping[str, Any]) -> str:
    """JSON with a line for each entry, and for each item of a list: short, and readable in a diff."""
    written = partial(json.dumps, allow_nan=False)
    entries = []
    for key, value in record.items():
        if isinstance(value, list):
            items = ",\n  ".join(written(item) for item in value)
            entries.append(f" {written(key)}: [\n  {items}\n ]")
        else:
            entries.append(f" {written(key)}: {written(value)}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` when the block ends well, so that no reader ever sees half a file.

    One writer at a time, which claims see to: what a killed one leaves, the next one writes over, as it would not under the names
    of `deferral.whole_files`, of which each process has its own.
    """
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        yield partial
        # Else a power failure may leave the new name without the content.
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
