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
_TAG = re.compile(r"</?[A-Za-z][^<>\n]{0,40}>")
# Stars around words, as in Markdown, and not those between numbers, which multiply.
_EMPHASIS = re.compile(r"(?<!\w)\*{1,3}(?=\S)|(?<=\S)\*{1,3}(?!\w)")
# Digits may be set apart in threes: 1,234, 1{,}234, 1 234.
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\?,|[ \N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}])(?=\d{3}(?!\d))")

_ARTICLES = frozenset({"a", "an", "the"})
# A sign or a point within a number, and what is between operands, make a difference; other punctuation does not.
_TOKEN = re.compile(r"(?:(?<![\w.)])-)?\d+(?:\.\d+)?|\w+|(?<=[\w) ])[<>=+*/^](?=[\w(. -])")

_MARKUP = re.compile(r"[*_`$\"\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}]|\\(?=[()\[\]])")
_QUOTED = re.compile(r"'([A-Za-z])'")
_END = r"(?=[)\]}\s.:,;!?]|\Z)(?!')(?!,? (?:and |or |& )?[A-Z]\b(?!'))"
_BOXED = re.compile(r"\\boxed ?\{(?: ?\\(?:text|mathrm|textbf|mathbf) ?\{)? ?\(?([A-Z])\b")
_CONCLUSION = re.compile(
    r"\b(?i:answer|choice|option)\b(?i: is| would be| must be| ?[:=])"
    r"(?i: clearly| therefore| thus| indeed| option| choice| letter)* ?[:=]? ?"
    rf"[(\[]?(?:([A-Z]){_END}|([a-z])(?=[)\].}}]*(?:\n|\Z)))"
)
_IS_RIGHT = re.compile(r"(?<!\w)[(\[]?([A-Z])[)\]]? is (?:the )?(?:most )?(?i:correct|right|best)\b")
_BEGINNING = re.compile(r"\A[(\[]?(?:([A-HJ-Z])(?:[)\].:,]|(?=\n|\Z)| (?![a-z]))|(I)(?:[)\].:]|(?=\n|\Z))|([a-z])[)\]])")
_AT_THE_END_OF_A_SENTENCE = re.compile(
    r"(?:(?:\b(?i:choose|pick|select|with|is|be|so|option|choice)|'s) [(\[]?([A-Z])[)\]]?|\b(?i:option|choice) ([a-z]))"
    r"(?=[.!]?(?:\s|\Z))(?! [a-z])"
)
_IN_BRACKETS = re.compile(r"[(\[]([A-Za-z])[)\]]")
_ALONE = re.compile(rf"\b([B-HJ-Z]){_END}")

_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_POWER_OF_TEN = re.compile(r"(?<=\d) ?(?:\N{MULTIPLICATION SIGN}|\\times|\*|x) ?10\^\{?(-?\d{1,3})\}?")
_NUMBER = re.compile(
    r"(-)? ?\\d?frac ?(?:\{ ?(-?\d+) ?\} ?\{ ?(\d+) ?\}|(\d)(\d))"
    # A whole number and a fraction, 2 1/2.  Three numbers with strokes between them are a date.
    r"|(-)?(?<![\w^./])(\d+)[ -](\d+)/(\d+)(?![\d/])"
    # Digits that are part of a word, or an exponent, are no number.
    r"|((?:(?<![\d)])-)?(?:(?<![\w^.])\d+(?:\.\d+)?|(?<![\w^])\.\d+)(?:[eE][-+]?\d+(?!\w))?)(?: ?/ ?(\d+)(?![\d/]))?"
)
_SOURCE = re.compile(r"\[\d+\]")
_BOX = re.compile(r"\\boxed ?\{((?:[^{}]|\{[^{}]*\})*)\}")
_SAYS = re.compile(r"(?i:\banswer(?: is| would be| must be| ?[:=]))([^\n]*)")
_ARITHMETIC = re.compile(r"[\s\d.,+\-*/()^\N{MULTIPLICATION SIGN}\N{DIVISION SIGN}]*=")
# Numbers with more digits or a larger exponent are no answers, and would take long to compute with.
_MOST_DIGITS, _LARGEST_EXPONENT = 300, 400


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
    plain = _EMPHASIS.sub("", _TAG.sub(" ", text.translate(_DASHES).translate(_QUOTES)))
    plain = unicodedata.normalize("NFKC", _THOUSANDS.sub("", plain)).casefold().replace("_", " ")
    return [token for token in _TOKEN.findall(re.sub(r"'s\b", "", plain)) if articles or token not in _ARTICLES]


