"""Whether an answer agrees with a reference: four rules for questions of which the right answer is known.

A rule takes the whole answer of a model, explanations included, and one reference; ValueError where that is none for the rule.
What an answer concludes is looked for where models say it: in a box, after "the answer is", at its beginning, at its end.
"""

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

__all__ = ["RULES", "choice", "contains", "exact", "number"]

_DASHES = str.maketrans({"\N{EN DASH}": "-", "\N{EM DASH}": " - ", "\N{MINUS SIGN}": "-", "\N{NON-BREAKING HYPHEN}": "-"})
_QUOTES = str.maketrans({"\N{RIGHT SINGLE QUOTATION MARK}": "'", "\N{LEFT SINGLE QUOTATION MARK}": "'"})
_MARKUP = re.compile(r"[*_`$]")
# Digits may be set apart in threes: 1,234, 1{,}234, or by a space that does not break.
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,|\\,|[\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}])(?=\d{3}(?!\d))")

_ARTICLES = frozenset({"a", "an", "the"})
# A sign or a point within a number, and what is between numbers, make a difference; other punctuation does not.
_TOKEN = re.compile(r"(?:(?<![\w.)])-)?\d+(?:\.\d+)?|\w+|[<>=+*/%^]")

_END = r"(?=[)\]}\s.:,;!?]|\Z)(?!')"
_BOXED = re.compile(r"\\boxed ?\{(?: ?\\(?:text|mathrm|textbf|mathbf) ?\{)? ?\(?([A-Z])\b")
_CONCLUSION = re.compile(
    r"\b(?i:answer|choice|option)\b(?i: is| would be| must be| ?[:=])"
    r"(?i: clearly| therefore| thus| indeed| option| choice| letter)* ?[:=]? ?"
    rf"[(\[]?(?:([A-Z]){_END}|([a-z])(?=[)\].]*(?:\n|\Z)))"
)
_BEGINNING = re.compile(r"\A[(\[]?(?:([A-HJ-Z])(?:[)\].:,]|(?=\n|\Z)| (?![a-z]))|(I)(?:[)\].:]|(?=\n|\Z)))")
_AT_THE_END_OF_A_SENTENCE = re.compile(
    r"(?:\b(?i:choose|pick|select|with|is|be|so|option|choice)|'s) [(\[]?([A-Z])[)\]]?(?=[.!]?(?:\s|\Z))(?! [a-z])"
)
_IN_BRACKETS = re.compile(r"[(\[]([A-Z])[)\]]")
_ALONE = re.compile(rf"\b([B-HJ-Z]){_END}")

_NUMBER = re.compile(
    r"\\d?frac ?\{ ?(-?\d+) ?\} ?\{ ?(\d+) ?\}"
    # Digits that are part of a word, or an exponent, are no number; two with a stroke between them are a fraction, three a date.
    r"|((?:(?<![\d)])-)?(?:(?<![\w^.])\d+(?:\.\d+)?|(?<![\w^])\.\d+)(?:[eE][-+]?\d+(?!\w))?)(?: ?/ ?(\d+)(?![\d/]))?"
)
_SOURCE = re.compile(r"\[\d+\]")
_BOX = re.compile(r"\\boxed ?\{((?:[^{}]|\{[^{}]*\})*)\}")
_SAYS = re.compile(r"(?i:\banswer(?: is| would be| must be| ?[:=]))([^\n]*)")


def exact(answer: str, reference: str) -> bool:
    """The same words and numbers: capitals, punctuation and English articles left out.

    As SQuAD's exact match (Rajpurkar et al. 2016), but that punctuation parts words, and that signs and points of numbers count.
    """
    wanted, articles = _wanted(reference)
    return _words(answer, articles) == wanted


def contains(answer: str, reference: str) -> bool:
    """The words of the reference stand in the answer, one after the other."""
    wanted, articles = _wanted(reference)
    said, size = _words(answer, articles), len(wanted)
    return any(said[start : start + size] == wanted for start in range(len(said) - size + 1))


