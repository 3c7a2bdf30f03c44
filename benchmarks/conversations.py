"""Conversations at the gateway, with its rule and without.  python -m benchmarks conversations

Claim: in generated conversations the gateway's rule costs less a turn, lost prompt caches and wrong answers together, than
deciding every request by itself, with fewer changes of the expert; no less where nearly all goes to one expert anyway.  Where
what was said so far costs more to read than a better answer is worth, always the cheapest costs less still: a conversation begins
where the router's prices, those of single requests, say.

Traffic.  A question with the answers of E models comes from RouteLLM's MMLU data (E = 2, by subject) or LLMRouter's (E = 9, by
task).  A conversation has 2 turns or more, 8 on average, and 20 at most.  With probability 0.3 a turn follows up the one before
("and in French?"): its right answer is taken to be that of the question before, by each model.  With 0.2 it changes the subject,
else it is another question of the same.  After one question in four the model asks tools one to three times: a request each,
whose results are messages of the role tool in half of the conversations and texts inside the user's messages in the others.  An
instruction of 300 tokens begins a conversation, an answer has 150, what a tool says 200; a token is four characters.

Money.  Prices of input and output are those of price lists (RouteLLM: Mixtral 0.6 and 0.6, GPT-4 10 and 30 dollars a million);
what a prompt cache holds costs a quarter of that, an assumption.  What a model has read in a conversation stays in its cache to
the conversation's end, which is kind to those who change often.  Quality is that of whoever gives a turn's last answer.
Cost in errors: 1 - quality + dollars / price of an error.  It is measured at four prices of an error, at which few, half, most
and nearly all of the questions go to dear models when they are asked by themselves.

Rows.  15% of the questions are for choosing: no router learns from them and no figure is measured on them.  On them `--choose`
tries a grid of margins and patiences, at the first three prices of an error.  Of the settings that go down slowly (patience 2 or
3) the defaults of `deferral.gateway.hysteresis.Rules` were within 0.002 of the best; going down at once was 0.005 cheaper than
these.  On these rows, too, what was said so far came to be part of the comparison: a first form took off the lost cache alone,
and cost more.  Of the other rows every seed draws its own for training (3,000), and its conversations from the rest: 100 at each
price of an error.
"""

import asyncio
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table as Printed

from benchmarks.routers.data import Data, llmrouter, routellm
from deferral.gateway.deciding import Decider
from deferral.gateway.eligible import Limited
from deferral.gateway.experts_file import Expert
from deferral.gateway.hysteresis import RULES, Rules
from deferral.gateway.requests import Asked, Hints, parse
from deferral.routing.router import Router

RESULTS = Path(__file__).parent / "results" / "conversations-cpu.json"
PAGE = Path(__file__).parent.parent / "docs" / "operating.md"
CHOOSING, TRAINING = 0.15, 3000
FOLLOW_UP, NEW_SUBJECT, WITH_TOOLS, ENDS, MOST_TURNS = 0.3, 0.2, 0.25, 1 / 7, 20
ANSWER_TOKENS, TOOL_TOKENS, INSTRUCTION_TOKENS = 150, 200, 300
CACHED = 0.25
ERRORS = {"routellm": (0.03, 0.045, 0.07, 0.2), "llmrouter": (0.0005, 0.0015, 0.005, 0.015)}
CHOOSING_ERRORS = 3
FOLLOW_UPS = (
    "yes", "go on", "and in French?", "why?", "are you sure?", "shorter, please", "explain the second step", "ok, continue",
    "can you say that more simply?", "thanks, and then?", "No. Try again.", "what does that mean?",
)  # fmt: skip
GRID = {"up": (0.0, 0.01, 0.03), "down": (0.0, 0.02), "patience": (1, 2, 3)}
BEGIN, END = "<!-- table of python -m benchmarks conversations -->", "<!-- end of the table -->"
SHOWN = ("every request by itself", "stays with the first", "the rule", "always the cheapest", "always the best")
DIGITS = {"switches": 2, "dollars": 3, "quality": 3, "cost": 3, "saved": 3}
# A decider belongs to one event loop.
LOOP = asyncio.new_event_loop()
FIGURES = ("switches", "dollars", "quality", "cost")


