"""The experts file: what it holds, and errors that name the line."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from deferral.errors import DataError
from deferral.gateway.experts_file import Expert, read_experts
from deferral.gateway.requests import parse
from deferral.gateway.upstream import Upstream
from tests.faulty_upstream import Upstream as Server

GOOD = """\
# two servers
[experts.small]
base_url = "http://127.0.0.1:8001/v1/"
input_price = 0.1
output_price = 0.4

[experts."the large-one"]
base_url = "https://api.example.com/v1"
model = "large-2"
key_env = "LARGE_KEY"
context_tokens = 8192
tools = false
region = "eu"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "experts.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_file_is_read(tmp_path: Path) -> None:
    experts = read_experts(write(tmp_path, GOOD), {"LARGE_KEY": "sk-very-secret"})
    small, large = experts.values()
    assert (small.name, small.model, small.base_url, small.key) == ("small", "small", "http://127.0.0.1:8001/v1", None)
    assert (large.name, large.model, large.key, large.region, large.tools) == (
        "the large-one",
        "large-2",
        "sk-very-secret",
        "eu",
        False,
    )
    assert small.price(1_000_000, 500_000) == pytest.approx(0.3)
    assert "sk-very-secret" not in repr(experts)


def test_a_key_may_be_in_a_file_and_have_a_header_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("sk-of-this-hour\n", encoding="utf-8")
    text = GOOD.replace(
        'key_env = "LARGE_KEY"', 'key_file = "token"\nkey_header = "api-key"\nquery = "api-version=2024-10-21&a=b"'
    )
    experts = read_experts(write(tmp_path, text), {})
    assert experts["the large-one"].key == "sk-of-this-hour"

    async def ask(name: str, port: int) -> None:
        upstream = Upstream(max_reply_bytes=1 << 20)
        body = b'{"model": "good", "messages": [{"role": "user", "content": "hi"}]}'
        expert = replace(experts[name], base_url=f"http://127.0.0.1:{port}/v1")
        await upstream.ask(expert, "/chat/completions", body, {}, parse("chat", body))
        await upstream.close()

    with Server() as server:
        for name in experts:
            asyncio.run(ask(name, server.port))
        small, large = server.seen
    assert (small.path, "api-key" in small.headers, "authorization" in small.headers) == ("/v1/chat/completions", False, False)
    assert large.path == "/v1/chat/completions?api-version=2024-10-21&a=b"
    assert (large.headers["api-key"], "authorization" in large.headers) == ("sk-of-this-hour", False)


