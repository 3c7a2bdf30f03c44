"""Questions with one right answer, of easy and of hard kinds: what the demo's language models learn, and are asked."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["KINDS", "Question", "is_right", "questions", "stream"]

LETTERS = list("bcdfghkmnprstvz")
NAMES = [
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gus",
    "Hana",
    "Ivo",
    "Jan",
    "Kim",
    "Lea",
    "Mia",
    "Noah",
    "Olga",
    "Pia",
    "Ron",
    "Sue",
    "Tom",
    "Uma",
]
THINGS = [
    "apples",
    "books",
    "coins",
    "dolls",
    "eggs",
    "forks",
    "hats",
    "kites",
    "lamps",
    "nuts",
    "pens",
    "rings",
    "shells",
    "toys",
]
DAYS = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
]

Draw = random.Random


@dataclass(frozen=True)
class Question:
    """A text, its one right answer, and the kind it is of."""

    kind: str
    text: str
    answer: str


def _first(draw: Draw) -> tuple[str, str]:
    letters = draw.sample(LETTERS, draw.randint(3, 5))
    return f"What is the first of {' '.join(letters)}?", letters[0]


def _last(draw: Draw) -> tuple[str, str]:
    letters = draw.sample(LETTERS, draw.randint(3, 5))
    return f"What is the last of {' '.join(letters)}?", letters[-1]


def _weekday(draw: Draw) -> tuple[str, str]:
    day, days, name = draw.randrange(7), draw.randint(1, 3), draw.choice(NAMES)
    return f"{name} leaves on {DAYS[day]} for {days} days. Back on?", DAYS[(day + days) % 7]


def _digits(draw: Draw) -> tuple[str, str]:
    one, other, thing = draw.randint(0, 9), draw.randint(0, 9), draw.choice(THINGS)
    return f"Add {one} and {other} {thing}.", f"{one + other}"


def _owner(draw: Draw) -> tuple[str, str]:
    (one, other), (mine, yours) = draw.sample(NAMES, 2), draw.sample(THINGS, 2)
    asked = draw.randrange(2)
    return f"{one} likes {mine}, {other} likes {yours}. Who likes {(mine, yours)[asked]}?", (one, other)[asked]


def _reversed(draw: Draw) -> tuple[str, str]:
    letters = draw.sample(LETTERS, draw.randint(3, 5))
    return f"Write {' '.join(letters)} backwards.", " ".join(reversed(letters))


def _sorted(draw: Draw) -> tuple[str, str]:
    numbers = draw.sample(range(10), draw.randint(3, 4))
    return f"Sort {' '.join(map(str, numbers))}.", " ".join(map(str, sorted(numbers)))


def _bought(draw: Draw) -> tuple[str, str]:
    one, other, name, thing = draw.randint(10, 30), draw.randint(2, 9), draw.choice(NAMES), draw.choice(THINGS)
    verb, now = draw.choice((("buys", one + other), ("loses", one - other)))
    return f"{name} has {one} {thing} and {verb} {other}. How many now?", f"{now}"


KINDS: dict[str, Callable[[Draw], tuple[str, str]]] = {
    "first letter": _first,
    "last letter": _last,
    "weekday": _weekday,
    "small sum": _digits,
    "who likes it": _owner,
    "backwards": _reversed,
    "sort": _sorted,
    "word problem": _bought,
}


def stream(seed: int, exclude: frozenset[str] = frozenset()) -> Iterator[Question]:
    """Questions without end, kind after kind, none with a text that is excluded.  They repeat themselves."""
    draw = random.Random(seed)
    while True:
        for kind, make in KINDS.items():
            text, answer = make(draw)
            if text not in exclude:
                yield Question(kind, text, answer)


def questions(count: int, *, seed: int, exclude: frozenset[str] = frozenset()) -> list[Question]:
    """Different questions, none with a text that is excluded."""
    found: dict[str, Question] = {}
    for question in stream(seed, exclude):
        found.setdefault(question.text, question)
        if len(found) >= count:
            return list(found.values())
    raise AssertionError("the stream has no end")


def is_right(answer: str, question: Question) -> bool:
    """True if the answer is the right one, but for blanks around it."""
    return answer.strip() == question.answer
