"""A file of queries in, a file of decisions out: in a stream, by several processes, and resumable after a kill.

Decisions are written to OUT.partial, which becomes OUT when the last is there.  OUT.work.json says what it was begun with, so
that only the same work is continued, or taken for done.
"""

import json
import os
import sys
from codecs import BOM_UTF8
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from hashlib import sha256
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from deferral.errors import DataError
from deferral.routing.constraints import Needs
from deferral.routing.log_files import JSON_LINES
from deferral.routing.persistence import check_unchanged, written
from deferral.routing.router import Router
from deferral.whole_files import claim, written_whole

__all__ = ["route_file"]

_CHUNK = 2000
_TABLES = (".csv", ".tsv", ".xlsx", ".parquet")


def route_file(
    folder: Path,
    queries: Path,
    out: Path,
    *,
    setting: Mapping[str, Any] | None = None,
    encoder: Path | None = None,
    workers: int = 1,
    on_rows: Callable[[int, int], None] = lambda rows, bytes_read: None,
) -> int:
    """Route every query of a file by the router in a folder; the number of queries.  DataError names the row.

    `queries` is .jsonl or .ndjson, one object with "query" a line, or any other text file, one query a line (an empty line is an
    empty query).  `setting` are those of `Router.plan`.  Calls `on_rows(rows done, bytes of the file read)` as it goes on.  An
    `out` that the same work has left is kept, and nothing is done.
    """
    if out.is_dir():
        _check_free(out)
    if out.exists() and out.samefile(queries):
        raise DataError(f"{out}: it holds the queries; name another file for the decisions")
    if not out.parent.is_dir():
        raise DataError(f"{out}: there is no folder {out.parent}; make it, or name another file")
    if queries.suffix.lower() == ".json":
        raise DataError(f'{queries}: expected lines; name the file .jsonl where each of its lines is an object with a "query"')
    if queries.suffix.lower() in _TABLES:
        raise DataError(
            f"{queries}: expected .jsonl, or text with a query a line; convert the table to JSONL with a `query` field"
        )
    if not queries.is_file():
        raise DataError(f"{queries}: expected a file, which can be read again from the middle; write what comes by a pipe to one")
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    setting = {name: value for name, value in (setting or {}).items() if value not in (None, Needs())}
    # The setting is judged before any work is done, and a missing router named.
    before = written(folder)
    router = Router.load(folder, encoder=encoder)
    check_unchanged(folder, before)
    router.plan(**setting)
    work = {
        "router": before,
        "queries": _digest(queries),
        "setting": {name: _plain(value) for name, value in setting.items()},
    }
    partial, note = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.work.json")
    if _begun(note) == work and _complete(router, setting, queries, out):
        return _lines(queries)
    _check_free(out)
    # One thread as in the workers, so that the last digit does not hang on their number.
    with partial.open("ab") as file, threadpool_limits(1, user_api="blas"):
        claim(file, partial)
        # Who held it before may have finished.
        _check_free(out)
        rows = _whole_lines(partial, note, work, queries)
        chunks = _chunks(queries, rows)
        if workers == 1:
            decided = _decided_here(chunks, router, setting, rows)
        else:
            decided = _decided_by(workers, chunks, (folder, before, encoder, setting), rows)
        try:
            for lines, read in decided:
                file.write(lines)
                file.flush()
                rows += lines.count(b"\n")
                on_rows(rows, read)
        except DataError as error:
            # From there on the file may be another when it is mended.
            _write(note, _until(rows, queries, work))
            raise DataError(f"{error}; mend it and repeat the command: {rows:,} decisions are kept") from error
        # The note stays: it says what decided them.
        os.replace(partial, out)
    return rows


def _complete(router: Router, setting: dict, queries: Path, out: Path) -> bool:
    """Whether `out` is what such work leaves: a decision for each query, the first chunk of them as they are decided now.

    To decide all again would take as long as the work: of the rest, the note says what decided it.
    """
    if not out.is_file() or _lines(out) != _lines(queries):
        return False
    with threadpool_limits(1, user_api="blas"), out.open("rb") as file:
        decided = b"".join(lines for lines, _ in _decided_here(islice(_chunks(queries, 0), 1), router, setting, 0))
        # A copy may end within a line.
        return file.read(len(decided)) == decided and all(line.endswith(b"\n") for line in file)


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _check_free(out: Path) -> None:
    if out.exists():
        what = "remove it or name another file" if out.is_file() else "expected a new file, which is complete when it is there"
        raise DataError(f"{out}: it is there already; {what}")


def _plain(value: Any) -> Any:
    """A setting as JSON holds it: names in order."""
    if isinstance(value, Needs):
        return {name: sorted(part) if isinstance(part, frozenset) else part for name, part in asdict(value).items()}
    return value


def _until(rows: int, queries: Path, work: dict) -> dict:
    """The same work, of a file of which no more is known than its first rows."""
    return {**work, "queries": {"rows": rows, "digest": _digest(queries, rows)}}


def _digest(queries: Path, rows: int | None = None) -> str:
    """Of the first rows, or of all."""
    digest = sha256()
    with queries.open("rb") as file:
        for line in islice(file, rows):
            digest.update(line)
    return digest.hexdigest()