def _chosen(answer: str) -> str | None:
    text = _TAG.sub(" ", answer.translate(_QUOTES).replace("<answer>", "answer: "))
    text = _QUOTED.sub(r"\1", _MARKUP.sub("", text)).strip()
    # One space between words, one line break between lines that are not empty.
    text = "\n".join(filter(None, (" ".join(line.split()) for line in text.splitlines())))
    for place in (_BOXED, _CONCLUSION, _IS_RIGHT, _BEGINNING, _AT_THE_END_OF_A_SENTENCE, _IN_BRACKETS, _ALONE):
        if found := list(place.finditer(text)):
            chosen = found[0] if place is _BEGINNING else found[-1]
            return next(filter(None, chosen.groups())).upper()
    # A single letter, even a small one; or, last of all, a final A, which elsewhere may be the article.
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
    for said in reversed(_SAYS.findall(_EMPHASIS.sub("", answer))):
        # In `3 * 4 = 12` the answer is the result, in `3 (see step 2)` the first number.
        result = said.rpartition("=")[2] if _ARITHMETIC.match(said) else said
        if found := _numbers(result):
            return found[0]
    found = _numbers(_SOURCE.sub("", answer)) or _numbers(answer)
    return found[-1] if found else None


def _numbers(text: str) -> list[Fraction]:
    plain = _VULGAR.sub(lambda one: f" {unicodedata.normalize('NFKC', one[0])}".replace("\N{FRACTION SLASH}", "/"), text)
    plain = unicodedata.normalize("NFKC", _THOUSANDS.sub("", plain.translate(_DASHES)))
    plain = _POWER_OF_TEN.sub(r"e\1", re.sub(r"[\\$\N{EURO SIGN}\N{POUND SIGN}](?=[\d.$])", "", plain))
    found: list[Fraction] = []
    for match in _NUMBER.finditer(plain):
        found += _values(*match.groups())
    return found


def _values(
    minus: str | None, above: str | None, below: str | None, digit_above: str | None, digit_below: str | None,
    minus_mixed: str | None, whole: str | None, part: str | None, of: str | None, plain: str | None, over: str | None,
) -> list[Fraction]:  # fmt: skip
    """What one match of _NUMBER stands for: a number, or several where they make none."""
    texts = [one for one in (above, below, whole, part, of, plain, over) if one is not None]
    if any(len(one) > _MOST_DIGITS for one in texts) or (plain and _exponent(plain) > _LARGEST_EXPONENT):
        return []
    above, below = above or digit_above, below or digit_below
    if above is not None and below is not None:
        return [Fraction(int(above), int(below)) * (-1 if minus else 1)] if int(below) else []
    if whole is not None and part is not None and of is not None:
        return [(int(whole) + Fraction(int(part), int(of))) * (-1 if minus_mixed else 1)] if int(of) else []
    assert plain is not None
    if over is not None and int(over) and "." not in plain:
        return [Fraction(plain) / int(over)]
    return [Fraction(one) for one in (plain, over) if one is not None]


def _exponent(number: str) -> int:
    _, _, exponent = number.lower().partition("e")
    return 0 if not exponent else _LARGEST_EXPONENT + 1 if len(exponent) > 5 else abs(int(exponent))
