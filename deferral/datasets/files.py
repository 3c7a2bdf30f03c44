"""Files of plain numbers and text, read with one error for whatever is wrong with them."""

import csv
import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deferral.errors import DataError

__all__ = ["NotFound", "existing", "numbers", "read_array", "read_columns"]


class NotFound(DataError):
    """Files are not in the folder that an argument names; `what` says which, for commands that name folders by options."""

    def __init__(self, what: str, argument: str) -> None:
        super().__init__(f"{what}; give the folder that holds them as `{argument}`")
        self.what = what


def existing(path: Path, what: str, argument: str) -> Path:
    """The path, if a file is there; else the error says what is missing, and in the folder of which argument."""
    if not path.is_file():
        raise NotFound(f"{what}: expected the file {path}, and it is not there", argument)
    return path


def read_array(path: Path, key: str | None) -> np.ndarray:
    """An array of integers from a .npy file, or the one of that name from an .npz file; never a pickle."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            array = loaded if key is None else loaded[key]
            if isinstance(loaded, np.ndarray) and file.read(1):
                raise ValueError("there are bytes beyond the array that its header tells of")
        if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"an array of integers, not {getattr(array, 'dtype', type(array).__name__)}")
        return array.astype(np.int64)
    except Exception as error:  # Damaged headers end in SyntaxError, TokenError, MemoryError, NotImplementedError and more.
        raise DataError(
            f"{path}: expected a NumPy file with plain arrays of integers, could not read it ({error}); copy it again"
        ) from error


def read_columns(path: Path, wanted: list[str] | None = None) -> dict[str, list[str]]:
    """The columns of a gzipped CSV file with a header, all or those wanted, in their order."""
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file, strict=True)
        absent = [name for name in wanted or [] if name not in header]
        if absent:
            raise ValueError(f"no column {', '.join(absent)}")
        columns = dict(zip(header, zip(*rows, strict=True), strict=True))
        return {name: list(columns[name]) for name in wanted or header}
    except (ValueError, OSError, EOFError, csv.Error, zlib.error) as error:
        raise DataError(
            f"{path}: expected a gzipped table with a header and rows of one length, could not read it ({error}); copy it again"
        ) from error


def numbers(path: Path, column: list[str], dtype: torch.dtype) -> Tensor:
    """The cells of a column as finite numbers: whole ones for int64, real ones else."""
    try:
        values = torch.tensor([int(cell) if dtype == torch.int64 else float(cell) for cell in column], dtype=dtype)
    except (ValueError, OverflowError, RuntimeError) as error:
        raise DataError(f"{path}: expected numbers, could not read one ({error}); copy it again") from error
    if not bool(values.isfinite().all()):
        raise DataError(f"{path}: expected finite numbers, got NaN or infinity; copy it again")
    return values
