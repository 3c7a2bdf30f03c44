"""Fields of a request that an expert knows otherwise, does not take, or is to have."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deferral.gateway.answer_files import read_questions
from deferral.gateway.asking import ask_all
from deferral.gateway.checking import check
from deferral.gateway.experts_file import Expert, read_experts
from deferral.gateway.problems import Problem
from deferral.gateway.requests import Kind
from deferral.gateway.settings import Settings
from deferral.gateway.shaping import shaped
from tests.faulty_upstream import Upstream
from tests.running_gateway import EASY, HARD, RunningGateway, small_router

PARTICULAR = """
rename = { max_tokens = "max_completion_tokens" }
drop = ["temperature", "top_p"]
defaults = { reasoning_effort = "low", temperature = 1, nested = { kept = [1, 2.5] } }
"""


def test_renamed_then_dropped_then_filled_in() -> None:
    expert = Expert(
        "e", "http://127.0.0.1:1/v1", "big", rename={"a": "b", "c": "d"}, drop=["t", "d"], defaults={"t": 1, "b": 0, "x": None}
    )
    sent = {"model": "auto", "messages": [], "a": 2, "c": 3, "t": 0.2, "unknown": {"kept": "\U0001f600 é"}}
    assert json.loads(shaped(json.dumps(sent).encode(), expert)) == {
        "model": "big", "messages": [], "b": 2, "t": 1, "x": None, "unknown": {"kept": "\U0001f600 é"}
    }  # fmt: skip
    # What the client says by the expert's own name stays.
    assert json.loads(shaped(b'{"model": "auto", "messages": [], "a": 2, "b": 5}', expert))["b"] == 5
    assert json.loads(shaped(b'{"model": "auto", "messages": []}', expert)) == {
        "model": "big",
        "messages": [],
        "t": 1,
        "b": 0,
        "x": None,
    }


def test_who_has_no_wishes_gets_every_byte_but_the_name() -> None:
    body = b'{ "model":"auto" ,"messages":[ ] , "temperature": 1.0e0 }'
    assert shaped(body, Expert("e", "http://127.0.0.1:1/v1")) == body.replace(b"auto", b"e")


@pytest.mark.parametrize("odd", [b"1e999", b"[" * 100_000 + b"]" * 100_000])
def test_what_cannot_be_written_again_is_refused(odd: bytes) -> None:
    body = b'{"model": "auto", "messages": [], "store": true, "odd": ' + odd + b"}"
    with pytest.raises(Problem, match="e takes requests in another form") as raised:
        shaped(body, Expert("e", "http://127.0.0.1:1/v1", drop=["store"]))
    assert raised.value.status == 400


@pytest.mark.parametrize("kind", ["completions", "embeddings", "responses"])
def test_other_paths_have_other_fields(kind: Kind) -> None:
    body = b'{"model": "auto", "input": "x", "max_tokens": 5}'
    expert = Expert(
        "e", "http://127.0.0.1:1/v1", rename={"max_tokens": "max_completion_tokens"}, defaults={"reasoning_effort": "low"}
    )
    assert shaped(body, expert, kind) == body.replace(b"auto", b"e")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("shaping")
    with Upstream() as upstream:
        file = folder / "experts.toml"
        url = f'base_url = "{upstream.url}"\n'
        file.write_text(f"[experts.small]\n{url}[experts.large]\n{url}{PARTICULAR}")
        small_router().save(folder / "router")
        settings = Settings(database=str(folder / "gateway.db"), router_folder=folder / "router", experts_file=file, port=0)
        with RunningGateway(small_router(), read_experts(file), settings) as gateway:
            yield SimpleNamespace(gateway=gateway, upstream=upstream, settings=settings, file=file)


@pytest.mark.parametrize("stream", [False, True])
def test_each_expert_gets_its_own_fields_of_the_same_request(running: Any, stream: bool) -> None:
    fields = {"temperature": 0.2, "max_tokens": 50, "stream": stream, "seed": 4 + stream}
    for text in (f"{EASY} 3 and 4", f"{HARD} number 9 in full"):
        assert running.gateway.chat(text, model="auto", **fields)[0] == 200
    small, large = (one.json for one in running.upstream.seen if one.json.get("seed") == fields["seed"])
    assert small == {"model": "small", "messages": small["messages"], **fields}
    assert large == {
        "model": "large", "messages": large["messages"], "seed": fields["seed"], "stream": stream, "max_completion_tokens": 50,
        "reasoning_effort": "low", "temperature": 1, "nested": {"kept": [1, 2.5]},
    }  # fmt: skip


def test_so_it_does_where_the_other_failed_in_a_check_and_for_a_first_log(running: Any, tmp_path: Path) -> None:
    running.upstream.behave("small", "status-500")
    try:
        assert running.gateway.chat(f"{EASY} 3 and 4", model="auto", top_p=0.5, seed=11)[0] == 200
    finally:
        running.upstream.behave("small", "good")
    asked = [one.json for one in running.upstream.seen if one.json.get("seed") == 11]
    assert {one["model"] for one in asked} == {"small", "large"}
    assert all(("top_p" in one) == (one["model"] == "small") for one in asked)

    before = len(running.upstream.seen)
    check(running.settings, ask=True)
    probes = [one.json for one in running.upstream.seen[before:] if one.body and one.model == "large"]
    assert [("max_tokens" in one, one["max_completion_tokens"], one["reasoning_effort"]) for one in probes] == [(False, 1, "low")]

    (tmp_path / "questions.txt").write_text("why?\n")
    experts = read_experts(running.file)
    ask_all(read_questions(tmp_path / "questions.txt"), [experts["large"]], tmp_path / "answers.jsonl", fields={"max_tokens": 9})
    assert running.upstream.seen[-1].json["max_completion_tokens"] == 9


@pytest.mark.parametrize(
    ("fault", "status", "code", "attempts"),
    [("status-500", 502, "upstream_error", 2), ("not-able", 400, "context_length_exceeded", 1)],
)
def test_whoever_cannot_be_sent_a_request_stands_in_for_nobody(
    running: Any, fault: str, status: int, code: str, attempts: int
) -> None:
    # For the other a field has to be renamed, and what is written anew may have no such number.
    message = b'{"role": "user", "content": "%b"}' % EASY.encode()
    body = b'{"model": "auto", "seed": 12, "odd": 1e999, "messages": [%b]}' % message
    before = len(running.upstream.seen)
    running.upstream.behave("small", fault)
    try:
        came, headers, said = running.gateway.ask("POST", "/v1/chat/completions", body)
    finally:
        running.upstream.behave("small", "good")
    asked = [one.model for one in running.upstream.seen[before:] if one.body and one.json.get("seed") == 12]
    assert (came, json.loads(said)["error"]["code"], asked) == (status, code, ["small"] * attempts)
    assert headers["x-deferral-attempts"] == str(attempts)
