"""`deferral route` from end to end, and files of queries that survive being stopped."""

import contextlib
import copy
import fcntl
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from deferral import cli
from deferral.datasets import DataError
from deferral.routing import Log, Needs, Outcome, Router, commands, read_log, write_log
from deferral.routing import batches as batching
from deferral.routing.batches import route_file
from deferral.routing.judging import Held, evaluation, held, joined, query_folds, subjects, tag_folds
from deferral.routing.showing import show_evaluation
from tests.test_readme import run as run_page
from tests.test_routing_router import EXPERTS, QUICK, router, world


def outcomes(rows: int, seed: int, mark: str = "") -> Log:
    texts, subject, quality, price = world(rows, seed=seed)
    return Log(
        Outcome(f"{text}{mark}", name, quality[i, j], price[i, j], output_tokens=10, tags=(f"subject {subject[i]}",))
        for i, text in enumerate(texts)
        for j, name in enumerate(EXPERTS)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("routing") / "router"
    Router(0.1, policies=QUICK).fit(outcomes(300, 0), certify=0.3).save(path)
    return path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.commands, ["route", *map(str, arguments)], catch_exceptions=False)


@pytest.mark.ci_slow
def test_fit_writes_a_router_and_reports_what_it_is_worth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deferral.routing.commands.Router", _quick_router())
    write_log(outcomes(60, 0), tmp_path / "log.jsonl")
    prices = {name: {"input": 1.0, "output": 2.0} for name in EXPERTS}
    (tmp_path / "prices.json").write_text(json.dumps(prices))
    arguments = (tmp_path / "log.jsonl", "-o", tmp_path / "router", "--price-of-error", 0.1, "--prices", tmp_path / "prices.json")
    result = call("fit", *arguments)
    assert result.exit_code == 0, result.output
    assert "Routability: static mix" in result.output
    router = Router.load(tmp_path / "router")
    assert router.experts == EXPERTS
    assert router.fitted.prices.base[2] == pytest.approx(router.fitted.prices.base[0])
    with pytest.raises(DataError, match="is no router"):
        call("fit", tmp_path / "log.jsonl", "-o", tmp_path, "--price-of-error", 0.1)
    for text, message in (
        ("{", r"prices\.json: expected an object .*, got no JSON"),
        ("[]", r"prices\.json: expected an object .*, got a list"),
        ('{"small": 1}', r"prices\.json: small: expected an object .*, got 1"),
        ('{"small": {"input": 0.5, "ouput": 1}}', r"prices\.json: small: .*, got input, ouput"),
        ('{"small": {"input": 0.5, "output": "much"}}', r"got what is no number: .*'much'"),
    ):
        (tmp_path / "prices.json").write_text(text)
        with pytest.raises(DataError, match=message):
            call("fit", *arguments)


