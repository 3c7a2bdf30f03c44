"""A first log: real servers are asked, answers are graded, a router is fitted."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from deferral.cli import main
from deferral.errors import DataError
from deferral.gateway.asking import Result, ask_all, read_answers, read_questions
from deferral.gateway.experts_file import Expert
from deferral.gateway.grading import by_field, by_judge, by_rule
from deferral.routing import Router, read_log
from tests.faulty_upstream import Upstream


async def _sum(request: Request) -> JSONResponse:
    """`large` adds, `small` adds what is below 10, and `judge` compares with the reference."""
    asked = await request.json()
    text = asked["messages"][-1]["content"]
    if asked["model"] == "judge":
        answer, right = (re.search(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)[1].strip() for name in ("answer", "reference"))
        said = "I would rather not." if "99" in text else "<think>0 or 10?</think>9/10" if right in answer else "Grade: 2"
    else:
        total = sum(map(int, re.findall(r"\d+", text)))
        said = f"That makes {total}." if asked["model"] == "large" or total < 10 else "That is too much for me."
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return JSONResponse({"id": "x", "object": "chat.completion", "model": asked["model"], "choices": [choice], "usage": usage})


@pytest.fixture(scope="module")
def adders() -> Iterator[dict[str, Expert]]:
    """small, large and judge, by a server on loopback."""
    app = Starlette(routes=[Route("/v1/chat/completions", _sum, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    yield {
        name: Expert(name, url, input_price=price, output_price=price)
        for name, price in (("small", 1.0), ("large", 20.0), ("judge", 100.0))
    }
    server.should_exit = True
    thread.join()


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """1 + 1 .. 1 + 19, with references."""
    path = tmp_path / "questions.jsonl"
    lines = [
        {"query": f"what is 1 and {number}?", "reference": 1 + number, "tags": ["low" if number < 9 else "high"]}
        for number in range(1, 20)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [answer for _, answer in read_answers(path)]


def experts_file(tmp_path: Path, experts: dict[str, Expert]) -> Path:
    path = tmp_path / "experts.toml"
    tables = [
        f'[experts.{name}]\nbase_url = "{each.base_url}"\ninput_price = {each.input_price}\noutput_price = {each.output_price}\n'
        f"route = {'false' if name == 'judge' else 'true'}\n"
        for name, each in experts.items()
    ]
    path.write_text("".join(tables))
    return path


def test_from_a_file_of_questions_to_a_router(adders: dict[str, Expert], questions: Path, tmp_path: Path, capsys) -> None:
    file, answers, log = experts_file(tmp_path, adders), tmp_path / "answers.jsonl", tmp_path / "log.jsonl"
    main(["gateway", "ask", str(questions), str(answers), "--experts", str(file), "--request", '{"temperature": 0}'])
    assert "38 answers, $0.005985; 38 of them of this run" in capsys.readouterr().out
    main(["gateway", "grade", str(answers), str(log), "--by", "number"])
    table = read_log(log).table()
    assert table.experts == ["small", "large"]
    assert table.quality.sum(0).tolist() == [8, 19]
    assert table.price[0].tolist() == [15e-6, 300e-6]
    assert {tags for tags in read_log(log).tag_sets if tags} == {("low",), ("high",)}
    assert Router(price_of_error=0.01).fit(read_log(log)).experts == ["small", "large"]


def test_only_what_is_missing_is_asked(adders: dict[str, Expert], questions: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    asked = read_questions(questions)
    ask_all(asked[:5], [adders["small"]], answers)
    first = answers.read_bytes()
    # Killed while it wrote.
    answers.write_bytes(first[:-20])
    later = ask_all(asked, [adders["small"], adders["large"]], answers)
    assert (later.answers, later.asked, later.missing) == (38, 34, 0)
    assert answers.read_bytes().startswith(first[: first[:-20].rindex(b"\n") + 1])
    found = lines_of(answers)
    assert sorted((line["row"], line["expert"]) for line in found) == sorted(
        (question.row, name) for question in asked for name in ("small", "large")
    )
    again = ask_all(asked, [adders["small"], adders["large"]], answers)
    assert (again.answers, again.asked, again.dollars) == (38, 0, pytest.approx(later.dollars))


def test_no_more_is_asked_once_the_dollars_are_spent(adders: dict[str, Expert], questions: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    one = adders["large"].price(10, 5)
    some = ask_all(read_questions(questions), [adders["large"]], answers, concurrent=1, most_dollars=3.5 * one)
    assert some.asked == 4
    assert some.left == {"large": {"nobody was asked, the dollars are spent": 15}}
    # What was spent before counts.
    assert ask_all(read_questions(questions), [adders["large"]], answers, most_dollars=3.5 * one).asked == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fields": {"temperature": 1}}, "was asked as large with {}, and not as large with"),
        ({"model": "other"}, "was asked as large with {}, and not as other"),
        ({"questions": "what is 2 and 2?\n"}, "row 1 answers another question than row 1"),
    ],
)
def test_answers_to_something_else_are_not_mixed_with_these(
    change: dict[str, Any], said: str, adders: dict[str, Expert], questions: Path, tmp_path: Path
) -> None:
    answers, large = tmp_path / "answers.jsonl", adders["large"]
    ask_all(read_questions(questions)[:2], [large], answers)
    before = answers.read_bytes()
    if "questions" in change:
        questions = tmp_path / "others.txt"
        questions.write_text(change["questions"])
    large = Expert("large", large.base_url, change.get("model", ""))
    with pytest.raises(DataError, match=re.escape(said)):
        ask_all(read_questions(questions), [large], answers, fields=change.get("fields"))
    assert answers.read_bytes() == before


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
            "status-401": {"refused the gateway with status 401; its key, model or address is wrong": 4},
            "not-able": {"refused with status 400, too long, as asked": 4},
        }
        # Asked at once, they are refused at once; nobody is asked who would be refused as well.
        assert len(upstream.asked("status-401")) <= 4
        upstream.behave("status-500", "good")
        assert ask_all(asked, [good, bad], answers).asked == 4


def test_what_fails_for_a_moment_is_asked_again(questions: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    with Upstream() as upstream:
        upstream.behave("small", "status-429")  # for one second
        mended = threading.Timer(0.3, upstream.behave, ("small", "good"))
        mended.start()
        result = ask_all(read_questions(questions)[:3], [Expert("small", upstream.url)], answers)
        mended.join()
    assert (result.answers, result.missing) == (3, 0)


def test_of_who_reports_log_probabilities_the_confidence_is_logged(tmp_path: Path) -> None:
    questions, answers = tmp_path / "questions.txt", tmp_path / "answers.jsonl"
    questions.write_text("surely\n\nperhaps\n")
    with Upstream() as upstream:
        ask_all(read_questions(questions), [Expert("small", upstream.url, logprobs=True)], answers, concurrent=1)
    for line in (written := lines_of(answers)):
        line["quality"] = 0.5
    answers.write_text("".join(f"{json.dumps(line)}\n" for line in written))
    log = by_field(answers).log
    assert [log[row].query for row in range(2)] == ["surely", "perhaps"]
    assert log.confidences[0].mean == pytest.approx(-0.01)
    assert log.confidences[1].mean == pytest.approx(-2.5)


def test_a_judge_is_asked_once_for_each_answer(adders: dict[str, Expert], questions: Path, tmp_path: Path, capsys) -> None:
    answers, verdicts = tmp_path / "answers.jsonl", tmp_path / "verdicts.jsonl"
    asked = read_questions(questions)[:12]
    ask_all(asked, [adders["small"], adders["large"]], answers)
    graded, result = by_judge(answers, adders["judge"], verdicts)
    assert result.asked == 24
    assert not graded.left_out
    log, exact = graded.log, by_rule(answers, "number").log
    assert [log[row].quality for row in range(24)] == pytest.approx([0.9 if exact[row].quality else 0.2 for row in range(24)])
    assert by_judge(answers, adders["judge"], verdicts)[1].asked == 0
    # Who says no number has given no grade.
    asked = [*asked, *read_questions(_written(tmp_path / "more.jsonl", "\n" * 12 + '{"query": "what is 99?", "reference": 99}'))]
    ask_all(asked, [adders["large"]], answers)
    assert by_judge(answers, adders["judge"], verdicts)[0].left_out == {"large": 1}
    file = experts_file(tmp_path, adders)
    main(["gateway", "grade", str(answers), str(tmp_path / "log.parquet"), "--judge", "judge", "--experts", str(file)])
    assert len(read_log(tmp_path / "log.parquet")) == 24


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "at least one question"),
        ("[1]", "row 1: expected a JSON object"),
        ('{"query": 3}', "row 1, query: expected a text"),
        ('{"query": " "}', "row 1, query: expected a text"),
        ('\n{"question": "x"}', "row 2: unknown field 'question'; expected query"),
        ('{"query": "x", "messages": []}', "either a query or messages"),
        ('{"messages": []}', "messages: expected a list, one at least"),
        ('{"query": "x", "reference": {"a": 1}}', "reference: expected a text or a list of texts"),
        ('{"query": "x", "tags": "maths"}', "tags: expected a list of texts"),
        ('{"query": "x"', "row 1: expected a JSON object"),
    ],
)
def test_questions_that_are_none(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        read_questions(_written(tmp_path / "questions.jsonl", text))


def test_files_and_options_that_cannot_be(adders: dict[str, Expert], questions: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(DataError, match=r"expected \.jsonl"):
        read_questions(_written(tmp_path / "questions.csv", "query\nx"))
    answers = tmp_path / "answers.jsonl"
    with pytest.raises(ValueError, match="model: it is set for each request"):
        ask_all(read_questions(questions), [adders["small"]], answers, fields={"model": "x"})
    with pytest.raises(DataError, match=re.escape("row 1: expected an answer as `deferral gateway ask` writes it")):
        ask_all(read_questions(questions), [adders["small"]], _written(answers, '{"query": "x"}\n'))
    line = {"row": 1, "query": "x", "expert": "small", "answer": "y", "price": 0.1}
    for more, rule, said in (
        ({}, "number", "row 1: expected a reference, to grade by number"),
        ({"reference": ["seven"]}, "number", "row 1, reference: expected a number, got 'seven'; is number the right rule?"),
        ({"reference": "7"}, "number", "row 1, reference: expected a list of texts"),
        ({"quality": 7}, "quality", "row 1, quality: expected a number in [0, 1], got 7"),
        ({"quality": None}, "quality", "nobody says of any answer how good it is"),
        ({"quality": 1, "price": -1}, "quality", "row 1, price: expected a number"),
    ):
        _written(answers, json.dumps(line | more) + "\n")
        with pytest.raises(SystemExit):
            main(["gateway", "grade", str(answers), str(tmp_path / "log.jsonl"), "--by", rule])
        assert said in capsys.readouterr().err
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.ci_slow
def test_stopped_it_keeps_what_it_has_and_goes_on(questions: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    with Upstream(first_byte_s=0.3) as upstream:
        file = experts_file(tmp_path, {"slow": Expert("slow", upstream.url)})
        command = [sys.executable, "-m", "deferral.cli", "gateway", "ask", str(questions), str(answers), "--experts", str(file)]
        running = subprocess.Popen([*command, "--concurrent", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not answers.exists() or not answers.stat().st_size:
            time.sleep(0.01)
        with pytest.raises(DataError, match="another process is writing it"):
            ask_all(read_questions(questions), [Expert("slow", upstream.url)], answers)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate()
        assert running.returncode == 130
        assert "Traceback" not in said
        kept = len(lines_of(answers))
        assert 0 < kept < 19
        result: Result = ask_all(read_questions(questions), [Expert("slow", upstream.url)], answers, concurrent=19)
        assert (result.answers, result.asked) == (19, 19 - kept)
