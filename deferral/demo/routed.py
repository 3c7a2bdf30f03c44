"""Ways to have questions answered, side by side: accuracy, dollars, and what both together cost."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from deferral.demo.questions import Question, is_right
from deferral.intervals import Interval, mean_interval, paired_difference
from deferral.printed import plus_minus, print_whole, table_of

__all__ = ["PRICES", "PRICE_OF_ERROR", "Method", "Reply", "Result", "how_to_call", "judged", "show"]

PRICES = {"small": (0.10, 0.40), "large": (2.50, 10.00)}  # dollars per million tokens in and out, as such models are listed
PRICE_OF_ERROR = 0.001  # dollars


@dataclass(frozen=True)
class Reply:
    """An answer that came back, who gave it, and what it costs by the list."""

    text: str
    expert: str
    dollars: float


@dataclass(frozen=True)
class Method:
    """One way to have N questions answered: whether each answer was right, and dollars.  (N,), (N,)"""

    name: str
    right: np.ndarray
    dollars: np.ndarray

    @property
    def cost(self) -> np.ndarray:
        """1 - right + dollars / price_of_error, in errors.  (N,)"""
        return 1 - self.right + self.dollars / PRICE_OF_ERROR

    def minus(self, other: "Method") -> tuple[Interval, Interval, Interval]:
        """Differences of accuracy, of dollars for 1,000 questions and of the cost, paired over the questions."""
        return (
            paired_difference(self.right, other.right),
            paired_difference(1000 * self.dollars, 1000 * other.dollars),
            paired_difference(self.cost, other.cost),
        )


@dataclass(frozen=True)
class Result:
    """What the tables show.  `asked` is who answered each question as the router decided."""

    questions: Sequence[Question]
    methods: Sequence[Method]
    asked: Sequence[str]
    parameters: Mapping[str, int]
    rows: int  # on the gateway's record
    seconds: float

    def __getitem__(self, name: str) -> Method:
        return next(method for method in self.methods if method.name == name)


def judged(test: Sequence[Question], replies: Mapping[str, Sequence[Reply]]) -> list[Method]:
    """The methods of the table, from the replies of "small", "large" and "auto".

    The oracle asks the cheaper of those that are right, the cheapest if none is.  "random, same share" sends every question to
    the large model with the same probability, in expectation.
    """

    def method(name: str, given: Sequence[Reply]) -> Method:
        right = [float(is_right(reply.text, question)) for reply, question in zip(given, test, strict=True)]
        return Method(name, np.array(right), np.array([reply.dollars for reply in given]))

    small, large = method("always small", replies["small"]), method("always large", replies["large"])
    share = float(np.mean([reply.expert == "large" for reply in replies["auto"]]))
    mixed = [share * one + (1 - share) * other for one, other in ((large.right, small.right), (large.dollars, small.dollars))]
    best = large.cost < small.cost
    oracle = [np.where(best, one, other) for one, other in ((large.right, small.right), (large.dollars, small.dollars))]
    return [
        small,
        large,
        Method("random, same share", *mixed),
        method("routed", replies["auto"]),
        Method("oracle", *oracle),
    ]


def show(result: Result) -> None:
    """Print the table of methods, who answered what, and what was saved."""
    routed = result["routed"]
    scales = ((1, 100), (4, 1), (3, 1))
    figures = table_of(f"{len(result.questions)} questions through the gateway", "", "accuracy %", "$ per 1,000", "cost")
    differences = table_of("\nrouted minus it", "", "accuracy %", "$ per 1,000", "cost")
    for method in result.methods:
        own = (mean_interval(method.right), mean_interval(1000 * method.dollars), mean_interval(method.cost))
        cells = (plus_minus(value, f".{digits}f", scale=scale) for value, (digits, scale) in zip(own, scales, strict=True))
        figures.add_row(method.name, *cells, style="bold" if method is routed else None)
        if method is not routed:
            gaps = zip(routed.minus(method), scales, strict=True)
            differences.add_row(method.name, *(_difference(gap, *scale) for gap, scale in gaps))
    print_whole(figures)
    print_whole(differences)
    sizes = ", ".join(f"{name} {number / 1e6:.2f} million" for name, number in result.parameters.items())
    prices = ", ".join(f"{name} ${into:g} and ${out:g}" for name, (into, out) in PRICES.items())
    console = Console()
    for note in (
        f"Parameters: {sizes}.  List prices per million tokens in and out: {prices}.",
        f"cost: errors and dollars together, at ${PRICE_OF_ERROR:g} an error.  ±: half the 95% bootstrap interval.  Differences",
        "have theirs in brackets, paired over the questions; a cost below 0 means that routing is cheaper than the row.",
    ):
        console.print(note, highlight=False, soft_wrap=True)
    print_whole(_by_kind(result))
    saved = 1 - routed.dollars.sum() / result["always large"].dollars.sum()
    share = np.mean([name == "large" for name in result.asked])
    console.print(
        f"Routing asked the large model for {100 * share:.0f}% of the questions and saved {100 * saved:.0f}% of its bill.  "
        f"{result.rows} requests are on the gateway's record.  {result.seconds:.0f} s in all.",
        highlight=False,
        soft_wrap=True,
    )


def how_to_call(url: str) -> str:
    """For a person in front of a terminal."""
    question = "Sort 7 3 9."
    body = json.dumps({"model": "auto", "messages": [{"role": "user", "content": question}]})
    return f"""
The gateway is up at {url} until Ctrl-C; "auto" routes, "small" and "large" insist.

curl -i {url}/chat/completions -H 'content-type: application/json' -d '{body}'

from openai import OpenAI
client = OpenAI(base_url="{url}", api_key="none")
print(client.chat.completions.create(model="auto", messages=[{{"role": "user", "content": "{question}"}}]))
"""


def _by_kind(result: Result) -> Table:
    table = table_of("\nby kind of question, %", "", "small right", "large right", "to the large", "routed right")
    kinds = np.array([question.kind for question in result.questions])
    to_large = np.array([name == "large" for name in result.asked], float)
    for kind in dict.fromkeys(kinds):
        rows = kinds == kind
        columns = (result["always small"].right, result["always large"].right, to_large, result["routed"].right)
        example = next(question.text for question in result.questions if question.kind == kind)
        table.add_row(f"{kind}: {example}", *(f"{100 * column[rows].mean():.0f}" for column in columns))
    return table


def _difference(gap: Interval, digits: int, scale: float) -> str:
    estimate, low, high = (f"{scale * value:+.{digits}f}" for value in (gap.estimate, gap.low, gap.high))
    return f"{estimate} [{low}, {high}]" + ("" if gap.excludes_zero() else " tie")
