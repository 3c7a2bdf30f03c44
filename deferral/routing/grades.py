"""Whether an answer agrees with a reference: four rules for questions of which the right answer is known.

A rule takes the whole answer of a model, explanations included, and one reference; ValueError where that is none for the rule.
"""

import re
import string
import unicodedata
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

__all__ = ["RULES", "choice", "contains", "exact", "number"]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# Where answers say which letter they mean, the likeliest place first; of several the last, which is the conclusion.
_LETTERS = (
    re.compile(r"(?i:answer|option|choice)(?i:\s+is)?\s*[:=]?\s*[\s*_`$({\[]*(?:\\(?:boxed|text)\{)*([A-Z])\b(?!['’])"),
    re.compile(r"\A[\s*_`$(\[]*(?:\\(?:boxed|text)\{)*([A-Z])(?:[*_`$)}\].:,]|[ \t]*(?:\n|\Z)|[ \t]+(?![a-z]))"),
    re.compile(r"[(\[{]([A-Z])[)\]}]"),
    re.compile(r"\b([B-HJ-Z])\b(?!['’])"),
)
_NUMBER = re.compile(r"(?:(?<![\d)])[-−])?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?")


def exact(answer: str, reference: str) -> bool:
    """The same words: capitals, punctuation and English articles left out.  SQuAD's exact match (Rajpurkar et al. 2016)."""
    return _words(answer) == _words(reference)


def contains(answer: str, reference: str) -> bool:
    """The words of the reference stand in the answer, one after the other."""
    wanted = _words(reference)
    if not wanted:
        raise ValueError(f"reference: expected a word at least, got {reference[:60]!r}")
    return f" {' '.join(wanted)} " in f" {' '.join(_words(answer))} "


def choice(answer: str, reference: str) -> bool:
    """The letter that the answer chooses, of a multiple-choice question, is that of the reference.

    The letter after "answer is", "answer:" or the like; else the one that the answer begins with; else the last in brackets; else
    the last that stands alone.
    """
    wanted = reference.strip().strip("()[].").upper()
    if len(wanted) != 1 or not wanted.isalpha():
        raise ValueError(f"reference: expected a letter, got {reference[:60]!r}")
    return _chosen(answer) == wanted


def number(answer: str, reference: str) -> bool:
    """The last number of the answer equals the last of the reference, as in GSM8K (Cobbe et al. 2021).  1,234.50 is 1234.5."""
    wanted = _last_number(reference)
    if wanted is None:
        raise ValueError(f"reference: expected a number, got {reference[:60]!r}")
    return _last_number(answer) == wanted


RULES: dict[str, Callable[[str, str], bool]] = {rule.__name__: rule for rule in (exact, contains, choice, number)}


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKC", text).casefold().translate(_PUNCTUATION)
    return _ARTICLES.sub(" ", plain).split()


def _chosen(answer: str) -> str | None:
    for place in _LETTERS:
        if found := place.findall(answer):
            return found[-1]
    # A letter without any ceremony, in small.
    bare = answer.strip().strip("()[].*")
    return bare.upper() if len(bare) == 1 and bare.isalpha() else None


def _last_number(text: str) -> Decimal | None:
    found = [each for each in _NUMBER.findall(text) if any(map(str.isdigit, each))]
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", "").replace("−", "-"))
    except InvalidOperation:
        return None
