"""Answers of models as they write them, beside references."""

import pytest

from deferral.routing.grades import RULES, choice, contains, exact, number


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B. Paris", "B"),
        ("B Paris", "B"),
        ("C) 42", "C"),
        ("The answer is (B).", "B"),
        ("**Answer: C**", "C"),
        ("**Answer:** C", "C"),
        ("Answer: \\boxed{C}", "C"),
        ("$\\boxed{\\text{E}}$", "E"),
        ("The correct choice is: **(J)**", "J"),
        ("I think A is wrong. The correct answer is D because A fails.", "D"),
        ("First I took the answer to be A. On reflection, the answer is B.", "B"),
        ("A good reason speaks for it, so (C)", "C"),
        ("A dog runs. So it is C", "C"),
        ("I'd say it's B", "B"),
        ("The answer is Denver", None),
        ("I cannot say.", None),
        ("", None),
    ],
)
def test_the_letter_that_an_answer_chooses(answer: str, letter: str | None) -> None:
    assert [each for each in "ABCDEFGHIJ" if choice(answer, each)] == ([letter] if letter else [])


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("The total is $1,234.50.", "1234.5", True),
        ("3 boxes of 4 make 12", "3 * 4 = 12\n#### 12", True),
        ("2.0", "2", True),
        ("-5", "\N{MINUS SIGN}5", True),
        ("x = 7-3", "3", True),
        ("1e3", "1000", True),
        ("1,000,000", "1000000", True),
        ("It is 12%.", "12", True),
        ("12, as 5 + 7", "12", False),
        ("0.1 + 0.2 = 0.3", "0.3", True),
        ("nothing", "0", False),
        ("", "1", False),
    ],
)
def test_the_last_number(answer: str, reference: str, same: bool) -> None:
    assert number(answer, reference) is same


def test_words() -> None:
    assert exact("The  Eiffel-Tower!", "eiffel tower") is False  # punctuation goes, and joins what it stood between
    assert exact("The Eiffel Tower.", "an eiffel tower")
    assert contains("It is the Eiffel Tower, in Paris.", "Eiffel tower")
    assert not contains("parishes", "Paris")
    assert exact("\N{FULLWIDTH DIGIT ONE}", "1")


@pytest.mark.parametrize(
    ("rule", "reference", "expected"), [("choice", "5049", "a letter"), ("number", "B", "a number"), ("contains", "!", "a word")]
)
def test_a_reference_that_is_none_for_the_rule(rule: str, reference: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"reference: expected {expected}"):
        RULES[rule]("B", reference)