def _whole_lines(partial: Path, note: Path, work: dict, queries: Path) -> int:
    """How many decisions an earlier run has left in whole chunks; what it began of another chunk is cut off.

    In a chunk that begins elsewhere sums are rounded otherwise, and the file would not be what it is in one run.  Where a run
    came to a bad row, the file may be another from there on.
    """
    if partial.stat().st_size == 0:
        _write(note, work)
        return 0
    lines = read = whole = 0
    with partial.open("rb+") as file:
        for line in file:
            if line.endswith(b"\n"):
                lines, read = lines + 1, read + len(line)
                whole = read if lines % _CHUNK == 0 else whole
        rows = lines - lines % _CHUNK
        begun = _begun(note)
        if begun != work and begun != _until(rows, queries, work):
            raise DataError(
                f"{partial}: it was begun with another router, file or setting; remove it and {note.name} to start again, or "
                "repeat the command that began it"
            )
        if begun != work:
            _write(note, work)
        file.truncate(whole)
    return rows


def _begun(note: Path) -> Any:
    """The work that a note is of; None where there is none that can be read."""
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except (ValueError, FileNotFoundError):
        return None


def _write(note: Path, work: dict) -> None:
    """The note whole or not at all: decisions without one cannot be continued."""
    with written_whole(note) as partial:
        partial.write_text(json.dumps(work), encoding="utf-8")


def _chunks(path: Path, skip: int) -> Iterator[tuple[list[str], int]]:
    """(queries, bytes read so far) after the first `skip` lines."""
    with path.open("rb") as file:
        read = sum(len(line) for line in islice(file, skip))
        row = skip
        while lines := list(islice(file, _CHUNK)):
            yield (
                [_query(path, row + place, line) for place, line in enumerate(lines, start=1)],
                (read := read + sum(len(line) for line in lines)),
            )
            row += len(lines)


def _query(path: Path, row: int, line: bytes) -> str:
    if row == 1:
        line = line.removeprefix(BOM_UTF8)
    if path.suffix.lower() not in JSON_LINES:
        if b"\0" in line:
            raise DataError(
                f"{path}: row {row}: expected text in UTF-8, one query a line, got {line[:20]!r}; a compressed file, Parquet or "
                "UTF-16 is to be made text or .jsonl first"
            )
        return line.decode("utf-8", "replace").rstrip("\r\n")
    try:
        query = json.loads(line)["query"]
    except (ValueError, KeyError, TypeError, RecursionError):
        query = None
    if not isinstance(query, str):
        raise DataError(f'{path}: row {row}: expected a JSON object with a text "query", got {line[:60]!r}')
    return query


def _decided_here(
    chunks: Iterable[tuple[list[str], int]], router: Router, setting: dict, first: int
) -> Iterator[tuple[bytes, int]]:
    """(lines of decisions, bytes read) of each chunk, in order."""
    for queries, read in chunks:
        yield _decisions(router, setting, queries, first), read
        first += len(queries)


def _decided_by(workers: int, chunks: Iterable[tuple[list[str], int]], router: tuple, first: int) -> Iterator[tuple[bytes, int]]:
    """The same by several processes.  They are spawned: torch's threads do not survive a fork."""
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, router) as pool:
        waiting: deque[tuple[Future[bytes], int]] = deque()
        try:
            for queries, read in chunks:
                waiting.append((pool.submit(_work, queries, first), read))
                first += len(queries)
                if len(waiting) > 2 * workers:
                    decided, before = waiting.popleft()
                    yield decided.result(), before
            for decided, before in waiting:
                yield decided.result(), before
        finally:
            pool.shutdown(cancel_futures=True)


_of_worker: dict[str, Any] = {}


def _begin(folder: Path, before: str, encoder: Path | None, setting: dict) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        _of_worker.update(router=Router.load(folder, encoder=encoder), setting=setting)
        check_unchanged(folder, before)
    except DataError as error:
        # Raised here, it would be told as the end of the process and not as what it is.
        _of_worker["error"] = str(error)
    # Of as many processes as there are cores, each would keep the others from theirs.
    threadpool_limits(1, user_api="blas")
    # Only some sentence encoders need torch, whose import takes longer than to route many thousand queries.
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _end_with_parent() -> None:
    """A worker waits for work for ever if who gave it was killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(queries: list[str], first: int) -> bytes:
    if error := _of_worker.get("error"):
        raise DataError(error)
    return _decisions(_of_worker["router"], _of_worker["setting"], queries, first)


def _decisions(router: Router, setting: dict, queries: list[str], first: int) -> bytes:
    decisions = router.route_batch(queries, **setting)
    rows = np.arange(len(queries))
    columns = {
        "row": (first + 1 + rows).tolist(),
        "expert": decisions.names,
        "quality": decisions.quality[rows, decisions.actions].astype(float).clip(0, 1).round(6).tolist(),
        "price": decisions.price[rows, decisions.actions].tolist(),
        "propensity": decisions.propensity.tolist(),
        "fallback": decisions.fallback.tolist(),
    }
    lines = (json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True))
    return "".join(f"{line}\n" for line in lines).encode()