@pytest.mark.parametrize(
    ("line", "replacement", "number", "words"),
    [
        ("input_price = 0.1", "input_price = -1", 4, "expected a number, 0 or more, got -1"),
        ("input_price = 0.1", 'input_price = "cheap"', 4, "expected a number"),
        ("input_price = 0.1", "input_price = 1" + "0" * 400, 4, "expected a number, 0 or more, got 1000"),
        ("input_price = 0.1", "input_prise = 0.1", 4, "unknown; expected one of"),
        ("input_price = 0.1", "input_price = ", 4, "line 4"),
        ("input_price = 0.1", "total_s = 0", 4, "above 0"),
        ("input_price = 0.1", "max_concurrent = 1.5", 4, "whole number"),
        ("tools = false", "tools = 1", 12, "true or false"),
        ("context_tokens = 8192", "context_tokens = 0", 11, "whole number"),
        ("[experts.small]", "[expert.small]", 2, "expected tables [experts.NAME]"),
        ("[experts.small]", "[experts.auto]", 2, "asks the router"),
        ('base_url = "http://127.0.0.1:8001/v1/"', "", 2, "missing"),
        ('"https://api.example.com/v1"', '"https://me:hunter2@api.example.com"', 8, "no user, password"),
        ('"https://api.example.com/v1"', '"api.example.com"', 8, "http:// or https://"),
        ('"https://api.example.com/v1"', '"https://api.example.com:99999/"', 8, "http:// or https://"),
        ("example.com/v1", "example.com/v1/chat/completions", 8, "write 'https://api.example.com/v1', got"),
        ("example.com/v1", "example.com/v1/completions/", 8, "write 'https://api.example.com/v1', got"),
        ("example.com/v1", "example.com/embeddings", 8, "write 'https://api.example.com', got"),
        ("tools = false", 'other_urls = "https://b.example.com/v1"', 12, "expected a list of addresses"),
        ("tools = false", 'other_urls = "https://me:secret@b.example.com/v1"', 12, "a list of addresses, got str"),
        ("tools = false", 'other_urls = ["b.example.com/v1"]', 12, "expected http:// or https://"),
        ("tools = false", 'other_urls = ["https://api.example.com/v1/"]', 12, "addresses that differ"),
        ('base_url = "http://127.0.0.1:8001/v1/"', 'base_url = ["http://127.0.0.1:8001/v1"]', 3, "go into other_urls"),
        ("127.0.0.1:8001/v1/", "127.0.0.1:8001/v1/responses", 3, "write 'http://127.0.0.1:8001/v1', got"),
        ('key_env = "LARGE_KEY"', 'key_env = "OTHER_KEY"', 10, "OTHER_KEY is not set"),
        ('key_env = "LARGE_KEY"', 'key_env = "sk-proj-hunter2"', 10, "the name of an environment variable"),
        ('key_env = "LARGE_KEY"', 'api_key = "sk-proj-hunter2"', 10, "keys are not read from files"),
        ('key_env = "LARGE_KEY"', 'key_file = "nowhere"', 10, "it cannot be read, No such file"),
        ('key_env = "LARGE_KEY"', "key_file = 7", 10, "expected the path of a file"),
        ("context_tokens = 8192", 'key_file = "experts.toml"', 11, "a key from one place, got key_env as well"),
        ("tools = false", 'key_header = "Content-Type"', 12, "name of a header in small letters"),
        ("tools = false", 'key_header = "host"', 12, "name of a header in small letters"),
        ("tools = false", 'query = "?api-version=1"', 12, "expected name=value"),
        ("tools = false", 'query = "a=1&"', 12, "expected name=value"),
        ("tools = false", 'query = "a=1#b"', 12, "expected name=value"),
        ("tools = false", 'query = "alt=sse&Api-Key=sk-1234567"', 12, "api_key: a key has no place in an address"),
        ("tools = false", 'key_header = "expect"', 12, "name of a header in small letters"),
        ("tools = false", 'drop = "temperature"', 12, "expected a list of names, got 'temperature'"),
        ("tools = false", "drop = [7]", 12, "expected names of fields of a request, got 7"),
        ("tools = false", 'drop = ["stream"]', 12, "stream: the gateway needs it as the client sent it"),
        ("tools = false", 'drop = ["max_tokens"]', 12, "max_tokens: the gateway needs it as the client sent it"),
        ("tools = false", "defaults = { best_of = 8 }", 12, "best_of: the gateway needs it as the client sent it"),
        ("tools = false", 'rename = ["a", "b"]', 12, "expected a table such as"),
        ("tools = false", 'rename = { top_k = "messages" }', 12, "messages: the gateway needs it"),
        ("tools = false", "rename = { top_k = 3 }", 12, "expected names of fields of a request, got 3"),
        ("tools = false", "defaults = { stop_at = 2026-11-28 }", 12, "no dates"),
        ("tools = false", "defaults = { top_p = inf }", 12, "no inf or nan"),
    ],
)
def test_errors_name_the_line_and_show_no_secret(tmp_path: Path, line: str, replacement: str, number: int, words: str) -> None:
    path = write(tmp_path, GOOD.replace(line, replacement))
    with pytest.raises(DataError) as caught:
        read_experts(path, {"LARGE_KEY": "sk-very-secret"})
    message = str(caught.value)
    assert words in message
    assert f"{path}:{number}:" in message or f"line {number}," in message
    assert "hunter2" not in message
    assert "very-secret" not in message


@pytest.mark.parametrize("key", ["two words", "line\nend", "ключ"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError) as caught:
        read_experts(write(tmp_path, GOOD), {"LARGE_KEY": key})
    assert key not in str(caught.value)
    assert ":10:" in str(caught.value)


def test_a_base_url_may_have_any_other_path() -> None:
    for path in ("", "/openai/v1", "/completions/v1", "/my-completions"):
        assert Expert("small", f"http://127.0.0.1:8001{path}").base_url.endswith(path)


def test_a_file_that_is_missing_empty_or_no_text(tmp_path: Path) -> None:
    for text in ("", "experts = 3", "[experts]"):
        with pytest.raises(DataError, match="at least one table"):
            read_experts(write(tmp_path, text), {})
    with pytest.raises(DataError, match="cannot be read"):
        read_experts(tmp_path / "nothing.toml", {})
    (tmp_path / "experts.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read"):
        read_experts(tmp_path / "experts.toml", {})


@pytest.mark.parametrize(("value", "words"), [("[" * 5000 + "]" * 5000, "nested too deeply"), ("1" * 5000, "4300 digits")])
def test_a_file_that_no_reader_comes_to_the_end_of(tmp_path: Path, value: str, words: str) -> None:
    path = write(tmp_path, f"{GOOD}\ndefaults = {{ a = {value} }}\n")
    with pytest.raises(DataError, match=words) as caught:
        read_experts(path, {"LARGE_KEY": "sk-very-secret"})
    assert str(caught.value).startswith(f"{path}: expected TOML; ")


def test_an_expert_made_in_code_is_checked_as_well() -> None:
    with pytest.raises(ValueError, match="base_url"):
        Expert("small", "file:///etc/passwd")
    with pytest.raises(ValueError, match="first_byte_s"):
        Expert("small", "http://localhost", first_byte_s=float("nan"))
