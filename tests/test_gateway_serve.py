"""Where a gateway may be bound, what it logs, and its life as a process: reloads, and an end that finishes streams."""

import contextlib
import http.client
import io
import json
import logging
import os
import re
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import fields
from pathlib import Path

import click
import pytest

from deferral import cli
from deferral.cli import main
from deferral.errors import DataError
from deferral.gateway.access import Access, must_have_key
from deferral.gateway.aliases import read_experts_file
from deferral.gateway.answer_files import read_questions
from deferral.gateway.experts_file import Expert, read_experts
from deferral.gateway.keys import ANYONE, Keys
from deferral.gateway.listening import listening
from deferral.gateway.logs import logging_to
from deferral.gateway.problems import Problem
from deferral.gateway.settings import Settings, is_loopback
from deferral.routing import Router, read_log
from tests.faulty_upstream import CHUNKS, Upstream
from tests.running_gateway import EASY, small_router


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False),
     ("", False), ("example.com", False), ("10.0.0.1", False)],
)  # fmt: skip
def test_what_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_gateway_without_a_key_is_bound_to_loopback_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = str(tmp_path / "gateway.db")
    must_have_key(Settings(database=database))
    wide = Settings(database=database, host="0.0.0.0")
    with pytest.raises(ValueError, match="it has no key; make one"):
        must_have_key(wide)
    keys = Keys(database)
    keys.create("operator", admin=True)
    with pytest.raises(ValueError, match="it has no key"):
        must_have_key(wide)
    end = time.time() + 3600
    keys.create("until then", ends=end)
    must_have_key(wide)
    with monkeypatch.context() as later:
        later.setattr("deferral.gateway.keys.time.time", lambda: end)
        with pytest.raises(ValueError, match="it has no key"):
            must_have_key(wide)
    keys.create("client")
    keys.close()
    must_have_key(wide)


def test_without_keys_only_this_machine_is_let_in_however_the_app_is_bound(tmp_path: Path) -> None:
    settings = Settings(database=str(tmp_path / "gateway.db"))
    keys = Keys(settings.database)
    keys.start()
    access = Access(keys, settings)
    access.started()
    for peer in (("127.0.0.1", 1), ("::1", 1), None):
        assert access.client({"client": peer, "headers": []}, {}) == ANYONE
    with pytest.raises(Problem, match="expected a key"):
        access.client({"client": ("10.0.0.7", 1), "headers": []}, {})
    with pytest.raises(Problem, match="web pages"):
        access.client({"client": ("127.0.0.1", 1), "headers": []}, {b"origin": b"https://example.com"})
    for header in (b"x-forwarded-for", b"forwarded", b"x-real-ip"):
        with pytest.raises(Problem, match="a proxy passes on; make a key") as refused:
            access.client({"client": ("127.0.0.1", 1), "headers": []}, {b"host": b"localhost", header: b"203.0.113.5"})
        assert refused.value.status == 403
    # A key for the admin endpoints is none for clients.
    keys.create("operator", admin=True)
    access.started()
    assert access.client({"client": ("127.0.0.1", 1), "headers": []}, {b"host": b"localhost"}) is ANYONE
    # Once there was a key, nobody is let in without one, also when the last is revoked.
    token, key = keys.create("client")
    assert access.client({"headers": []}, {b"authorization": b"bearer " + token.encode(), b"x-real-ip": b"203.0.113.5"}) == key
    keys.revoke(key.id)
    for again in (access, Access(keys, settings)):
        again.started()
        with pytest.raises(Problem) as caught:
            again.client({"client": ("127.0.0.1", 1), "headers": []}, {b"authorization": b"Bearer " + token.encode()})
        assert caught.value.status == 401
    keys.close()


def test_a_key_for_the_admin_endpoints_is_none_for_clients_nor_the_other_way_round(tmp_path: Path) -> None:
    keys = Keys(str(tmp_path / "gateway.db"))
    keys.start()
    access = Access(keys, Settings(database=str(tmp_path / "gateway.db"), admin_key="0123456789abcdef"))
    client, operator = (
        {b"authorization": f"Bearer {keys.create(name, admin=name == 'op')[0]}".encode()} for name in ("me", "op")
    )
    with pytest.raises(Problem, match="for the admin endpoints") as refused:
        access.client({"headers": []}, operator)
    assert refused.value.status == 403
    for headers, status in ((client, 403), ({}, 401), ({b"authorization": b"Bearer 0123456789abcdeg"}, 403)):
        with pytest.raises(Problem) as refused:
            access.admin(headers)
        assert refused.value.status == status
    access.admin(operator)
    access.admin({b"authorization": b"Bearer 0123456789abcdef"})
    keys.close()


