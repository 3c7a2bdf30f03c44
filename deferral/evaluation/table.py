"""A table in a file, cell by cell as it was written, so that whatever is wrong with it can be named by row and column."""

import csv
import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from deferral.errors import DataError, installing

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv
    import pyarrow.parquet
except ModuleNotFoundError as error:
    raise ImportError(f"reading tables of outputs needs pyarrow: {installing('evaluate')}") from error

__all__ = ["Table"]

_WHOLE = re.compile(r"(-?\d+)\.0+")
_INDEX = re.compile(r"__index_level_\d+__")
_EMPTY = {"", "nan", "NaN", "NA", "null", "None"}


class Table:
    """A .csv file with a header, or a .parquet file.  Rows are counted from 1, the header of a CSV file is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        readers = {".csv": _read_csv, ".parquet": _read_parquet}
        if path.suffix.lower() not in readers:
            raise DataError(
                f"{path}: expected a name that ends in .csv or .parquet; pandas.DataFrame(columns).to_parquet(...) writes one"
            )
        table = readers[path.suffix.lower()](path)
        table = table.select([place for place, name in enumerate(table.column_names) if not _is_index(place, name)])
        self.names = [name.strip() for name in table.column_names]
        if repeated := {name for name in self.names if self.names.count(name) > 1}:
            raise DataError(f"{path}: column {min(repeated)!r} is there twice")
        if len(table) == 0:
            raise DataError(f"{path}: expected at least one row below the names of the columns")
        self._columns = dict(zip(self.names, table.columns, strict=True))
        self._text: dict[str, list[str]] = {}

    def text(self, name: str) -> list[str]:
        """The cells as text, "" where there is none (empty, null or NaN)."""
        if name not in self._text:
            column = self._columns[name]
            try:
                cells = _as_text(column).to_pylist()
            except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
                raise DataError(f"{self.path}: column {name!r}: expected text or numbers, got {column.type}") from error
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self.path}: column {name!r}: a text in it is not UTF-8 ({error.reason}: {error.object[:40]!r}); write it "
                    "as UTF-8"
                ) from error
            stripped = [(cell or "").strip() for cell in cells]
            if (broken := next((row for row, cell in enumerate(stripped) if "\0" in cell), None)) is not None:
                raise self.bad(broken, name, "text without the character NUL")
            self._text[name] = ["" if cell in _EMPTY else cell for cell in stripped]
        return self._text[name]

    def labels(self, name: str) -> list[str]:
        """The cells as labels: 1.0 is 1, which tools write where another cell of the column was empty.

        DataError for whole numbers in a floating column so large that it holds only some of them: it may have rounded others.
        """
        cells, column = self.text(name), _plain(self._columns[name])
        if pa.types.is_floating(column.type):
            digits = {16: 11, 32: 24, 64: 53}[column.type.bit_width]
            large = abs(pc.cast(column, pa.float64()).to_numpy()) >= 2.0**digits
            if large.any():
                expected = f"a label below 2^{digits} (from there {column.type} rounds whole numbers; write integers or text)"
                raise self.bad(int(large.argmax()), name, expected)
        return [match[1] if (match := _WHOLE.fullmatch(cell)) else cell for cell in cells]

    def numbers(self, name: str, *, empty: bool = False, closed: bool = False) -> np.ndarray:
        """The column as float64.  NaN for an empty cell where those are allowed, -inf where actions may be closed."""
        numbers = np.empty(len(self.text(name)))
        for row, cell in enumerate(self.text(name)):
            try:
                numbers[row] = float(cell) if cell else math.nan
            except ValueError:
                raise self.bad(row, name, "a number") from None
        wrong = np.isinf(numbers) & ~(np.isneginf(numbers) & closed) | (np.isnan(numbers) & (not empty))
        if wrong.any():
            raise self.bad(int(wrong.argmax()), name, "a finite number")
        return numbers

    def bad(self, row: int, name: str, expected: str) -> DataError:
        """The error about one cell; rows from 0 here."""
        cell = self._columns[name][row].as_py()
        return DataError(
            f"{self.path}: row {row + 1}, column {name!r}: expected {expected}, got {'' if cell is None else cell!r}"
        )


def _plain(column: Any) -> Any:
    """The values themselves where the column is a dictionary of them, as of a pandas categorical."""
    return pc.cast(column, column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _as_text(column: Any) -> Any:
    """The column cast to text.  Whole floating numbers as integers are: Arrow writes 1e+10 from ten digits on."""
    plain = _plain(column)
    text = pc.cast(plain, pa.string())
    if not pa.types.is_floating(plain.type):
        return text
    numbers = pc.cast(plain, pa.float64())
    # Every whole number below 2^53 is exact.
    whole = pc.and_(pc.equal(pc.trunc(numbers), numbers), pc.less(pc.abs(numbers), 2.0**53))
    digits = pc.cast(pc.cast(pc.if_else(whole, numbers, 0.0), pa.int64()), pa.string())
    return pc.if_else(whole, digits, text)


def _is_index(place: int, name: str) -> bool:
    """Whether it is the index of a pandas frame, which its writers add: without a name in CSV, under a made one in Parquet."""
    return (place == 0 and not name.strip()) or bool(_INDEX.fullmatch(name))


def _read_csv(path: Path) -> Any:
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n") + b"\n"
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start)
        where = f"row {line}" if line else "the header"
        raise DataError(f"{path}: {where} is not UTF-8 ({error.reason}); save the file as UTF-8") from error
    ragged: list[Any] = []

    def note(row: Any) -> str:
        ragged.append(row)
        return "error"

    parse = pa.csv.ParseOptions(invalid_row_handler=note, ignore_empty_lines=False, newlines_in_values=True)
    # One thread: only then is the number of a ragged row known.
    read = pa.csv.ReadOptions(use_threads=False)
    try:
        header = next(csv.reader(io.StringIO(content.decode(), newline="")))
        convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False)
        return pa.csv.read_csv(pa.BufferReader(content), read_options=read, parse_options=parse, convert_options=convert)
    except (pa.ArrowInvalid, csv.Error) as error:
        if ragged:
            row = ragged[0]
            raise DataError(
                f"{path}: row {row.number - 1}: expected {row.expected_columns} cells, as in the header, got "
                f"{row.actual_columns}: {row.text!r}"
            ) from error
        raise DataError(f"{path}: cannot be read as csv: {error}") from error


def _read_parquet(path: Path) -> Any:
    try:
        return pa.parquet.read_table(path)
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from error
