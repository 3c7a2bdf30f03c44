"""A first log: real servers are asked, answers are graded, a router is fitted."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deferral.cli import main
from deferral.errors import DataError
from deferral.gateway.answer_files import read_questions
from deferral.gateway.asking import Result, ask_all
from deferral.gateway.experts_file import Expert
from deferral.gateway.grading import by_rule
from deferral.routing import Router, read_log
from tests.asked_servers import experts_file, lines_of, written
from tests.faulty_upstream import Upstream


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
        read_questions(written(tmp_path / "questions.jsonl", text))


def test_files_and_options_that_cannot_be(adders: dict[str, Expert], questions: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(DataError, match=r"expected \.jsonl"):
        read_questions(written(tmp_path / "questions.csv", "query\nx"))
    answers = tmp_path / "answers.jsonl"
    with pytest.raises(ValueError, match="model: it is set for each request"):
        ask_all(read_questions(questions), [adders["small"]], answers, fields={"model": "x"})
    with pytest.raises(ValueError, match="most_dollars"):
        ask_all(read_questions(questions), [adders["small"]], answers, most_dollars=float("nan"))
    with pytest.raises(DataError, match=re.escape("row 1: expected an answer as `deferral gateway ask` writes it")):
        ask_all(read_questions(questions), [adders["small"]], written(answers, '{"query": "x"}\n'))
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
        written(answers, json.dumps(line | more) + "\n")
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


def test_no_file_is_taken_for_another(adders: dict[str, Expert], questions: Path, tmp_path: Path, capsys) -> None:
    """Neither the questions nor the paid answers, nor a file of somebody else without a line end, is written over."""
    file, answers, log = experts_file(tmp_path, adders), tmp_path / "answers.jsonl", tmp_path / "log.jsonl"
    precious = written(tmp_path / "precious.json", '{"thesis": 1}')
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
    ask_all(read_questions(written(tmp_path / "spoken.jsonl", spoken.format("Be brief."))), [large], more)
    with pytest.raises(DataError, match="answers another question"):
        ask_all(read_questions(written(tmp_path / "spoken.jsonl", spoken.format("Be kind."))), [large], more)