def test_a_taken_port_is_named_before_anything_is_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_router().save(tmp_path / "router")
    (tmp_path / "experts.toml").write_text('[experts.small]\nbase_url = "http://127.0.0.1:1"\n', encoding="utf-8")
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        command = ["serve", str(tmp_path / "router"), "--experts", str(tmp_path / "experts.toml"), "--port", str(port)]
        with pytest.raises(SystemExit) as ended:
            main([*command, "--database", str(tmp_path / "gateway.db")])
    assert ended.value.code == 1
    assert not (tmp_path / "gateway.db").exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"127.0.0.1:{port}: port {port} is taken by another process; end that one, or choose another with --port" in said


def test_who_is_refused_for_want_of_a_key_finds_no_database_afterwards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_router().save(tmp_path / "router")
    (tmp_path / "experts.toml").write_text('[experts.small]\nbase_url = "http://127.0.0.1:1"\n', encoding="utf-8")
    command = ["serve", str(tmp_path / "router"), "--experts", str(tmp_path / "experts.toml"), "--port", "0"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--host", "0.0.0.0", "--database", str(tmp_path / "gateway.db")])
    assert ended.value.code == 2
    assert "it has no key" in capsys.readouterr().err
    assert not (tmp_path / "gateway.db").exists()


@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize(
    "command",
    [
        "serve {tmp} --experts {file} --max-request-mb",
        "serve {tmp} --experts {file} --retention-days",
        "serve {tmp} --experts {file} --record-days",
        "serve {tmp} --experts {file} --deadline-ms",
        "serve {tmp} --experts {file} --explore",
        "gateway check {tmp} --experts {file} --max-request-mb",
        "gateway ask {file} {tmp}/answers.jsonl --experts {file} --dollars",
        "gateway export {tmp}/log.jsonl --assume-quality",
        "gateway retrain {tmp} --assume-quality",
        "gateway status --hours",
        "gateway decisions --hours",
        "gateway shadow --hours",
        "gateway keys create bob --budget",
        "gateway keys rotate bob --grace-hours",
        "route explain query -r {tmp} --budget",
        "route explain query -r {tmp} --confidence",
        "route fit {file} -o {tmp}/router --price-of-error",
    ],
)
def test_what_is_no_finite_number_is_refused_before_anything_is_done(
    command: str, number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "experts.toml").touch()
    words = [word.format(tmp=tmp_path, file=tmp_path / "experts.toml") for word in command.split()]
    with pytest.raises(SystemExit) as ended:
        main([*words, number])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"Invalid value for '{words[-1]}'" in said
    assert f"expected a finite number, got {number}" in said or "inf is not in the range" in said
    assert [path.name for path in tmp_path.iterdir()] == ["experts.toml"]


@pytest.mark.parametrize(
    ("host", "message"), [("192.0.2.1", "does not have the address"), ("no such host", "expected an address of this machine")]
)
def test_an_address_that_is_not_here_is_said_so(host: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        listening(host, 0)


def test_settings_are_checked_and_keep_the_admin_key_to_themselves() -> None:
    assert "0123456789abcdef" not in repr(Settings(admin_key="0123456789abcdef"))
    for wrong in ({"admin_key": "short"}, {"explore": 1.0}, {"retry_share": 2.0}, {"deadline_s": 0.0}, {"max_request_bytes": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Settings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["admin_key", "alarm_token"])
def test_a_secret_that_no_header_can_carry_is_refused_and_not_repeated(name: str) -> None:
    for secret in ("0123456789abcdef\n", "0123456789 abcdef", "0123456789abcdef\u00e4"):
        with pytest.raises(ValueError, match=f"{name}: expected printable ASCII") as refused:
            Settings(**{name: secret, "alarm_url": "http://127.0.0.1/"})  # type: ignore[arg-type]
        assert secret not in str(refused.value)


def test_an_alarm_url_with_a_password_beside_a_token_is_refused() -> None:
    Settings(alarm_url="http://user:word@127.0.0.1/")
    Settings(alarm_url="http://127.0.0.1/", alarm_token="0123456789")
    with pytest.raises(ValueError, match="alarm_url: expected no user and password") as refused:
        Settings(alarm_url="http://user:word@127.0.0.1/", alarm_token="0123456789")
    assert "word" not in str(refused.value).replace("password", "")


def test_logs_are_json_lines_without_keys() -> None:
    # A terminal without UTF-8 gets lines that can be read as well.
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    with logging_to(stream, "info"):
        log = logging.getLogger("deferral.gateway")
        log.info("a key %s and\na line", "sk-proj-abcdefghijklmnop")
        log.warning("Authorization: Bearer dk-abcdefgh-0123456789abcdef")
        log.debug("not this")
        log.info("é 😀")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("of a library", stacklevel=1)
        try:
            raise ValueError("dk-abcdefgh-0123456789abcdef")
        except ValueError:
            log.exception("it failed")
    stream.flush()
    written = stream.buffer.getvalue().decode("ascii")
    lines = [json.loads(line) for line in written.splitlines()]
    assert [line["level"] for line in lines] == ["info", "warning", "info", "warning", "error"]
    assert lines[2]["message"] == "é 😀"
    assert "of a library" in lines[3]["message"]
    assert lines[0]["message"] == "a key sk-*** and\na line"
    assert "ValueError" in lines[4]["error"]
    assert "0123456789" not in written
    assert "abcdefghijkl" not in written


def test_a_log_that_nobody_reads_holds_up_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deferral.gateway.logs._LAST_S", 0.2)
    monkeypatch.setattr("deferral.gateway.logs._MOST_WAITING", 5)
    reading, writing = os.pipe()
    with open(writing, "w") as stream:
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(4096))
        os.set_blocking(writing, True)
        with logging_to(stream, "info") as log:
            for number in range(20):
                logging.getLogger("deferral.gateway").info("line %d", number)
        assert log.stuck
        with open(reading, "rb") as reader:
            text = b""
            while b"line 4" not in text:
                assert select.select([reader], [], [], 10)[0], "the log goes on once it is read"
                text += reader.read1(1 << 20).lstrip(b"\0")
    lines = [json.loads(line)["message"] for line in text.splitlines()]
    assert lines[:5] == [f"line {number}" for number in range(5)], "the oldest are kept"


def test_the_guide_shows_files_and_commands_that_exist(tmp_path: Path) -> None:
    guide = (Path(__file__).parent.parent / "docs" / "gateway.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(\w+)\n(.*?)```", guide, flags=re.DOTALL)
    experts, several, aliases = (text for kind, text in blocks if kind == "toml")
    (tmp_path / "experts.toml").write_text(experts, encoding="utf-8")
    assert list(read_experts(tmp_path / "experts.toml", {"LARGE_KEY": "a-key"})) == ["small", "large"]
    (tmp_path / "several.toml").write_text(several, encoding="utf-8")
    assert len(read_experts(tmp_path / "several.toml")["small"].servers) == 3
    three = "".join(f'[experts.{name}]\nbase_url = "http://127.0.0.1:1/v1"\n' for name in ("small", "medium", "large"))
    (tmp_path / "aliases.toml").write_text(three + aliases, encoding="utf-8")
    assert list(read_experts_file(tmp_path / "aliases.toml")[1]) == ["thrifty", "european", "gpt-4o"]
    log, questions = (text for kind, text in blocks if kind == "json")
    (tmp_path / "questions.jsonl").write_text(questions, encoding="utf-8")
    assert [one.query for one in read_questions(tmp_path / "questions.jsonl")] == [
        "what is 17 times 23?",
        "How many legs have two spiders?",
    ]
    (tmp_path / "outcomes.jsonl").write_text(log, encoding="utf-8")
    assert Router(price_of_error=0.02).fit(read_log(tmp_path / "outcomes.jsonl")).route("hello").expert == "large"
    names = {line.split("=")[0].strip("# ") for line in experts.splitlines() if "=" in line}
    rows = set(re.findall(r"`(\w+)`", guide[guide.index("| field |") : guide.index("The expected price of a query")]))
    assert names <= rows
    assert {field.name for field in fields(Expert)} - {"name", "key"} <= rows
    commands = [line[2:] for kind, text in blocks if kind == "console" for line in text.splitlines() if "$ deferral" in line]
    for command in commands:
        found: click.Command = cli.commands
        for word in command.split()[1:]:
            if isinstance(found, click.Group):
                command_of = found.get_command(click.Context(found), word)
                assert command_of is not None, command
                found = command_of
            elif word.startswith("--"):
                assert any(word in parameter.opts for parameter in found.params), command


@pytest.mark.ci_slow
def test_a_gateway_as_a_process(tmp_path: Path) -> None:
    small_router().save(tmp_path / "router")
    file, log = tmp_path / "experts.toml", tmp_path / "log"
    with socket.socket() as free, Upstream(chunk_s=0.03) as upstream:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        good = "".join(f'[experts.{name}]\nbase_url = "{upstream.url}"\n' for name in ("small", "large"))
        file.write_text(good, encoding="utf-8")
        command = [sys.executable, "-m", "deferral.cli", "serve", "router", "--experts", "experts.toml", "--port", str(port)]
        with log.open("w") as stderr:
            process = subprocess.Popen(command, cwd=tmp_path, stderr=stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            logged(log, f"serving small, large at http://127.0.0.1:{port}, page at http://127.0.0.1:{port}/dashboard")
            status, page = ask(port, "chat", origin="https://example.com")
            assert (status, json.loads(page)["error"]["code"]) == (403, "pages_need_a_key")
            # A page may have its own name point here; then it is of the same origin, and its browser names none.
            for host, allowed in (
                ("evil.example", False),
                (f"localhost:{port}", True),
                (f"[::1]:{port}", True),
                ("127.9.0.1", True),
            ):
                status, said = ask(port, "chat", host=host)
                assert (status == 200) == allowed, said
            # A bad file changes nothing, and a good one everything.
            file.write_text(good + "[experts.large]\n", encoding="utf-8")
            process.send_signal(signal.SIGHUP)
            assert "all stays as it was" in logged(log, "not reloaded")
            assert ask(port, "chat")[0] == 200
            file.write_text(good + '[experts.third]\nroute = false\nbase_url = "http://127.0.0.1:1"\n', encoding="utf-8")
            process.send_signal(signal.SIGHUP)
            assert "third" in logged(log, "reloaded: experts")
            maps = Path(f"/proc/{process.pid}/maps")
            if maps.exists():
                held = {name for name in ("torch", "sklearn", "scipy", "pandas", "pyarrow") if f"/{name}/" in maps.read_text()}
                assert not held, "serving needs none of them, and they take more memory than all the rest"
            # A stream that is under way is finished; then it ends by itself.
            streams: list[tuple[int, bytes]] = []
            thread = threading.Thread(target=lambda: streams.append(ask(port, "chat", stream=True)))
            thread.start()
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            thread.join(20)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
    [(status, stream)] = streams
    assert status == 200
    assert stream.count(b'"content": "word') == CHUNKS
    assert stream.endswith(b"data: [DONE]\n\n")
    assert "Finished server process" in log.read_text()
    assert all(json.loads(line) for line in log.read_text().splitlines())
    with contextlib.closing(sqlite3.connect(tmp_path / "deferral-gateway.db")) as connection:
        rows = connection.execute("select outcome, streamed from decisions order by time").fetchall()
    assert rows == [("ok", 0)] * 4 + [("ok", 1)]


def ask(port: int, kind: str, *, stream: bool = False, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    body = {"model": "auto", "stream": stream, "messages": [{"role": "user", "content": EASY}]}
    try:
        connection.request("POST", f"/v1/{kind}/completions", json.dumps(body), headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def logged(log: Path, words: str) -> str:
    """The line of the log with these words, once it is there."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if found := re.search(rf".*{re.escape(words)}.*", log.read_text()):
            return found.group()
        time.sleep(0.05)
    raise AssertionError(f"{words!r} is not in the log: {log.read_text()}")