@dataclass(frozen=True)
class Request:
    """What a client sends, the question that it is about, and whether the turn is over when it is answered."""

    asked: Asked
    by_itself: str  # the text of the last message of the user, whatever it is
    row: int
    prompt: int  # tokens
    last: bool


def priced(name: str, folder: Path) -> tuple[Data, dict[str, Expert]]:
    """Outcomes with their prices, and the experts file that goes with them."""
    if name == "routellm":
        data, dollars = routellm(folder), np.array([[0.6, 10.0], [0.6, 30.0]])
    else:
        data = llmrouter(folder)
        with np.load(folder / "llmrouter_9model_train_outcomes.npz") as stored:
            dollars = np.stack([stored["usd_per_million_in"], stored["usd_per_million_out"]])
    characters = np.array([[len(query)] for query in data.queries])
    price = (characters / 4 * dollars[0] + ANSWER_TOKENS * dollars[1]) / 1e6
    experts = {
        expert: Expert(
            expert,
            "http://127.0.0.1:1",
            input_price=float(into),
            output_price=float(out),
            cached_input_price=float(CACHED * into),
        )
        for expert, into, out in zip(data.experts, *dollars, strict=True)
    }
    return replace(data, price=price), experts


def traffic(data: Data, rows: np.ndarray, count: int, seed: int) -> list[list[Request]]:
    """Conversations about some of the questions."""
    generator = np.random.default_rng(seed)
    by_subject = {str(subject): rows[data.subject[rows] == subject] for subject in np.unique(data.subject[rows])}
    return [list(_conversation(data, rows, by_subject, generator)) for _ in range(count)]


def _conversation(
    data: Data, rows: np.ndarray, by_subject: dict[str, np.ndarray], generator: np.random.Generator
) -> Iterator[Request]:
    row = int(generator.choice(rows))
    turns = min(2 + int(generator.geometric(ENDS)) - 1, MOST_TURNS)
    wrapped = generator.random() < 0.5
    messages: list[dict[str, Any]] = [{"role": "system", "content": _filler(INSTRUCTION_TOKENS)}]
    for turn in range(turns):
        follows = turn > 0 and generator.random() < FOLLOW_UP
        if follows:
            text = str(generator.choice(FOLLOW_UPS))
        else:
            if turn > 0:
                same = by_subject[str(data.subject[row])]
                row = int(generator.choice(rows if generator.random() < NEW_SUBJECT else same))
            text = data.queries[row]
        messages.append({"role": "user", "content": text})
        calls = int(generator.integers(1, 4)) if not follows and generator.random() < WITH_TOOLS else 0
        for call in range(calls + 1):
            yield _request(messages, row, last=call == calls)
            if call < calls:
                messages += _tool_messages(call, wrapped=wrapped)
        messages.append({"role": "assistant", "content": _filler(ANSWER_TOKENS)})


def _request(messages: list[dict[str, Any]], row: int, *, last: bool) -> Request:
    asked = parse("chat", json.dumps({"model": "auto", "messages": messages}).encode())
    users = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    prompt = sum(len(str(message["content"])) for message in messages) // 4
    return Request(asked, users, row, prompt, last)


def _tool_messages(call: int, *, wrapped: bool) -> list[dict[str, Any]]:
    said = _filler(TOOL_TOKENS)
    if wrapped:
        asks = {"role": "assistant", "content": f"<tool_call>{_filler(ANSWER_TOKENS)}</tool_call>"}
        return [asks, {"role": "user", "content": f"<tool_response>{said}</tool_response>"}]
    function = {"name": "look_up", "arguments": "{}"}
    calls = [{"id": f"call-{call}", "type": "function", "function": function}]
    return [
        {"role": "assistant", "content": _filler(ANSWER_TOKENS), "tool_calls": calls},
        {"role": "tool", "tool_call_id": f"call-{call}", "content": said},
    ]


