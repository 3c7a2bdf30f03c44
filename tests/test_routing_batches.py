"""Files of queries, routed: they survive being stopped."""

import copy
import fcntl
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deferral.datasets import DataError
from deferral.routing import Needs, Router
from deferral.routing import batches as batching
from deferral.routing.batches import route_file
from tests.route_command import call, outcomes, saved_router
from tests.routing_world import QUICK, router, world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_router(tmp_path_factory.mktemp("routing") / "router")


@pytest.mark.slow
def test_workers_end_with_the_process_that_was_killed() -> None:
    program = """
from multiprocessing import get_context
from deferral.routing.batches import _end_with_parent
if __name__ == "__main__":
    worker = get_context("spawn").Process(target=_end_with_parent)
    worker.start()
    print("started", flush=True)
    worker.join()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        parent.kill()
        # The end of the file comes when the last process that holds it has ended.
        assert parent.communicate(timeout=120)[0] == ""


@pytest.mark.ci_slow
def test_a_batch_goes_on_where_it_was_killed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_CHUNK", 40)
    texts = [*world(100, seed=4)[0], "", "日本語 🎉"]
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"query": text}) + "\n" for text in texts))
    assert route_file(folder, tmp_path / "in.txt", tmp_path / "whole.jsonl") == 102
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["row"] for line in lines] == list(range(1, 103))
    assert [line["expert"] for line in lines] == Router.load(folder).route_batch(texts).names

    def killed(rows: int, read: int) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        route_file(folder, tmp_path / "in.jsonl", out, on_rows=killed)
    partial = tmp_path / "out.jsonl.partial"
    assert not out.exists()
    assert partial.read_bytes().count(b"\n") == 40
    with partial.open("ab") as file:
        # Of a chunk that was cut in two, sums would be rounded otherwise: it is decided again.
        file.write(b'{"row": 41, "by": "another rounding"}\n{"row": 42, "exp')
    with pytest.raises(DataError, match="begun with another router, file or setting"):
        route_file(folder, tmp_path / "in.jsonl", out, setting={"budget": 5.0})
    seen: list[int] = []
    route_file(folder, tmp_path / "in.jsonl", out, on_rows=lambda rows, read: seen.append(rows))
    assert seen == [80, 102]
    assert out.read_bytes() == whole
    assert not partial.exists()
    assert "102 decisions" in call("batch", tmp_path / "in.txt", tmp_path / "again.jsonl", "-r", folder).output
    assert (tmp_path / "again.jsonl").read_bytes() == whole
    again = call("batch", tmp_path / "in.txt", tmp_path / "again.jsonl", "-r", folder)
    assert (again.exit_code, "is complete" in again.output) == (0, True)
    with (tmp_path / "locked.partial").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"locked.partial: another process is writing it"):
            route_file(folder, tmp_path / "in.jsonl", tmp_path / "locked")
    assert route_file(folder, tmp_path / "in.jsonl", tmp_path / "locked") == 102
    (tmp_path / "mine.partial").write_text("precious")
    with pytest.raises(DataError, match=r"mine.partial: it was begun with another"):
        route_file(folder, tmp_path / "in.jsonl", tmp_path / "mine")
    assert (tmp_path / "mine.partial").read_text() == "precious"
    rows = (tmp_path / "in.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "bad.jsonl").write_text("".join([*rows[:89], '{"prompt": "b"}\n', *rows[90:]]))
    with pytest.raises(DataError, match=r"row 90: expected a JSON object with a text .*: 80 decisions are kept"):
        route_file(folder, tmp_path / "bad.jsonl", tmp_path / "bad.out")
    (tmp_path / "bad.jsonl").write_text("".join(["{}\n", *rows[1:]]))
    with pytest.raises(DataError, match="begun with another router, file or setting"):
        route_file(folder, tmp_path / "bad.jsonl", tmp_path / "bad.out")
    (tmp_path / "bad.jsonl").write_text("".join(rows))
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        route_file(folder, tmp_path / "bad.jsonl", tmp_path / "bad.out", on_rows=killed)
    route_file(folder, tmp_path / "bad.jsonl", tmp_path / "bad.out", on_rows=lambda rows, read: seen.append(rows))
    assert seen == [102]
    assert (tmp_path / "bad.out").read_bytes() == whole, "a mended file goes on after the rows that were decided"


@pytest.mark.ci_slow
def test_a_batch_that_is_there_is_taken_for_done_only_if_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "_CHUNK", 40)
    queries, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    texts = world(100, seed=4)[0]

    def ask(lines: list[str]) -> None:
        queries.write_text("\n".join(lines) + "\n", encoding="utf-8")

    ask(texts)
    arguments = ("batch", queries, out, "-r", folder)
    assert "100 decisions" in call(*arguments).output
    whole = out.read_bytes()
    again = call(*arguments)
    assert (again.exit_code, "is complete" in again.output) == (0, True)

    def refused(*others: object) -> None:
        with pytest.raises(DataError, match=r"out\.jsonl: it is there already; remove it or name another file"):
            call(*arguments, *others)

    refused("--price-of-error", 10.0)
    refused("--deny", "small")
    Router(0.1, policies=QUICK).fit(outcomes(200, 5)).save(tmp_path / "another")
    refused("-r", tmp_path / "another")
    for lines in (["emperor", *texts[1:]], [*texts[:-1], "emperor treaty"], texts[:-1], [*texts, "one more"]):
        ask(lines)
        refused()
    ask(texts)
    for content in (b"precious\n" * 100, whole[:-20], whole + b"{}\n", b""):
        out.write_bytes(content)
        refused()
        assert out.read_bytes() == content
    out.write_bytes(whole)
    assert "is complete" in call(*arguments).output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "in.txt", "out.jsonl", "out.jsonl.work.json"]
    (tmp_path / "out.jsonl.work.json").unlink()
    refused()


@pytest.mark.ci_slow
def test_a_batch_is_not_done_where_only_what_comes_late_would_be_decided_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "_CHUNK", 20)
    fitted, queries, out = copy.copy(router()), tmp_path / "in.txt", tmp_path / "out.jsonl"
    fitted.save(tmp_path / "router")
    queries.write_text("emperor treaty crown\n" * 20 + "integral derivative theorem\n" * 5)
    assert route_file(tmp_path / "router", queries, out) == 25
    assert [json.loads(line)["expert"] for line in out.read_text().splitlines()] == ["small"] * 20 + ["large"] * 5
    with pytest.raises(DataError, match="it is there already"):
        route_file(tmp_path / "router", queries, out, setting={"needs": Needs.of(deny=["large"])})
    fitted.remove_expert("large").save(tmp_path / "router")
    with pytest.raises(DataError, match="it is there already"):
        route_file(tmp_path / "router", queries, out)


@pytest.mark.ci_slow
def test_the_note_of_a_batch_that_was_stopped_is_never_half_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "_CHUNK", 10)
    queries, out, note = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "out.jsonl.work.json"
    rows = [json.dumps({"query": text}) + "\n" for text in world(40, seed=4)[0]]
    queries.write_text("".join([*rows[:25], "{}\n", *rows[26:]]))

    def killed(rows: int, read: int) -> None:
        raise KeyboardInterrupt

    written_at = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            route_file(folder, queries, out, on_rows=killed)
        written_at.append((note.stat().st_ino, note.stat().st_mtime_ns))
    assert written_at[0] == written_at[1]
    with pytest.raises(DataError, match="row 26"):
        route_file(folder, queries, out)
    queries.write_text("".join(rows))
    before = note.read_bytes()

    def full(path: Path, *given: object, **options: object) -> None:
        path.write_bytes(b"")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            route_file(folder, queries, out)
    assert note.read_bytes() == before
    assert route_file(folder, queries, out) == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.work.json"]


@pytest.mark.ci_slow
def test_a_file_of_queries_that_is_none_is_refused(folder: Path, tmp_path: Path) -> None:
    queries, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    queries.write_bytes(b"\xef\xbb\xbfprime theorem\r\nemperor\r\n")
    (tmp_path / "plain.txt").write_text("prime theorem\nemperor\n")
    for path in (queries, tmp_path / "plain.txt"):
        route_file(folder, path, path.with_suffix(".out"))
    assert (tmp_path / "in.out").read_bytes() == (tmp_path / "plain.out").read_bytes(), "a mark of UTF-8 is no part of the query"
    with pytest.raises(DataError, match=r"in\.txt: it holds the queries"):
        call("batch", queries, queries, "-r", folder)
    for content in (gzip.compress(b"a query"), "a query\n".encode("utf-16")):
        (tmp_path / "packed.gz").write_bytes(content)
        with pytest.raises(DataError, match="row 1: expected text in UTF-8, one query a line"):
            route_file(folder, tmp_path / "packed.gz", out)
    for name in ("lines.ndjson", "lines.JSONL"):
        (tmp_path / name).write_text('{"query": "prime theorem"}\n{"query": "emperor"}\n')
        route_file(folder, tmp_path / name, tmp_path / f"{name}.out")
        assert (tmp_path / f"{name}.out").read_bytes() == (tmp_path / "in.out").read_bytes(), "objects are no texts"
    (tmp_path / "lines.json").write_text('{"query": "prime theorem"}\n')
    with pytest.raises(DataError, match=r"lines\.json: expected lines; name the file \.jsonl"):
        route_file(folder, tmp_path / "lines.json", out)
    with pytest.raises(DataError, match=r"it is there already; expected a new file"):
        route_file(folder, queries, Path("."))
    (tmp_path / "deep.jsonl").write_text('{"query": ' + 100_000 * "[" + "\n")
    with pytest.raises(DataError, match="row 1: expected a JSON object"):
        route_file(folder, tmp_path / "deep.jsonl", tmp_path / "deep.out")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="expected a file, which can be read again"):
        route_file(folder, tmp_path / "pipe", out)
    with pytest.raises(DataError, match="expected a new file"):
        route_file(folder, queries, Path(os.devnull))


@pytest.mark.slow
def test_two_processes_give_the_same_file_in_order(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("\n".join(world(9000, seed=4)[0]) + "\n", encoding="utf-8")
    for workers in (1, 2):
        result = call("batch", tmp_path / "in.txt", tmp_path / f"{workers}.jsonl", "-r", folder, "--workers", workers)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def _another_is_saved(folder: Path) -> Router:
    """A router like that of the folder, but for the price of an error."""
    other = Router.load(folder)
    other.price_of_error *= 2
    other.save(folder)
    return other


@pytest.mark.ci_slow
def test_a_router_that_was_saved_in_the_meantime_is_not_turned_back(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "router"
    shutil.copytree(folder, copied)
    plan = Router.plan

    def late(self: Router, **setting: Any) -> Any:
        monkeypatch.setattr(Router, "plan", plan)
        _another_is_saved(copied)
        return plan(self, **setting)

    monkeypatch.setattr(Router, "plan", late)
    wanted = 2 * Router.load(copied).price_of_error
    with pytest.raises(DataError, match="another router was saved there in the meantime"):
        call("turn", "-r", copied, "--price-of-error", 7)
    assert Router.load(copied).price_of_error == wanted


@pytest.mark.ci_slow
def test_workers_decide_by_the_router_that_the_note_names_or_not_at_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, queries = tmp_path / "router", tmp_path / "queries.txt"
    shutil.copytree(folder, copied)
    queries.write_text("one\ntwo\n")
    decided_by = batching._decided_by

    def late(*arguments: Any) -> Any:
        _another_is_saved(copied)
        return decided_by(*arguments)

    monkeypatch.setattr(batching, "_decided_by", late)
    with pytest.raises(DataError, match="another router was saved there in the meantime"):
        route_file(copied, queries, tmp_path / "out.jsonl", workers=2)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", ["queries.csv", "queries.parquet", "queries.XLSX"])
def test_a_table_is_no_file_of_queries(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("query;reference\n")
    with pytest.raises(DataError, match="convert the table to JSONL with a `query` field"):
        route_file(tmp_path, tmp_path / name, tmp_path / "out.jsonl")
