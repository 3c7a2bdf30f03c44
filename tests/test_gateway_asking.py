"""A first log: real servers are asked, answers are graded, a router is fitted."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from deferral.cli import main
from deferral.errors import DataError
from deferral.gateway.answer_files import read_answers, read_questions
from deferral.gateway.asking import Result, ask_all
from deferral.gateway.experts_file import Expert
from deferral.gateway.grading import by_field, by_judge, by_rule
from deferral.routing import Router, read_log
from tests.faulty_upstream import Upstream, closed_port
from tests.served_app import served


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
    with served(app) as url:
        yield {
            name: Expert(name, url, input_price=price, output_price=price)
            for name, price in (("small", 1.0), ("large", 20.0), ("judge", 100.0))
        }


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """1 + 1 .. 1 + 19, with references."""
    path = tmp_path / "questions.jsonl"
    lines = [
        {"query": f"what is 1 and {number}?", "reference": 1 + number, "tags": "low" if number < 9 else ["high"]}
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
    assert "38 answers, $0.005985; 38 of them from this run" in capsys.readouterr().out
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
        return JSONResponse(_says("yes"))

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
            return JSONResponse(_says("yes"))
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
        ('{"messages": []}', "messages: expected a list of objects, one at least"),
        ('{"query": "x", "reference": {"a": 1}}', "reference: expected a text or a list of texts"),
        ('{"messages": ["x"]}', "messages: expected a list of objects"),
        ("{\0}", "row 1: expected text in UTF-8"),
        ('{"query": "x", "tags": [1]}', "tags: expected a text or a list of texts"),
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
    with pytest.raises(ValueError, match="most_dollars"):
        ask_all(read_questions(questions), [adders["small"]], answers, most_dollars=float("nan"))
    with pytest.raises(DataError, match=re.escape("row 1: expected an answer as `deferral gateway ask` writes it")):
        ask_all(read_questions(questions), [adders["small"]], _written(answers, '{"query": "x"}\n'))
    line = {"row": 1, "query": "x", "expert": "small", "answer": "y", "price": 0.1}
    for more, rule, said in (
        ({}, "number", "row 1: expected a reference, to grade by number"),
        ({"reference": ["seven"]}, "number", "row 1, reference: expected one number, got 'seven'; is number the right rule?"),
        ({"reference": "7"}, "number", "row 1, reference: expected a list of texts"),
        ({"reference": ["7", 7]}, "number", "row 1, reference: expected a list of texts"),
        ({"quality": 7}, "quality", "row 1, quality: expected a number in [0, 1], got 7"),
        ({"quality": None}, "quality", "nobody says of any answer how good it is"),
        ({"quality": 1, "price": -1}, "quality", "row 1, price: expected a number"),
    ):
        _written(answers, json.dumps(line | more) + "\n")
        with pytest.raises(SystemExit):
            main(["gateway", "grade", str(answers), str(tmp_path / "log.jsonl"), "--by", rule])
        assert said in capsys.readouterr().err
    assert not (tmp_path / "log.jsonl").exists()


def test_a_row_that_is_wrong_is_named_by_its_line_though_those_before_it_have_no_grade(tmp_path: Path) -> None:
    line = {"row": 1, "query": "x", "expert": "small", "answer": "y", "price": 0.1}
    for more, said in (
        ({"price": -1}, "row 3, price: expected a number"),
        ({"quality": 7}, "row 3, quality: expected a number in [0, 1], got 7"),
        ({"tags": 5}, "row 3, tags: expected a text or a list of texts, got 5"),
        ({"confidence": 5}, "row 3, confidence: expected the numbers"),
    ):
        lines = [line, line, line | {"quality": 1} | more]
        answers = _written(tmp_path / "answers.jsonl", "".join(f"{json.dumps(one)}\n" for one in lines))
        with pytest.raises(DataError, match=re.escape(f"{answers}: {said}")):
            by_field(answers)
    graded = by_field(_written(answers, json.dumps(line | {"quality": 1, "tags": "low"}) + "\n"))
    assert graded.log[0].tags == ("low",)


def test_answers_written_by_hand_need_no_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"row": 1, "query": "x", "expert": "small", "answer": "y", "price": 0.1, "quality": 1}
    answers = _written(tmp_path / "answers.jsonl", json.dumps(line) + "\n")
    main(["gateway", "grade", str(answers), str(tmp_path / "log.jsonl"), "--by", "quality"])
    said = capsys.readouterr()
    row = next(text for text in (said.out + said.err).splitlines() if text.split()[:1] == ["small"])
    assert row.split() == ["small", "1", "0", "1.000", "100"]


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


def test_no_file_is_taken_for_another(adders: dict[str, Expert], questions: Path, tmp_path: Path, capsys) -> None:
    """Neither the questions nor the paid answers, nor a file of somebody else without a line end, is written over."""
    file, answers, log = experts_file(tmp_path, adders), tmp_path / "answers.jsonl", tmp_path / "log.jsonl"
    precious = _written(tmp_path / "precious.json", '{"thesis": 1}')
    ask_all(read_questions(questions)[:2], [adders["large"]], answers)
    before = {path: path.read_bytes() for path in (questions, answers, precious)}

    def refused(*arguments: object) -> str:
        with pytest.raises(SystemExit):
            main(["gateway", *map(str, arguments)])
        return capsys.readouterr().err

    assert "holds the questions" in refused("ask", questions, questions, "--experts", file)
    assert "expected an answer as" in refused("ask", questions, precious, "--experts", file)
    assert "holds the answers" in refused("grade", answers, answers, "--by", "number")
    main(["gateway", "grade", str(answers), str(log), "--by", "number"])
    assert "already exists" in refused("grade", answers, log, "--by", "exact")
    main(["gateway", "grade", str(answers), str(log), "--by", "exact", "--replace"])
    assert {path: path.read_bytes() for path in before} == before
    # Before a judge is paid.
    assert "expected a name that ends in" in refused(
        "grade", answers, tmp_path / "log.txt", "--judge", "judge", "--experts", file
    )
    assert sorted(path.name for path in tmp_path.glob("log*")) == ["log.jsonl"]


def test_a_last_line_without_its_end_is_an_answer_and_half_of_one_is_not(
    adders: dict[str, Expert], questions, tmp_path: Path
) -> None:
    answers, asked = tmp_path / "answers.jsonl", read_questions(questions)[:3]
    ask_all(asked, [adders["large"]], answers)
    whole = answers.read_bytes()
    answers.write_bytes(whole.rstrip(b"\n"))
    assert len(by_rule(answers, "number").log) == 3
    assert ask_all(asked, [adders["large"]], answers).asked == 0
    assert answers.read_bytes() == whole
    for cut in (b'{"ro', b'{"row": 4, "que'):
        answers.write_bytes(whole + cut)
        assert ask_all(asked, [adders["large"]], answers).asked == 0
        assert answers.read_bytes() == whole
    answers.write_bytes(whole[:-9])
    with pytest.raises(DataError, match="row 3: the last line is cut off"):
        by_rule(answers, "number")
    assert ask_all(asked, [adders["large"]], answers).asked == 1


def test_what_was_put_right_since_is_taken_over_and_nobody_is_asked_again(
    adders: dict[str, Expert], questions: Path, tmp_path: Path
) -> None:
    answers, large = tmp_path / "answers.jsonl", adders["large"]
    ask_all(read_questions(questions), [large], answers)
    questions.write_text(questions.read_text().replace('"reference": 5,', '"reference": 55,').replace('"low"', '"easy"'))
    dearer = Expert("large", large.base_url, input_price=40.0, output_price=40.0)
    result = ask_all(read_questions(questions), [dearer], answers)
    assert (result.asked, result.dollars) == (0, pytest.approx(19 * dearer.price(10, 5)))
    found = {line["query"]: line for line in lines_of(answers)}
    assert found["what is 1 and 4?"]["reference"] == ["55"]
    assert {line["price"] for line in found.values()} == {dearer.price(10, 5)}
    assert {tuple(line["tags"]) for line in found.values()} == {("easy",), ("high",)}
    # Fields that the experts file adds are part of how it was asked; a link leads to the file.
    (tmp_path / "link.jsonl").symlink_to(answers)
    with pytest.raises(DataError, match="was asked as large with"):
        ask_all(read_questions(questions), [replace(large, defaults={"reasoning_effort": "high"})], tmp_path / "link.jsonl")
    ask_all(read_questions(questions), [large], tmp_path / "link.jsonl")
    assert (tmp_path / "link.jsonl").is_symlink()
    assert lines_of(answers)[0]["price"] == large.price(10, 5)
    # A system message is part of what was asked.
    spoken = '{{"messages": [{{"role": "system", "content": "{}"}}, {{"role": "user", "content": "what is 2 and 2?"}}]}}'
    more = tmp_path / "more.jsonl"
    ask_all(read_questions(_written(tmp_path / "spoken.jsonl", spoken.format("Be brief."))), [large], more)
    with pytest.raises(DataError, match="answers another question"):
        ask_all(read_questions(_written(tmp_path / "spoken.jsonl", spoken.format("Be kind."))), [large], more)


class _Scripted:
    """A server of one model that answers by what the question says."""

    def __init__(self, answer) -> None:
        app = Starlette(routes=[Route("/v1/chat/completions", self._one, methods=["POST"])])
        self.answer, self.asked = answer, []
        self._served = served(app)

    async def _one(self, request: Request) -> JSONResponse:
        self.asked.append((await request.json())["messages"][-1]["content"])
        status, body = self.answer(self.asked[-1])
        return JSONResponse(body, status)

    def __enter__(self) -> "_Scripted":
        self._url = self._served.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._served.__exit__(*error)

    def expert(self, name: str = "one") -> Expert:
        return Expert(name, self._url, input_price=1e6, output_price=1e6)


def _says(text: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": usage}


def test_a_moderator_refuses_one_question_and_not_the_expert(questions: Path, tmp_path: Path) -> None:
    def moderated(text: str) -> tuple[int, dict[str, Any]]:
        return (403, {"error": {"message": "flagged"}}) if "1 and 5?" in text else (200, _says([{"type": "text", "text": None}]))

    with _Scripted(moderated) as server:
        result = ask_all(read_questions(questions), [server.expert()], tmp_path / "answers.jsonl", concurrent=1)
        assert (result.answers, result.left) == (18, {"one": {"refused with status 403": 1}})
        # To begin with, it is the key.
        first = _written(tmp_path / "first.txt", "1 and 5?\n1 and 6?\n")
        result = ask_all(read_questions(first), [server.expert()], tmp_path / "none.jsonl", concurrent=1)
        assert (result.answers, sum(result.left["one"].values())) == (0, 2)
        # Where one of two servers forbids all, the other is heard.
        with _Scripted(lambda text: (403, {"error": {"message": "forbidden"}})) as forbids:
            both = replace(server.expert(), other_urls=[forbids.expert().base_url])
            result = ask_all(read_questions(questions), [both], tmp_path / "both.jsonl", concurrent=1)
        assert (result.answers, result.left) == (18, {"one": {"refused with status 403": 1}})


def test_what_is_paid_for_and_no_answer_counts_and_is_given_up(questions: Path, tmp_path: Path) -> None:
    with _Scripted(lambda text: (200, _says("x") | {"choices": [], "note": "no\x1b[2J choice"})) as server:
        expert = server.expert()
        result = ask_all(read_questions(questions), [expert], tmp_path / "a.jsonl", concurrent=1, most_dollars=7.0)
        assert (result.dollars, len(server.asked)) == (8.0, 4)
        again = ask_all(read_questions(questions), [expert], tmp_path / "a.jsonl", concurrent=1, most_dollars=7.0)
        assert (again.dollars, again.answers, len(server.asked)) == (8.0, 0, 4), "the next run knows what was paid"
        assert list(read_answers(tmp_path / "a.jsonl")) == []
        server.answer = lambda text: (200, _says("yes"))
        last = ask_all(read_questions(questions), [expert], tmp_path / "a.jsonl")
        assert (last.dollars, last.answers, last.left) == (46.0, 19, {"one": {}})
        assert len(list(read_answers(tmp_path / "a.jsonl"))) == 19
        server.answer = lambda text: (200, _says("x") | {"choices": [], "note": "no\x1b[2J choice"})
        server.asked.clear()
        result = ask_all(read_questions(questions), [expert], tmp_path / "b.jsonl", concurrent=1)
        assert len(server.asked) == 10
        assert "no chat completion" in next(iter(result.left["one"]))
        assert all(reason.isprintable() for reason in result.left["one"])


@pytest.mark.parametrize(
    ("said", "grade"),
    [
        ("10", 1.0),
        ("0", 0.0),
        ("8.5", 0.85),
        ("**7**/10", 0.7),
        ("8.5/10", 0.85),
        ("7,5/10", 0.75),
        ("4/5", 0.8),
        ("85/100", 0.85),
        ("Score: 85/100", 0.85),
        ("I'd give it a 7 out of 10", 0.7),
        ("7 (on a scale from 0 to 10)", 0.7),
        ("8\n\nThe answer has 2 flaws", 0.8),
        ("Grade: 2. It misses 3 of the steps.", 0.2),
        ("**Grade: 9/10**\nStep 1: fine.", 0.9),
        ("The answer deserves 6.", 0.6),
        ("<think>0 or 10?</think>9/10", 0.9),
        ("<think>maybe 3 or 4, not 10", None),
        ("The answer 3/5 is right. Grade: 10", 1.0),
        ("1. It is correct.\n2. It is complete.\n\n9", 0.9),
        ("Grade (0-10): 8", 0.8),
        ('{"score": 8, "reason": "3 faults"}', 0.8),
        ("2 + 2 = 4 is right, so 10", None),
        ("8/10 or 9/10", None),
        ("Between 3 and 7", None),
        ("-5", None),
        ("11", None),
        ("I would rather not.", None),
    ],
)
def test_what_a_judge_says(said: str, grade: float | None, tmp_path: Path) -> None:
    line = {"row": 1, "query": "x", "expert": "small", "answer": "y", "price": 0.1}
    answers = _written(tmp_path / "answers.jsonl", json.dumps(line) + "\n" + json.dumps(line | {"answer": "sure"}) + "\n")
    with _Scripted(lambda text: (200, _says("10" if "sure" in text else said))) as server:
        graded, _ = by_judge(answers, server.expert(), tmp_path / "verdicts.jsonl")
    assert [outcome.quality for outcome in graded.log] == [
        *([] if grade is None else [pytest.approx(grade)]),
        1.0,
    ]


def test_each_judge_has_its_own_say(adders: dict[str, Expert], questions: Path, tmp_path: Path, capsys) -> None:
    answers, log = tmp_path / "answers.jsonl", tmp_path / "log.jsonl"
    ask_all(read_questions(questions)[:2], [adders["large"]], answers)
    with _Scripted(lambda text: (200, _says("2"))) as server:
        other = server.expert("strict [x]/y")
        file = experts_file(tmp_path, {"judge": adders["judge"]})
        file.write_text(file.read_text() + f'[experts."{other.name}"]\nbase_url = "{other.base_url}"\nroute = false\n')
        for judge, quality in (("judge", 0.9), (other.name, 0.2), ("judge", 0.9)):
            main(["gateway", "grade", str(answers), str(log), "--judge", judge, "--experts", str(file), "--replace"])
            assert read_log(log)[0].quality == pytest.approx(quality)
        assert len(server.asked) == 2
