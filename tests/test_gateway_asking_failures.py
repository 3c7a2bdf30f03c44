"""Experts and addresses that fail, refuse or are full while a file of questions is asked."""

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from deferral.gateway.answer_files import read_answers, read_questions
from deferral.gateway.asking import ask_all
from deferral.gateway.experts_file import Expert
from tests.asked_servers import Scripted, says, written
from tests.faulty_upstream import Upstream, closed_port
from tests.served_app import served


def test_a_failing_expert_holds_nobody_up_and_is_asked_again(questions: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    asked = read_questions(questions)[:4]
    with Upstream() as upstream:
        good, bad, wrong, unable = (Expert(name, upstream.url, name) for name in ("good", "status-500", "status-401", "not-able"))
        result = ask_all(asked, [good, bad, wrong, unable], answers, patience=0.0)
        assert result.answers == 4
        assert {name: dict(reasons) for name, reasons in result.left.items()} == {
            "good": {},
            "status-500": {"failed with status 500": 4},
            "status-401": {"refused the gateway with status 401; its key, model, address or proxy is wrong": 4},
            "not-able": {"refused with status 400, too long, as asked": 4},
        }
        # Asked at once, they are refused at once; nobody is asked who would be refused as well.
        assert len(upstream.asked("status-401")) <= 4
        upstream.behave("status-500", "good")
        assert ask_all(asked, [good, bad], answers).asked == 4


def test_an_address_that_refuses_is_asked_no_more_and_the_others_have_its_questions(questions: Path, tmp_path: Path) -> None:
    asked = read_questions(questions)
    with Upstream() as right, Upstream() as wrong, closed_port() as closed:
        wrong.behave("small", "status-401")
        result = ask_all(asked, [Expert("small", wrong.url, other_urls=[right.url])], tmp_path / "answers.jsonl", concurrent=4)
        assert (result.answers, result.missing) == (len(asked), 0)
        assert len(wrong.asked("small")) <= 4
        refused = ask_all(asked, [Expert("small", wrong.url, other_urls=[f"{wrong.url}/v2"])], tmp_path / "refused.jsonl")
        assert (refused.answers, refused.missing) == (0, len(asked))
        half = Expert("small", right.url, other_urls=[f"http://127.0.0.1:{closed}/v1"])
        result = ask_all(asked[:4], [half], tmp_path / "half.jsonl", patience=1.5, concurrent=4)
        assert (result.answers, result.missing) == (4, 0), "who does not answer is not asked twice in a row"


def test_what_fails_for_a_moment_is_asked_again(questions: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    with Upstream() as upstream:
        upstream.behave("small", "status-429")  # for one second
        mended = threading.Timer(0.3, upstream.behave, ("small", "good"))
        mended.start()
        result = ask_all(read_questions(questions)[:3], [Expert("small", upstream.url)], answers)
        mended.join()
    assert (result.answers, result.missing) == (3, 0)


def test_all_addresses_of_an_expert_are_asked_and_one_that_fails_costs_no_answer(questions: Path, tmp_path: Path) -> None:
    asked = read_questions(questions)[:4]
    with Upstream() as first, Upstream() as second:
        both = Expert("small", first.url, other_urls=[second.url])
        assert ask_all(asked, [both], tmp_path / "answers.jsonl").answers == 4
        assert (len(first.seen), len(second.seen)) == (2, 2)
        first.behave("small", "status-500")
        assert ask_all(asked[:2], [both], tmp_path / "again.jsonl", concurrent=1).answers == 2


@pytest.mark.parametrize("refuses", [False, True])
def test_no_address_is_asked_more_at_a_time_than_it_takes(questions: Path, tmp_path: Path, refuses: bool) -> None:
    under_way, most = 0, 0

    async def one(request: Request) -> JSONResponse:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.02 if refuses else 0.1)
        under_way -= 1
        return JSONResponse(says("yes"))

    with served(Starlette(routes=[Route("/v1/chat/completions", one, methods=["POST"])])) as slow, Upstream() as fast:
        fast.behave("small", "status-401" if refuses else "good")
        both = Expert("small", slow, other_urls=[fast.url], max_concurrent=1)
        result = ask_all(read_questions(questions), [both], tmp_path / "answers.jsonl")
    assert (result.answers, result.missing, most) == (19, 0, 1)
    assert len(fast.asked("small")) == 1 if refuses else len(fast.asked("small")) > 10, "who is free is asked"


def test_an_address_that_asks_for_rest_holds_up_no_other(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deferral.gateway.asking._FIRST_WAIT", 0.01)
    began = time.monotonic()

    async def busy(request: Request) -> JSONResponse:
        return JSONResponse({}, 429, {"retry-after": "20"})

    with served(Starlette(routes=[Route("/v1/chat/completions", busy, methods=["POST"])])) as first, Upstream() as second:
        both = Expert("small", first, other_urls=[second.url])
        result = ask_all(read_questions(questions), [both], tmp_path / "answers.jsonl")
    assert (result.answers, result.missing) == (19, 0)
    assert time.monotonic() - began < 10


def test_who_waits_for_its_turn_at_an_address_waits_as_long_as_it_asks_for(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deferral.gateway.asking._FIRST_WAIT", 0.01)
    times: list[float] = []

    async def one(request: Request) -> JSONResponse:
        times.append(time.monotonic())
        if len(times) > 1:
            return JSONResponse(says("yes"))
        await asyncio.sleep(0.1)
        return JSONResponse({}, 429, {"retry-after": "1"})

    with served(Starlette(routes=[Route("/v1/chat/completions", one, methods=["POST"])])) as only, Upstream() as refusing:
        refusing.behave("small", "status-401")
        both = Expert("small", only, other_urls=[refusing.url], max_concurrent=1)
        assert ask_all(read_questions(questions)[:4], [both], tmp_path / "answers.jsonl").answers == 4
    assert times[1] - times[0] > 1.0


def test_who_is_given_up_while_a_call_waits_to_be_repeated_is_asked_no_more(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deferral.gateway.asking._FIRST_WAIT", 0.4)
    asked = 0

    async def one(request: Request) -> JSONResponse:
        nonlocal asked
        asked += 1
        return JSONResponse({}, 503 if asked == 1 else 401)

    with served(Starlette(routes=[Route("/v1/chat/completions", one, methods=["POST"])])) as url:
        result = ask_all(read_questions(questions), [Expert("small", url)], tmp_path / "answers.jsonl", concurrent=2)
    assert (result.answers, result.missing, asked) == (0, 19, 2)
    assert [why.split(";")[0] for why in result.left["small"]] == ["refused the gateway with status 401"]


def test_a_moderator_refuses_one_question_and_not_the_expert(questions: Path, tmp_path: Path) -> None:
    def moderated(text: str) -> tuple[int, dict[str, Any]]:
        return (403, {"error": {"message": "flagged"}}) if "1 and 5?" in text else (200, says([{"type": "text", "text": None}]))

    with Scripted(moderated) as server:
        result = ask_all(read_questions(questions), [server.expert()], tmp_path / "answers.jsonl", concurrent=1)
        assert (result.answers, result.left) == (18, {"one": {"refused with status 403": 1}})
        # To begin with, it is the key.
        first = written(tmp_path / "first.txt", "1 and 5?\n1 and 6?\n")
        result = ask_all(read_questions(first), [server.expert()], tmp_path / "none.jsonl", concurrent=1)
        assert (result.answers, sum(result.left["one"].values())) == (0, 2)
        # Where one of two servers forbids all, the other is heard.
        with Scripted(lambda text: (403, {"error": {"message": "forbidden"}})) as forbids:
            both = replace(server.expert(), other_urls=[forbids.expert().base_url])
            result = ask_all(read_questions(questions), [both], tmp_path / "both.jsonl", concurrent=1)
        assert (result.answers, result.left) == (18, {"one": {"refused with status 403": 1}})


def test_what_is_paid_for_and_no_answer_counts_and_is_given_up(questions: Path, tmp_path: Path) -> None:
    with Scripted(lambda text: (200, says("x") | {"choices": [], "note": "no\x1b[2J choice"})) as server:
        expert = server.expert()
        result = ask_all(read_questions(questions), [expert], tmp_path / "a.jsonl", concurrent=1, most_dollars=7.0)
        assert (result.dollars, len(server.asked)) == (8.0, 4)
        again = ask_all(read_questions(questions), [expert], tmp_path / "a.jsonl", concurrent=1, most_dollars=7.0)
        assert (again.dollars, again.answers, len(server.asked)) == (8.0, 0, 4), "the next run knows what was paid"
        assert list(read_answers(tmp_path / "a.jsonl")) == []
        server.answer = lambda text: (200, says("yes"))
        last = ask_all(read_questions(questions), [expert], tmp_path / "a.jsonl")
        assert (last.dollars, last.answers, last.left) == (46.0, 19, {"one": {}})
        assert len(list(read_answers(tmp_path / "a.jsonl"))) == 19
        server.answer = lambda text: (200, says("x") | {"choices": [], "note": "no\x1b[2J choice"})
        server.asked.clear()
        result = ask_all(read_questions(questions), [expert], tmp_path / "b.jsonl", concurrent=1)
        assert len(server.asked) == 10
        assert "no chat completion" in next(iter(result.left["one"]))
        assert all(reason.isprintable() for reason in result.left["one"])