def choice(answer: str, reference: str) -> bool:
    """The letter that the answer chooses, of a multiple-choice question, is that of the reference.

    The letter in a box; else the last that follows "the answer is" or the like; else the one that the answer begins with; else
    the last that ends a sentence such as "so it is B"; else the last in brackets; else the last that stands alone.
    """
    wanted = reference.strip().strip("()[].").upper()
    if len(wanted) != 1 or not wanted.isalpha():
        raise ValueError(f"reference: expected a letter, got {reference[:60]!r}")
    return _chosen(answer) == wanted


def number(answer: str, reference: str) -> bool:
    """The number that the answer ends with, or says to be its answer, is that of the reference.  1,234.50 is 1234.5, 1/2 is .5.

    A reference as in GSM8K (Cobbe et al. 2021) has its number after ####; elsewhere it is to hold one number.
    """
    wanted = _numbers(reference.rpartition("####")[2])
    if len(wanted) != 1:
        raise ValueError(f"reference: expected one number, got {reference[:60]!r}")
    return _concluded(answer) == wanted[0]


RULES: dict[str, Callable[[str, str], bool]] = {rule.__name__: rule for rule in (exact, contains, choice, number)}


def _wanted(reference: str) -> tuple[list[str], bool]:
    """The words of a reference, and whether articles are among them, because there is nothing else."""
    if words := _words(reference, articles=False):
        return words, False
    if words := _words(reference, articles=True):
        return words, True
    raise ValueError(f"reference: expected a word or a number, got {reference[:60]!r}")


def _words(text: str, articles: bool) -> list[str]:
    plain = _THOUSANDS.sub("", text.translate(_DASHES).translate(_QUOTES))
    plain = re.sub(r"'s\b", "", unicodedata.normalize("NFKC", plain).casefold())
    return [token for token in _TOKEN.findall(plain.replace("_", " ")) if articles or token not in _ARTICLES]


def _chosen(answer: str) -> str | None:
    text = _MARKUP.sub("", answer.translate(_QUOTES)).strip()
    # Whatever space there is, it is one.
    text = "\n".join(filter(None, (" ".join(line.split()) for line in text.splitlines())))
    for place in (_BOXED, _CONCLUSION, _BEGINNING, _AT_THE_END_OF_A_SENTENCE, _IN_BRACKETS, _ALONE):
        if found := list(place.finditer(text)):
            chosen = found[0] if place is _BEGINNING else found[-1]
            return next(filter(None, chosen.groups())).upper()
    # A letter without any ceremony, in small; or an A, which is a word as well, as the last of all.
    bare = text.strip("()[].")
    if len(bare) == 1 and bare.isalpha():
        return bare.upper()
    return "A" if re.search(r"\bA[.)]?\Z", text) else None


def _concluded(answer: str) -> Fraction | None:
    boxed = _BOX.findall(answer)
    if boxed and (found := _numbers(boxed[-1])):
        return found[-1]
    if "####" in answer and (found := _numbers(answer.rpartition("####")[2])):
        return found[0]
    for said in reversed(_SAYS.findall(_MARKUP.sub("", answer))):
        # Of 3 * 4 = 12 the result, of 3 (see step 2) the first.
        if found := _numbers(said.rpartition("=")[2]):
            return found[0]
    found = _numbers(_SOURCE.sub("", answer)) or _numbers(answer)
    return found[-1] if found else None


def _numbers(text: str) -> list[Fraction]:
    plain = _THOUSANDS.sub("", text.translate(_DASHES))
    found = []
    for match in _NUMBER.finditer(unicodedata.normalize("NFKC", plain)):
        above, below, plain_number, over = match.groups()
        if below is not None or over is not None:
            divisor = int(below or over)
            if divisor and (above or "." not in plain_number):
                found.append(Fraction(above or plain_number) / divisor)
                continue
        found += [Fraction(one) for one in (above or plain_number, below or over) if one is not None]
    return found
