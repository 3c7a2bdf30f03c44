"""Answers are graded by a judge, by a rule, or by hand."""

import json
import re
from pathlib import Path

import pytest

from deferral.cli import main
from deferral.errors import DataError
from deferral.gateway.answer_files import read_questions
from deferral.gateway.asking import ask_all
from deferral.gateway.experts_file import Expert
from deferral.gateway.grading import by_field, by_judge, by_rule
from deferral.routing import read_log
from tests.asked_servers import Scripted, experts_file, lines_of, says, written
from tests.faulty_upstream import Upstream


def test_of_who_reports_log_probabilities_the_confidence_is_logged(tmp_path: Path) -> None:
    questions, answers = tmp_path / "questions.txt", tmp_path / "answers.jsonl"
    questions.write_text("surely\n\nperhaps\n")
    with Upstream() as upstream:
        ask_all(read_questions(questions), [Expert("small", upstream.url, logprobs=True)], answers, concurrent=1)
    for line in (lines := lines_of(answers)):
        line["quality"] = 0.5
    answers.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
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
    asked = [*asked, *read_questions(written(tmp_path / "more.jsonl", "\n" * 12 + '{"query": "what is 99?", "reference": 99}'))]
    ask_all(asked, [adders["large"]], answers)
    assert by_judge(answers, adders["judge"], verdicts)[0].left_out == {"large": 1}
    file = experts_file(tmp_path, adders)
    main(["gateway", "grade", str(answers), str(tmp_path / "log.parquet"), "--judge", "judge", "--experts", str(file)])
    assert len(read_log(tmp_path / "log.parquet")) == 24


def test_a_row_that_is_wrong_is_named_by_its_line_though_those_before_it_have_no_grade(tmp_path: Path) -> None:
    line = {"row": 1, "query": "x", "expert": "small", "answer": "y", "price": 0.1}
    for more, said in (
        ({"price": -1}, "row 3, price: expected a number"),
        ({"quality": 7}, "row 3, quality: expected a number in [0, 1], got 7"),
        ({"tags": 5}, "row 3, tags: expected a text or a list of texts, got 5"),
        ({"confidence": 5}, "row 3, confidence: expected the numbers"),
    ):
        lines = [line, line, line | {"quality": 1} | more]
        answers = written(tmp_path / "answers.jsonl", "".join(f"{json.dumps(one)}\n" for one in lines))
        with pytest.raises(DataError, match=re.escape(f"{answers}: {said}")):
            by_field(answers)
    graded = by_field(written(answers, json.dumps(line | {"quality": 1, "tags": "low"}) + "\n"))
    assert graded.log[0].tags == ("low",)


def test_answers_written_by_hand_need_no_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"row": 1, "query": "x", "expert": "small", "answer": "y", "price": 0.1, "quality": 1}
    answers = written(tmp_path / "answers.jsonl", json.dumps(line) + "\n")
    main(["gateway", "grade", str(answers), str(tmp_path / "log.jsonl"), "--by", "quality"])
    said = capsys.readouterr()
    row = next(text for text in (said.out + said.err).splitlines() if text.split()[:1] == ["small"])
    assert row.split() == ["small", "1", "0", "1.000", "100"]


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
    answers = written(tmp_path / "answers.jsonl", json.dumps(line) + "\n" + json.dumps(line | {"answer": "sure"}) + "\n")
    with Scripted(lambda text: (200, says("10" if "sure" in text else said))) as server:
        graded, _ = by_judge(answers, server.expert(), tmp_path / "verdicts.jsonl")
    assert [outcome.quality for outcome in graded.log] == [
        *([] if grade is None else [pytest.approx(grade)]),
        1.0,
    ]


def test_each_judge_has_its_own_say(adders: dict[str, Expert], questions: Path, tmp_path: Path, capsys) -> None:
    answers, log = tmp_path / "answers.jsonl", tmp_path / "log.jsonl"
    ask_all(read_questions(questions)[:2], [adders["large"]], answers)
    with Scripted(lambda text: (200, says("2"))) as server:
        other = server.expert("strict [x]/y")
        file = experts_file(tmp_path, {"judge": adders["judge"]})
        file.write_text(file.read_text() + f'[experts."{other.name}"]\nbase_url = "{other.base_url}"\nroute = false\n')
        for judge, quality in (("judge", 0.9), (other.name, 0.2), ("judge", 0.9)):
            main(["gateway", "grade", str(answers), str(log), "--judge", judge, "--experts", str(file), "--replace"])
            assert read_log(log)[0].quality == pytest.approx(quality)
        assert len(server.asked) == 2