def _filler(tokens: int) -> str:
    return "the 1 " * (tokens * 4 // 6)


Chooser = Callable[[list[Request]], list[int]]


def choosers(router: Router, experts: dict[str, Expert], error: float) -> dict[str, Chooser]:
    """Who answers the requests of a conversation, by each method."""
    names = router.experts
    alone = Decider(router, experts, deadline_s=60.0, rules=None)
    means, prices = router.fitted.means, router.fitted.mean_price

    def without_plumbing(conversation: list[Request]) -> list[int]:
        return _decided(alone, [request.asked for request in conversation], error, names)

    def by_itself(conversation: list[Request]) -> list[int]:
        return _decided(alone, [request.asked._replace(query=request.by_itself) for request in conversation], error, names)

    def first(conversation: list[Request]) -> list[int]:
        return _decided(alone, [conversation[0].asked], error, names) * len(conversation)

    return {
        "every request by itself": by_itself,
        "without what tools say": without_plumbing,
        "stays with the first": first,
        "the rule": by_rules(router, experts, error, RULES),
        "the rule, down at once": by_rules(router, experts, error, replace(RULES, patience=1)),
        "the rule, follow-ups scored": by_rules(router, experts, error, replace(RULES, follow_up=0)),
        "always the best": lambda conversation: [int(means.argmax())] * len(conversation),
        "always the cheapest": lambda conversation: [int(prices.argmin())] * len(conversation),
    }


def by_rules(router: Router, experts: dict[str, Expert], error: float, rules: Rules) -> Chooser:
    """The gateway's decisions, from the requests alone."""
    decider = Decider(router, experts, deadline_s=60.0, rules=rules)
    return lambda conversation: _decided(decider, [request.asked for request in conversation], error, router.experts)


def _decided(decider: Decider, requests: list[Asked], error: float, names: list[str]) -> list[int]:
    async def run() -> list[str]:
        wanted = Hints(price_of_error=error)
        return [(await decider.choose(decider.read(asked), wanted, Limited())).ranking[0] for asked in requests]

    return [names.index(name) for name in LOOP.run_until_complete(run())]


def judged(conversations: list[list[Request]], choose: Chooser, data: Data, experts: dict[str, Expert], error: float) -> dict:
    """Means: switches a conversation, dollars a thousand turns, quality and cost in errors a turn, and who answered."""
    served = [experts[name] for name in data.experts]
    switches, dollars, qualities = 0, 0.0, []
    answered = np.zeros(len(served))
    for conversation in conversations:
        chosen = choose(conversation)
        switches += sum(before != after for before, after in itertools.pairwise(chosen))
        read = np.zeros(len(served))
        for request, expert in zip(conversation, chosen, strict=True):
            dollars += served[expert].price(request.prompt, ANSWER_TOKENS, read[expert])
            read[expert] = request.prompt
            if request.last:
                qualities.append(data.quality[request.row, expert])
                answered[expert] += 1
    turns, quality = len(qualities), float(np.mean(qualities))
    return {
        "switches": switches / len(conversations),
        "dollars": 1000 * dollars / turns,
        "quality": quality,
        "cost": 1 - quality + dollars / turns / error,
        "shares": dict(zip(data.experts, (answered / turns).round(4).tolist(), strict=True)),
        "turns": turns,
    }


def split(data: Data, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows for choosing, the same for every seed, for training, and for the figures."""
    order = np.random.default_rng(0).permutation(len(data.queries))
    cut = int(CHOOSING * len(order))
    rest = np.random.default_rng([seed, 1]).permutation(order[cut:])
    return np.sort(order[:cut]), np.sort(rest[:TRAINING]), np.sort(rest[TRAINING:])


def fitted(data: Data, train: np.ndarray, seed: int) -> Router:
    """A router of the training rows, which decides the same in every run."""
    router = Router(1.0, seed=seed).fit(data.table(train))
    router.salt = "the same draws in every run"
    return router


def chosen_rules(found: dict[str, list[tuple[Data, dict[str, Expert], Router]]], count: int) -> list[dict]:
    """Every setting of the grid on the rows for choosing, the best first."""
    lines = []
    settings = [Rules(**dict(zip(GRID, values, strict=True))) for values in itertools.product(*GRID.values())]
    sets = [
        (name, seed, traffic(data, split(data, seed)[0], count, 1000 + seed), data, experts, router)
        for name, seeds in found.items()
        for seed, (data, experts, router) in enumerate(seeds)
    ]
    for rules in track(settings, "choosing"):
        costs = [
            judged(conversations, by_rules(router, experts, error, rules), data, experts, error)["cost"]
            for name, _, conversations, data, experts, router in sets
            for error in ERRORS[name][:CHOOSING_ERRORS]
        ]
        lines.append({**{name: asdict(rules)[name] for name in GRID}, "cost": float(np.mean(costs))})
    return sorted(lines, key=lambda line: line["cost"])


def measured(name: str, seeds: list[tuple[Data, dict[str, Expert], Router]], count: int) -> Iterator[dict]:
    """A line for each price of an error and method: means and deviations over the seeds."""
    for error in ERRORS[name]:
        runs: dict[str, list[dict]] = {}
        for seed, (data, experts, router) in enumerate(seeds):
            conversations = traffic(data, split(data, seed)[2], count, 2000 + seed)
            for method, choose in choosers(router, experts, error).items():
                runs.setdefault(method, []).append(judged(conversations, choose, data, experts, error))
        base = np.array([run["cost"] for run in runs["every request by itself"]])
        for method, found in runs.items():
            values = {figure: np.array([run[figure] for run in found]) for figure in FIGURES}
            saved = base - values["cost"]
            yield {
                "data": name,
                "price_of_error": error,
                "method": method,
                **{figure: float(value.mean()) for figure, value in values.items()},
                **{f"{figure}_deviation": float(value.std(ddof=1)) for figure, value in values.items()},
                "saved": float(saved.mean()),
                "saved_deviation": float(saved.std(ddof=1)),
                "turns": [run["turns"] for run in found],
                "shares": {expert: float(np.mean([run["shares"][expert] for run in found])) for expert in found[0]["shares"]},
            }


@click.command()
@click.option(
    "--data",
    "folder",
    envvar="DEFERRAL_DATA",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with llm/ in it.",
)
@click.option("--seeds", default=3, show_default=True, help="Draws of training rows and conversations.")
@click.option("--conversations", "count", default=100, show_default=True, help="At each price of an error, of each seed.")
@click.option("--choose", is_flag=True, help="Try the grid of margins on the rows for choosing, and measure nothing else.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS, show_default=True)
def command(folder: Path, seeds: int, count: int, choose: bool, out: Path) -> None:
    """Switches, dollars, quality and cost of generated conversations."""
    torch.set_num_threads(1)
    found = {}
    for name in ERRORS:
        data, experts = priced(name, folder / "llm")
        found[name] = [
            (data, experts, fitted(data, split(data, seed)[1], seed)) for seed in track(range(seeds), f"routers of {name}")
        ]
    record = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    about = {
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "numpy", "scikit-learn")},
        "seeds": seeds,
        "conversations": count,
    }
    if choose:
        lines = chosen_rules(found, count)
        chosen = f"python -m benchmarks conversations --choose --conversations {count}"
        record["choosing"] = {"command": chosen, **about, "lines": lines}
        show(lines[:10], list(lines[0]))
    else:
        lines = [line for name, each in found.items() for line in measured(name, each, count)]
        record["measured"] = {"command": "python -m benchmarks conversations", **about, "rules": asdict(RULES), "lines": lines}
        show(lines, ["data", "price_of_error", "method", *FIGURES, "saved", "saved_deviation"])
    out.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    click.echo(f"wrote {out.name}")
    if "measured" in record and out == RESULTS:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")
        click.echo(f"wrote the table in {PAGE.name}")


def with_table(page: str, record: dict) -> str:
    """The page with the table of these results between its marks."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    titles = ("data", "$ an error", "method", "switches", "$ per 1,000 turns", "quality", "cost, errors", "saved, errors")
    rows = [titles, tuple("---" if number == 2 or number == 0 else "---:" for number in range(len(titles)))]
    for line in record["measured"]["lines"]:
        if line["method"] in SHOWN:
            figures = [_with_deviation(line, name, digits) for name, digits in DIGITS.items()]
            rows.append((line["data"], f"{line['price_of_error']:g}", line["method"], *figures))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def _with_deviation(line: dict, name: str, digits: int) -> str:
    return f"{line[name]:.{digits}f} ± {line[f'{name}_deviation']:.{digits}f}"


def show(lines: list[dict], columns: list[str]) -> None:
    """As a table."""
    table = Printed(box=None, header_style="bold")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column in ("data", "method") else "right")
    for line in lines:
        table.add_row(*(f"{line[column]:.4g}" if isinstance(line[column], float) else str(line[column]) for column in columns))
    Console(width=180).print(table)
