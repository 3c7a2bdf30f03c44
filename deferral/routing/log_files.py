"""Logs in files: JSON Lines and Parquet, read and written in a stream, and CSV, which is read.

One outcome a line or row, with the fields of `Outcome`.  query, expert, quality and price must be there; a number that is not
known is left out, null or NaN, in CSV an empty cell; a confidence is an object of its numbers.  Fields of other names are an
error, so that a misspelt one is not lost.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deferral.errors import DataError, installing
from deferral.routing.confidence import Confidence
from deferral.routing.outcomes import DOUBLE, FIELDS, NUMBERS, Log, Outcome
from deferral.whole_files import written_whole

__all__ = ["JSON_LINES", "check_log_name", "read_log", "write_log"]

# Endings of files that hold one object a line.
JSON_LINES = (".jsonl", ".ndjson")

_REQUIRED = ("query", "expert", "quality", "price")
# The index of pandas in CSV, in CSV that was read and written again, and in Parquet.
_INDEX = {"", "Unnamed: 0", "__index_level_0__"}
_CHUNK = 20_000


def read_log(path: str | Path, *, on_rows: Callable[[int], None] = lambda rows: None) -> Log:
    """Read a log from a file that ends in .jsonl, .ndjson, .parquet or .csv (UTF-8, commas, names in the first line).

    DataError names the file, the row (from 1) and the field.  A last line of JSON that was cut off is an error too: it says how
    many whole rows stand before it.  Calls `on_rows(rows read)` as it goes on.
    """
    path = Path(path)
    readers = {**dict.fromkeys(JSON_LINES, _read_jsonl), ".parquet": _read_parquet, ".csv": _read_csv}
    if (rows := readers.get(path.suffix.lower())) is None:
        raise DataError(f"{path}: expected a log, a name that ends in {', '.join(readers)}")
    log = Log()
    for number, row in enumerate(rows(path), start=1):
        try:
            _check_names(number, row)
            log.add_row(number, row)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        if number % _CHUNK == 0:
            on_rows(number)
    if len(log) == 0:
        raise DataError(f"{path}: the log holds no outcome; expected at least one row")
    return log


def write_log(log: Log, path: str | Path, *, private: bool = False) -> None:
    """Write a log to a file that ends in .jsonl, .ndjson or .parquet; a file that is there is replaced when all is written.

    A new one can be read by its owner alone where it is `private`.
    """
    path = Path(path)
    write = _write_parquet if _is_parquet(path) else _write_jsonl
    if not path.parent.is_dir():
        raise DataError(f"{path.parent}: expected the folder for {path.name}, there is none; make it first")
    with written_whole(path, private=private) as partial:
        write(log, partial)


def check_log_name(path: Path) -> None:
    """DataError where no log could be written there."""
    _is_parquet(path)
    if not path.parent.is_dir():
        raise DataError(f"{path}: there is no folder {path.parent}; make it, or name another file")


def _is_parquet(path: Path) -> bool:
    if path.suffix.lower() not in (*JSON_LINES, ".parquet"):
        note = "; CSV can be read, but not written" if path.suffix.lower() == ".csv" else ""
        raise DataError(f"{path}: expected a name that ends in {', '.join(JSON_LINES)} or .parquet{note}")
    return path.suffix.lower() == ".parquet"


def _check_names(number: int, row: dict) -> None:
    strange, known = [str(name) for name in row if name not in FIELDS], f"the fields are {', '.join(FIELDS)}"
    for name in _REQUIRED:
        if row.get(name) is None:
            beside = f"; not known: {', '.join(strange)}"[:200] if strange else ""
            raise DataError(f"row {number}, {name}: it is missing{beside}; {known}")
    if strange:
        raise DataError(f"row {number}, {strange[0]}: it is not known; {known}")


def _read_jsonl(path: Path) -> Iterator[dict]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.strip():
                    if any(later.strip() for later in lines):
                        raise DataError(f"{path}: row {number}: expected one JSON object, got an empty line; remove it") from None
                    return
                if line.endswith(b"\n") or not isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
                    raise DataError(f"{path}: row {number}: expected one JSON object, {error}") from None
                raise DataError(
                    f"{path}: row {number}: the last line is cut off; the {number - 1} rows before it are whole.  Remove it "
                    "if the writer was stopped"
                ) from None
            if not isinstance(row, dict):
                raise DataError(f"{path}: row {number}: expected a JSON object, got {line[:60]!r}")
            yield row


def _read_csv(path: Path) -> Iterator[dict]:
    fields = [name for name in FIELDS if name != "confidence"]
    # A spreadsheet's cell may hold a long query with line ends, and its file begins with a mark.
    csv.field_size_limit(1 << 27)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        try:
            rows = csv.reader(lines, strict=True)
            head = next(rows, [])
            if wrong := _wrong_head(head, fields):
                raise DataError(f"{path}: expected a first line of columns among {', '.join(fields)}, with commas; {wrong}")
            for number, cells in enumerate(rows, start=1):
                if not cells:
                    continue
                if len(cells) != len(head):
                    raise DataError(f"{path}: row {number}: expected {len(head)} cells, got {len(cells)}")
                yield {name: _cell(path, number, name, cell) for name, cell in zip(head, cells, strict=True)}
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: expected CSV in UTF-8, {error}") from error


def _wrong_head(head: list[str], fields: Sequence[str]) -> str:
    """What is wrong with the names of columns, in words; "" if nothing is."""
    found = {
        "missing": [name for name in _REQUIRED if name not in head],
        "not known": [name for name in head if name not in fields],
        "twice": [name for name in fields if head.count(name) > 1],
    }
    index = ["a column without a name is the index of pandas: write it with index=False"] if _INDEX & set(head) else []
    return "; ".join([f"{what}: {', '.join(map(repr, names))[:200]}" for what, names in found.items() if names] + index)


def _cell(path: Path, number: int, name: str, cell: str) -> Any:
    """A number, or a text (tags are one, as it stands); None where a number is not known."""
    if name in ("query", "expert", "tags"):
        return cell
    if name == "quality" and cell.upper() in ("TRUE", "FALSE"):
        return cell.upper() == "TRUE"
    try:
        # Python would take 1_0 for ten.
        return float(cell.replace("_", "?")) if cell.strip() else None
    except ValueError:
        raise DataError(f"{path}: row {number}, {name}: expected a number, got {cell[:60]!r}") from None


def _read_parquet(path: Path) -> Iterator[dict]:
    pa = _pyarrow()
    try:
        with pa.parquet.ParquetFile(path) as file:
            if wrong := _wrong_head(file.schema_arrow.names, FIELDS):
                raise DataError(f"{path}: expected columns among {', '.join(FIELDS)}; {wrong}")
            for batch in file.iter_batches(batch_size=_CHUNK):
                yield from batch.to_pylist()
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: a text in it is not UTF-8 ({error.reason}: {error.object[:40]!r}); write it as UTF-8"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


def _row(outcome: Outcome) -> dict:
    values = {name: getattr(outcome, name) for name in NUMBERS}
    known = {name: _shortest(name, value) for name, value in values.items() if not np.isnan(value)}
    row = {"query": outcome.query, "expert": outcome.expert, **known, **({"tags": list(outcome.tags)} if outcome.tags else {})}
    if outcome.confidence is None:
        return row
    return {**row, "confidence": {name: value for name, value in outcome.confidence._asdict().items() if value == value}}


def _shortest(name: str, value: float) -> float:
    """0.3 was stored in 32 bits: the shortest decimal that stands for it, not 0.30000001192092896."""
    return value if name in DOUBLE else float(str(np.float32(value)))


def _write_jsonl(log: Log, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for outcome in log:
            # Lone surrogates, which UTF-8 cannot hold, are written as escapes.
            file.write(json.dumps(_row(outcome)) + "\n")


def _write_parquet(log: Log, path: Path) -> None:
    pa = _pyarrow()
    numbers = [(name, pa.float64() if name in DOUBLE else pa.float32()) for name in NUMBERS]
    sure = [("confidence", pa.struct([(name, pa.float64()) for name in Confidence._fields]))] if log.confidences else []
    schema = pa.schema([("query", pa.string()), ("expert", pa.string()), *numbers, ("tags", pa.list_(pa.string())), *sure])
    with pa.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(log), _CHUNK):
            rows = [_row(log[number]) for number in range(start, min(start + _CHUNK, len(log)))]
            try:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
            except UnicodeEncodeError as error:
                raise DataError(
                    f"rows {start + 1} to {start + len(rows)}: {error.object[:40]!r} holds half a surrogate pair, which Parquet "
                    "cannot hold; write .jsonl"
                ) from error


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ImportError(f"logs in Parquet need pyarrow: {installing('router')}") from error
    return pyarrow
