"""Answers of models as they write them, beside references."""

import re

import pytest

from deferral.routing.grades import RULES, choice, number


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(b)", "B"),
        ("A", "A"),
        ("I", "I"),
        ("B. Paris", "B"),
        ("B Paris", "B"),
        ("C) 42", "C"),
        ("A: because of x", "A"),
        ("The answer is (B).", "B"),
        ("the answer is b", "B"),
        ("The answer is I.", "I"),
        ("Final answer: D", "D"),
        ("**Answer: C**", "C"),
        ("**Answer**: B\n\nVitamin C is good", "B"),
        ("Answer: \\boxed{C}", "C"),
        ("$\\boxed{\\text{E}}$", "E"),
        ("The correct choice is: **(J)**", "J"),
        ("The answer would be option E.", "E"),
        ("The correct answer is B) Paris.\n\nOption A is wrong because. Option C is bad, option D too", "B"),
        ("Answer: B\n\nExplanation: option C would be x", "B"),
        ("B. Paris. Option C is Rome", "B"),
        ("Option A is wrong. The correct answer is clearly B.", "B"),
        ("For my final answer I choose B.", "B"),
        ("I would choose A.", "A"),
        ("It's A.", "A"),
        ("The right one is A", "A"),
        ("Looking at option A, it fails. Therefore the right one is (C).", "C"),
        ("The answer is not B but C", "C"),
        ("Option A and B are tempting, so A", "A"),
        ("I think A is wrong. The correct answer is D because A fails.", "D"),
        ("First I took the answer to be A. On reflection, the answer is B.", "B"),
        ("I think the answer is (A) because of B.", "A"),
        ("A good reason speaks for it, so (C)", "C"),
        ("A dog runs. So it is C", "C"),
        ("I'd say it's B", "B"),
        ('The answer is "B". Option (C) is wrong.', "B"),
        ("The answer is 'C'", "C"),
        ("The answer is \\(B\\).", "B"),
        ('{"answer": "B"}', "B"),
        ("<answer>B</answer>", "B"),
        ("A is correct.", "A"),
        ("A is the correct answer.", "A"),
        ("b) Paris", "B"),
        ("Hence, (b) is right", "B"),
        ("option b", "B"),
        ("D. None of these is the answer: A, B and C contain errors.", "D"),
        ("The answer is Denver", None),
        ("The answer is a dog", None),
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
        ("1{,}234", "1234", True),
        ("1\N{NO-BREAK SPACE}000\N{NO-BREAK SPACE}000", "1000000", True),
        ("3 boxes of 4 make 12", "3 * 4 = 12\n#### 12", True),
        ("2.0", "2", True),
        (".5", "0.5", True),
        ("5.", "5", True),
        ("-5", "\N{MINUS SIGN}5", True),
        ("x = \N{EN DASH}3", "-3", True),
        ("x = 7-3", "3", True),
        ("so 10-5=5", "5", True),
        ("1e3", "1000", True),
        ("It is 12%.", "12", True),
        ("5 km2", "5", True),
        ("7 m^2", "7", True),
        ("10^2 = 100", "100", True),
        ("It is 1/2", "0.5", True),
        ("\\boxed{\\frac{3}{4}}", "3/4", True),
        ("\\frac{1}{4}", "3/4", False),
        ("3/2", "1/2", False),
        ("1/0", "1", False),
        ("Answer: 3 (see step 2)", "3", True),
        ("The answer is 3 * 4 = 12.", "12", True),
        ("The answer is: **42** apples", "42", True),
        ("The answer is 7. I am sure, as step 2 says.", "7", True),
        ("18 apples [1]", "18", True),
        ("12, as 5 + 7", "12", False),
        ("0.1 + 0.2 = 0.3", "0.3", True),
        ("\\boxed{-\\frac{1}{2}}", "-0.5", True),
        ("\\frac12", "0.5", True),
        ("-$5", "-5", True),
        ("1\N{VULGAR FRACTION ONE HALF}", "1.5", True),
        ("2 1/2 hours", "2.5", True),
        ("1.5 \N{MULTIPLICATION SIGN} 10^3", "1500", True),
        ("12 000", "12000", True),
        ("The answer is 18 since 16 - 3 - 4 = 9", "18", True),
        ("0." + "3" * 4500, "0.3", False),
        ("The commit is 3e48291047", "7", False),
        ("nothing", "0", False),
        ("", "1", False),
    ],
)
def test_the_number_that_an_answer_comes_to(answer: str, reference: str, same: bool) -> None:
    assert number(answer, reference) is same


@pytest.mark.parametrize(
    ("rule", "answer", "reference", "same"),
    [
        ("exact", "The Eiffel Tower.", "an eiffel tower", True),
        ("exact", "Eiffel-Tower!", "eiffel tower", True),
        ("exact", "\N{FULLWIDTH DIGIT ONE}", "1", True),
        ("exact", "**Paris**", "Paris", True),
        ("exact", "* Paris", "Paris", True),
        ("exact", "> Paris", "Paris", True),
        ("exact", "<b>Paris</b>", "Paris", True),
        ("contains", "**Barack** Obama", "Barack Obama", True),
        ("exact", "2 * 3", "2*3", True),
        ("exact", "A", "A", True),
        ("exact", "", "A", False),
        ("exact", "The", "A", False),
        ("exact", "5", "-5", False),
        ("exact", "1.5", "15", False),
        ("exact", "x<1", "x>1", False),
        ("contains", "It is the Eiffel Tower, in Paris.", "Eiffel tower", True),
        ("contains", "\N{LEFT DOUBLE QUOTATION MARK}Paris\N{RIGHT DOUBLE QUOTATION MARK}", "Paris", True),
        ("contains", "Jane Austen\N{EM DASH}an English novelist", "Jane Austen", True),
        ("contains", "Jane Austen\N{RIGHT SINGLE QUOTATION MARK}s novel", "Jane Austen", True),
        ("contains", "Paris/France", "Paris", True),
        ("contains", "2+3=5", "5", True),
        ("contains", "about 1,234 people", "1234", True),
        ("contains", "in 1999-2005", "2005", True),
        ("contains", "parishes", "Paris", False),
        ("contains", "it costs 1.5 dollars", "15", False),
        ("contains", "it is 5 degrees", "-5", False),
    ],
)
def test_words_and_numbers(rule: str, answer: str, reference: str, same: bool) -> None:
    assert RULES[rule](answer, reference) is same


@pytest.mark.parametrize(
    ("rule", "reference", "expected"),
    [
        ("choice", "5049", "a letter"),
        ("number", "B", "one number"),
        ("number", "2024-12-05", "one number"),
        ("contains", "!", "a word or a number"),
        ("exact", "?", "a word or a number"),
    ],
)
def test_a_reference_that_is_none_for_the_rule(rule: str, reference: str, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"reference: expected {expected}")):
        RULES[rule]("B", reference)


@pytest.mark.parametrize("part", ["\n", "answer is ", "(", "\\boxed{", "1,", "[1", "A ", "\\frac{1}", "-"])
@pytest.mark.parametrize("rule", RULES)
def test_what_a_model_repeats_without_end_is_read(rule: str, part: str) -> None:
    """A pattern that tries all ways to divide it between its parts would not come to an end."""
    assert RULES[rule](f"The answer{part * 20_000}x", "77" if rule == "number" else "Z") is False