def test_a_fit_keeps_the_router_that_was_there_beside_the_new_one(tmp_path: Path) -> None:
    write_log(outcomes(2, 0), tmp_path / "log.jsonl")
    place = tmp_path / "router"
    for error, kept in ((0.1, None), (0.3, 0.1)):
        result = call("fit", tmp_path / "log.jsonl", "-o", place, "--price-of-error", error)
        assert Router.load(place).price_of_error == error
        assert ("the one that was there is router.previous now" in result.output) == (kept is not None)
        assert kept is None or Router.load(tmp_path / "router.previous").price_of_error == kept
    shutil.rmtree(tmp_path / "router.previous")
    (tmp_path / "router.previous").mkdir()
    (tmp_path / "router.previous" / "precious").touch()
    with pytest.raises(DataError, match=r"router\.previous: it is there, and is no router"):
        call("fit", tmp_path / "log.jsonl", "-o", place, "--price-of-error", 0.4)
    assert Router.load(place).price_of_error == 0.3


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ("explain query {folder}", "-r"),
        ("turn {folder} --price-of-error 1", "-r"),
        ("batch {file} {folder}.out {folder}", "-r"),
        ("fit {file} {folder}.new --price-of-error 1", "-o"),
    ],
)
def test_a_folder_without_its_option_is_told_which_it_is(arguments: str, option: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").touch()
    words = [word.format(folder=tmp_path, file=tmp_path / "in.jsonl") for word in arguments.split()]
    result = call(*words)
    alone = words[-3] if "--price-of-error" in words else words[-1]
    assert result.exit_code == 2
    assert f"{alone} belongs to it: write {option} {alone}" in " ".join(result.output.split())
    assert "belongs to it" not in call("explain", "query", "another").output


@pytest.mark.ci_slow
def test_explain_says_whom_and_why(folder: Path) -> None:
    result = call("explain", "emperor treaty dynasty", "-r", folder, "--count", 2)
    assert result.exit_code == 0, result.output
    assert "nearest logged queries" in result.output
    assert "propensity 1" in result.output
    denied = call("explain", "emperor treaty dynasty", "-r", folder, "--deny", "small")
    assert "may not be asked" in denied.output
    for arguments, message in (
        (("--budget", 1e-6), "the cheapest expert costs"),
        (("--deny", "small", "--deny", "coder", "--deny", "large"), "no expert is left"),
        (("--certified-quality", 0.9999, "--confidence", 0.999999), "cannot be promised"),
    ):
        failed = call("explain", "x", "-r", folder, *arguments)
        assert failed.exit_code == 1
        assert message in failed.output


@pytest.mark.ci_slow
def test_evaluate_judges_by_folds_and_a_router_on_other_queries(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("deferral.routing.judging_commands.Router", _quick_router())
    write_log(outcomes(150, 1), tmp_path / "log.jsonl")
    result = call("evaluate", tmp_path / "log.jsonl", "--by-tag", "--folds", 3, "--resamples", 100, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (stored["rows"], stored["groups"]) == (150, 3)
    assert "150 queries of 3 subjects" in result.output
    unsaid = call("evaluate", tmp_path / "log.jsonl", "--by-tag", "--resamples", 100)
    assert "fitting and judging 3 folds" in unsaid.stderr
    # On a subject that was never seen there is nothing to go by.
    assert stored["figures"]["routed"]["AIQ"]["estimate"] < stored["figures"]["oracle"]["AIQ"]["estimate"]
    assert (tmp_path / "out" / "curve.png").stat().st_size > 1000
    other = call("evaluate", tmp_path / "log.jsonl", "-r", folder, "--resamples", 100)
    assert "always one expert" in other.output
    write_log(outcomes(300, 0), tmp_path / "same.jsonl")
    assert "left out: " in call("evaluate", tmp_path / "same.jsonl", "-r", folder, "--resamples", 100).output
    for given in (("--by-tag",), ("--folds", 3)):
        refused = call("evaluate", tmp_path / "log.jsonl", "-r", folder, *given)
        assert (refused.exit_code, f"{given[0]} cannot be combined with --router" in refused.output) == (2, True)
    assert "ask for fewer folds (--folds)" in call("evaluate", tmp_path / "log.jsonl", "--by-tag", "--folds", 9).output
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plain = call("evaluate", tmp_path / "log.jsonl", "-r", folder, "--resamples", 100, "-o", tmp_path / "plain")
    assert "curve.png is left out: it needs matplotlib" in plain.output
    # Where nobody watches, a line says what is done, and none is empty.
    assert plain.stderr.splitlines() == ["reading log.jsonl", "bootstrap"]


def _quick_router() -> type[Router]:
    class Quick(Router):
        def __init__(self, price_of_error: float, **options: object) -> None:
            super().__init__(price_of_error, **{"policies": QUICK, **options})  # type: ignore[arg-type]

    return Quick


@pytest.mark.ci_slow
def test_simulate_says_what_the_router_would_have_cost(folder: Path, tmp_path: Path) -> None:
    texts, _, quality, price = world(300, seed=3)
    asked = np.random.default_rng(0).integers(0, 3, 300)
    log = Log(Outcome(texts[i], EXPERTS[j], quality[i, j], price[i, j], propensity=1 / 3) for i, j in enumerate(asked))
    write_log(log, tmp_path / "log.parquet")
    result = call("simulate", tmp_path / "log.parquet", "-r", folder, "--resamples", 100)
    assert result.exit_code == 0, result.output
    for word in ("ips", "self-normalised", "doubly robust", "always coder", "as logged"):
        assert word in result.output
    router = Router.load(folder).describe_expert("half \ud800", quality=0.9, price=0.1)
    router.save(tmp_path / "wider")
    wider = call("simulate", tmp_path / "log.parquet", "-r", tmp_path / "wider", "--resamples", 100)
    assert r"the log has no outcome of half \ud800, so" in wider.stderr
    assert "always half" not in wider.output
    assert r"half \ud800" in call("explain", "q", "-r", tmp_path / "wider").stdout
    write_log(Log([Outcome("q", "stranger", 1.0, 0.0)]), tmp_path / "strange.jsonl")
    assert "'stranger'" in call("simulate", tmp_path / "strange.jsonl", "-r", folder).output


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


def test_without_its_extra_the_command_names_it() -> None:
    program = "import sys; sys.modules['threadpoolctl'] = None; from deferral.cli import main; main(['route', '--help'])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "the router needs threadpoolctl: pip install '.[router]'" in found.stderr
    assert "Traceback" not in found.stderr


def test_help_shows_every_default_and_says_what_similarity_is() -> None:
    for command in commands.route.commands.values():
        for option in command.params:
            if isinstance(option, click.Option) and type(option.default) in (int, float):
                assert option.show_default, f"{command.name} {option.opts[0]}"
    assert "mean cosine with the ten nearest" in " ".join(call("explain", "--help").output.split())


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


def decided(rows: int = 120) -> Held:
    """Decisions that are those of the oracle, beside random outcomes of two experts."""
    generator = np.random.default_rng(0)
    quality = (generator.random((rows, 2)) < [0.5, 0.8]).astype(float)
    price = np.tile([0.001, 0.01], (rows, 1))
    errors = np.geomspace(1e-4, 10, 12)
    perfect = np.stack([(quality - price / error).argmax(1) for error in errors])
    static = np.stack([np.full(rows, (quality.mean(0) - price.mean(0) / error).argmax()) for error in errors])
    return Held(["a", "b"], quality, price, errors, perfect, perfect, static, perfect < 0, quality[:, 1] - quality[:, 0])


def test_a_router_that_knows_all_is_the_oracle_in_every_figure() -> None:
    found = evaluation(decided(), resamples=100)
    assert found.best == "b"
    assert found.figures["learned, without fallback"]["APGR"] == found.figures["oracle"]["APGR"]
    assert found.figures["random"]["APGR"].estimate == pytest.approx(0.5)
    assert found.figures["random"]["CPT(80)"].estimate == pytest.approx(0.8)
    for name in ("AIQ", "saving at 95%"):
        assert found.figures["routed"][name].estimate == pytest.approx(found.figures["oracle"][name].estimate, abs=0.02)
    assert found.over_static["static mix of the fit"].estimate == 0
    assert found.over_static["routed"].low > 0
    assert found.figures["always a"]["price"].estimate == pytest.approx(0.001)
    assert set(found.hulls) == set(found.curves)
    twice = joined([decided(), decided()])
    assert twice.routed.shape == (12, 240)
    assert evaluation(twice, resamples=100).figures["routed"]["AIQ"].estimate == found.figures["routed"]["AIQ"].estimate


def test_folds_whose_routers_differ_in_their_means_are_not_ranked_by_these() -> None:
    rows = decided()
    # Of two folds that know nothing, each router takes the other fold for its own.
    gain = rows.quality[:, 1] - rows.quality[:, 0]
    better = np.argsort(gain, kind="stable")[60:]
    parts = [np.sort(better), np.setdiff1d(np.arange(120), better)]
    shares = [gain[part].mean() for part in parts]
    assert shares[0] > shares[1] + 0.5
    halves = [
        replace(decided(), quality=rows.quality[part], price=rows.price[part], margin=np.full(60, other))
        for part, other in zip(parts, reversed(shares), strict=True)
    ]
    halves = [
        replace(half, **{n: getattr(rows, n)[:, :60] for n in ("routed", "learned", "static", "fallback")}) for half in halves
    ]
    found = evaluation(joined(halves), resamples=20).figures["learned, without fallback"]
    assert found["APGR"].estimate == pytest.approx(0.5)


def test_a_saving_at_a_quality_that_many_samples_do_not_reach_is_no_proof() -> None:
    # Asking b for 10 of 200 queries is as good here as always asking b, and worse in four samples out of ten.
    quality = np.ones((200, 2))
    quality[:10, 1] = quality[10:30, 0] = 0.0
    price, asked = np.tile([[0.001, 0.02]], (200, 1)), np.zeros((1, 200), int)
    asked[0, 20:30] = 1
    rows = Held(["a", "b"], quality, price, np.ones(1), asked, asked, asked, asked < 0, np.zeros(200))
    saved = evaluation(rows, resamples=200).figures["routed"]["saving at 100%"]
    assert saved.estimate == pytest.approx(1 - (190 * 0.001 + 10 * 0.02) / 200 / 0.02)
    assert saved.low == -np.inf
    assert 0.9 < saved.high < 0.95


def test_a_quality_that_is_never_reached_is_said_to_be(capsys: pytest.CaptureFixture) -> None:
    quality = np.tile([[0.0, 1.0]], (20, 1))
    asked = np.zeros((1, 20), int)
    for dear, said in ((0.02, "never reached"), (0.0, "nothing to save")):
        price = np.tile([[0.0, dear]], (20, 1))
        rows = Held(["a", "b"], quality, price, np.ones(1), asked, asked, asked, asked < 0, np.zeros(20))
        show_evaluation(evaluation(rows, resamples=20))
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("routed"))
        assert line.count(said) == 3
        assert "nan" not in line.split(said)[1]


def test_folds_of_subjects_are_whole_and_need_tags() -> None:
    log = outcomes(90, 0)
    table = log.table()
    fold = tag_folds(log, table, 3)
    subject = world(90, seed=0)[1]
    assert len({(int(a), int(b)) for a, b in zip(subject, fold, strict=True)}) == 3
    with pytest.raises(ValueError, match="at least 4 subjects"):
        tag_folds(log, table, 4)
    log.append(Outcome("no tag", "small", 1.0, 0.0))
    with pytest.raises(ValueError, match="1 queries have no tag"):
        tag_folds(log, log.table(), 3)
    late = Log(
        [Outcome("one", "a", 1.0, 0.1), Outcome("one", "b", 1.0, 0.1, tags=("s",)), Outcome("two", "a", 1.0, 0.1, tags=("t",))]
    )
    assert subjects(late, late.table())[0] == ["s", "t"]
    assert np.bincount(query_folds(table, 4)).tolist() == [23, 23, 22, 22]
    with pytest.raises(ValueError, match="at least 100 queries"):
        query_folds(table, 100)


@pytest.mark.ci_slow
def test_a_log_with_holes_is_judged_by_simulation(folder: Path) -> None:
    log = outcomes(5, 8)
    log.append(Outcome("one answer", "small", 1.0, 0.0))
    with pytest.raises(ValueError, match=r"coder has none on query 6, 'one answer'; .* simulate"):
        held(Router.load(folder), log.table())


@pytest.mark.ci_slow
def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    session = run_page("docs/routing.md", 6)
    assert session["router"].experts == ["small", "large"]
    assert len(session["actions"]) == 5
    assert session["worth"].cost["doubly robust"].low < session["worth"].cost["doubly robust"].high
    assert "Routability" in capsys.readouterr().out


def test_of_two_experts_the_better_may_be_the_cheaper() -> None:
    quality = np.random.default_rng(0).integers(0, 2, (200, 2)).astype(float)
    quality[:150, 0] = 1.0
    price, errors = np.tile([[0.001, 0.02]], (200, 1)), np.array([1.0])
    nobody, first = np.zeros((1, 200), bool), np.zeros((1, 200), int)
    rows = Held(["a", "b"], quality, price, errors, first, first, first, nobody, quality[:, 1] - quality[:, 0])
    found = evaluation(rows, resamples=20).figures
    assert found["learned, without fallback"]["APGR"].estimate == pytest.approx(found["oracle"]["APGR"].estimate)
    assert found["oracle"]["APGR"].estimate > found["random"]["APGR"].estimate


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


@pytest.mark.ci_slow
def test_an_expert_with_next_to_no_outcomes_is_named_and_taken_for_no_better_than_the_mean() -> None:
    log = outcomes(200, 6)
    with contextlib.redirect_stderr(io.StringIO()) as clean:
        commands._warn_of_rare(log)
    log.append(Outcome(log.queries[3], "smal", 1.0, 0.001))
    with contextlib.redirect_stderr(io.StringIO()) as warned:
        commands._warn_of_rare(log)
    assert clean.getvalue() == ""
    assert "smal has only 1 of 601 outcomes" in warned.getvalue()
    assert "is it small, mistyped?" in warned.getvalue()
    fitted = Router(0.1, policies=QUICK).fit(log).fitted
    means = dict(zip(fitted.experts, fitted.means.tolist(), strict=True))
    others = np.mean([means[name] for name in EXPERTS])
    assert others < means["smal"] < others + 0.15, "six outcomes' worth, of which five are the mean of all"


@pytest.mark.ci_slow
def test_another_price_of_an_error_is_a_turn_and_what_each_policy_costs_is_a_bill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deferral.routing.commands.Router", _quick_router())
    log = outcomes(60, 0)
    write_log(log, tmp_path / "log.jsonl")
    call("fit", tmp_path / "log.jsonl", "-o", tmp_path / "router", "--price-of-error", 0.1)
    monkeypatch.undo()
    before = Router.load(tmp_path / "router")
    assert "$100 an error, $0.1 before" in call("turn", "-r", tmp_path / "router", "--price-of-error", 100).stdout
    turned = Router.load(tmp_path / "router")
    assert (before.price_of_error, turned.price_of_error) == (0.1, 100.0)
    query = log.queries[0]
    assert turned.route(query).cost == pytest.approx(before.route(query, price_of_error=100.0).cost)

    write_log(outcomes(40, 1), tmp_path / "other.jsonl")
    found = call(
        "evaluate", tmp_path / "other.jsonl", "-r", tmp_path / "router", "--price-of-error", 0.1, "--resamples", 100, "-o",
        tmp_path / "out",
    )  # fmt: skip
    assert "at $0.1 an error" in found.stdout
    bill = json.loads((tmp_path / "out" / "evaluation.json").read_text())["bill"]
    table = read_log(tmp_path / "other.jsonl").table()
    for place, name in enumerate(table.experts):
        always = bill[f"always {name}"]
        assert always["quality"]["estimate"] == pytest.approx(table.quality[:, place].mean())
        assert always["dollars per 1,000"]["estimate"] == pytest.approx(1000 * table.price[:, place].mean())
        less = bill["routed"]["cost"]["estimate"] - always["cost"]["estimate"]
        assert always["routed less this"]["estimate"] == pytest.approx(less)
    assert bill["oracle"]["cost"]["estimate"] <= min(policy["cost"]["estimate"] for policy in bill.values())


@pytest.mark.parametrize("name", ["queries.csv", "queries.parquet", "queries.XLSX"])
def test_a_table_is_no_file_of_queries(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("query;reference\n")
    with pytest.raises(DataError, match="convert the table to JSONL with a `query` field"):
        route_file(tmp_path, tmp_path / name, tmp_path / "out.jsonl")
