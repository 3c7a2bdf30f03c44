"""Asking every expert every question of a file, so that there is a first log to learn from.

The answers are lines of JSON, written as they come: a run that was stopped, or that not everybody answered, is continued by
asking again, and only what is missing is asked.  An expert that joins later is asked alone.
"""

import asyncio
import json
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time
from typing import Any, BinaryIO

from deferral.errors import DataError
from deferral.gateway.cascading import ALTERNATIVES
from deferral.gateway.experts_file import Expert
from deferral.gateway.problems import Problem
from deferral.gateway.requests import parse
from deferral.gateway.shaping import shaped
from deferral.gateway.upstream import Failure, Reply, Upstream
from deferral.routing.confidence import confidence_of_reply
from deferral.routing.log_files import JSON_LINES
from deferral.whole_files import claim

__all__ = ["Question", "Result", "ask_all", "read_answers", "read_questions"]

_log = logging.getLogger("deferral.gateway")

_KNOWN = ("query", "messages", "reference", "tags")
# Of a request: these are set here, or would give something else than one whole answer.
_TAKEN = frozenset({"model", "messages", "stream", "stream_options", "n", "logprobs", "top_logprobs"})
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0
# An expert that nobody gets an answer from is given up: its other questions would wait as long.
_FAILURES_IN_A_ROW = 10
_MOST_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Question:
    """A line of the file, counted from 1: what is sent, what the router will take for the query, what is known of the answer."""

    row: int
    query: str
    messages: list[Any]
    given: dict[str, Any]  # repeated in every answer: reference, tags, and messages where there is more than the query


@dataclass
class Result:
    """What a run has done.  `left` counts, for each expert, why questions are not answered."""

    answers: int = 0  # in the file, those of earlier runs too
    asked: int = 0  # in this run
    dollars: float = 0.0  # for all answers in the file
    cut: Counter[str] = field(default_factory=Counter)  # answers that ended at their longest
    left: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """Answers that a further run would ask for."""
        return sum(sum(reasons.values()) for reasons in self.left.values())


def read_questions(path: Path) -> list[Question]:
    """Of .jsonl or .ndjson, an object a line with "query" or "messages", or of a text file, a question a line.

    Beside it "reference", the right answer or a list of them, and "tags", a list.  DataError names the row.
    """
    as_objects = path.suffix.lower() in JSON_LINES
    if path.suffix.lower() in (".json", ".csv", ".tsv", ".parquet", ".xlsx"):
        raise DataError(f"{path}: expected .jsonl, an object with a query a line, or a text file, a question a line")
    questions = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for row, line in enumerate(file, start=1):
                if line.strip():
                    questions.append(_question(path, row, _object(path, row, line) if as_objects else {"query": line.strip()}))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: it cannot be read, {error}") from error
    if not questions:
        raise DataError(f"{path}: expected at least one question, got none")
    return questions


def _object(path: Path, row: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: row {row}: expected a JSON object, {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: row {row}: expected a JSON object, got {line[:60]!r}")
    return found


def _question(path: Path, row: int, given: dict[str, Any]) -> Question:
    def wrong(name: str, expected: str) -> DataError:
        return DataError(f"{path}: row {row}, {name}: expected {expected}, got {str(given.get(name))[:60]!r}")

    if unknown := sorted(set(given) - set(_KNOWN)):
        raise DataError(f"{path}: row {row}: unknown field {unknown[0]!r}; expected {', '.join(_KNOWN)}")
    if ("query" in given) == ("messages" in given):
        raise DataError(f"{path}: row {row}: expected either a query or messages")
    if "query" in given and (not isinstance(given["query"], str) or not given["query"].strip()):
        raise wrong("query", "a text")
    reference = given.get("reference", [])
    references = reference if isinstance(reference, list) else [reference]
    if any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in references):
        raise wrong("reference", "a text or a list of texts")
    tags = given.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise wrong("tags", "a list of texts")
    messages = given.get("messages", [{"role": "user", "content": given.get("query")}])
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "a list, one at least")
    repeated = {name: given[name] for name in ("messages", "tags") if given.get(name)}
    if references:
        repeated["reference"] = [str(one) for one in references]
    try:
        query = parse("chat", json.dumps({"model": "any", "messages": messages}).encode()).query
    except (Problem, RecursionError) as error:
        raise DataError(f"{path}: row {row}: {error}") from None
    return Question(row, query, messages, repeated)


def ask_all(
    questions: Sequence[Question],
    experts: Sequence[Expert],
    answers: Path,
    *,
    fields: Mapping[str, Any] | None = None,
    concurrent: int = 8,
    most_dollars: float = math.inf,
    patience: float = 120.0,
    on_answer: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Ask each expert each question that `answers` does not hold yet, `concurrent` of them at a time; lines are added to it.

    `fields` are added to every request, `max_tokens` say.  Once all answers together cost `most_dollars` no more is asked; what
    is under way then still ends.  A call that fails is repeated for `patience` seconds, and an expert that gives nothing any more
    is given up.  DataError where the file holds answers to other questions, or of experts who were asked otherwise.
    """
    fields = dict(fields or {})
    if taken := sorted(_TAKEN & set(fields)):
        raise ValueError(f"{taken[0]}: it is set for each request; expected other fields, max_tokens say")
    if len({expert.name for expert in experts}) < len(experts) or not experts:
        raise ValueError(f"experts: expected different ones, at least one, got {[expert.name for expert in experts]}")
    with answers.open("ab+") as file:
        claim(file, answers)
        result = Result(left={expert.name: Counter() for expert in experts})
        done = _done(file, answers, questions, experts, fields, result)
        run = _Run(file, result, fields, most_dollars, patience, on_answer)
        on_answer(result)
        try:
            asyncio.run(run.all(questions, experts, done, concurrent))
        except ExceptionGroup as errors:
            # One is enough to end the work: a full disk, say.
            raise errors.exceptions[0] from None
    return result


def read_answers(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a file of answers, numbered from 1; a last line that was cut off is none.  DataError names the row."""
    try:
        with path.open("rb") as file:
            for row, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    answer = json.loads(line)
                    whole = all(isinstance(answer[name], str) for name in ("query", "expert", "answer"))
                    whole = whole and type(answer["row"]) is int and isinstance(answer["price"], int | float)
                except (ValueError, KeyError, TypeError, RecursionError):
                    whole = False
                if not whole:
                    raise DataError(
                        f"{path}: row {row}: expected an answer as `deferral gateway ask` writes it, got {line[:60]!r}"
                    )
                yield row, answer
    except OSError as error:
        raise DataError(f"{path}: it cannot be read, {error}") from error


def _done(
    file: BinaryIO,
    path: Path,
    questions: Sequence[Question],
    experts: Sequence[Expert],
    fields: dict[str, Any],
    result: Result,
) -> set[tuple[int, str]]:
    """(row, expert) of the answers that are there; what was cut off is taken away."""
    by_row, by_name = {question.row: question for question in questions}, {expert.name: expert for expert in experts}
    done = set()
    for number, answer in read_answers(path):
        question, expert = by_row.get(answer["row"]), by_name.get(answer["expert"])
        if question is None or question.query != answer["query"]:
            raise DataError(
                f"{path}: row {number} answers another question than row {answer['row']} of this file; name another file for the "
                "answers, or ask the questions of before"
            )
        result.answers += 1
        result.dollars += answer["price"]
        if expert is None:
            continue
        asked = answer.get("model"), answer.get("request")
        if asked != (expert.model, fields):
            raise DataError(
                f"{path}: row {number}: {expert.name} was asked as {asked[0]} with {json.dumps(asked[1])}, and not as "
                f"{expert.model} with {json.dumps(fields)}; ask as before, or name another file for the answers"
            )
        result.cut[expert.name] += answer.get("finish") == "length"
        done.add((answer["row"], expert.name))
    file.seek(0)
    content_end = file.read().rfind(b"\n") + 1
    file.truncate(content_end)
    return done


class _Run:
    """The calls of one run."""

    def __init__(
        self,
        file: BinaryIO,
        result: Result,
        fields: dict[str, Any],
        most_dollars: float,
        patience: float,
        on_answer: Callable[[Result], None],
    ) -> None:
        self.file, self.result, self.fields = file, result, fields
        self.most_dollars, self.patience, self.on_answer = most_dollars, patience, on_answer

    async def all(
        self, questions: Sequence[Question], experts: Sequence[Expert], done: set[tuple[int, str]], concurrent: int
    ) -> None:
        upstream = Upstream(max_reply_bytes=_MOST_BYTES)
        try:
            async with asyncio.TaskGroup() as group:
                for expert in experts:
                    waiting = iter([question for question in questions if (question.row, expert.name) not in done])
                    one = _Asking(expert, waiting, upstream, self)
                    for _ in range(min(concurrent, expert.max_concurrent)):
                        group.create_task(one.work())
        finally:
            await upstream.close()

    def keep(self, expert: Expert, question: Question, reply: Reply, began: float, seconds: float) -> str:
        """Put an answer into the file before anything else is done.  -> why it is none, "" where it is one"""
        try:
            said = json.loads(reply.body)
            text, finish = _answer(said)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return "answered with something that is no chat completion"
        usage = reply.usage
        price = expert.price(usage.input_tokens, usage.output_tokens, usage.cached_tokens)
        sure = confidence_of_reply(said) if expert.logprobs else None
        line = {
            "row": question.row,
            "query": question.query,
            "expert": expert.name,
            "answer": text,
            "finish": finish,
            "price": price,
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "latency_s": round(seconds, 4),
            "time": round(began, 3),
            **question.given,
            **({} if sure is None else {"confidence": {name: one for name, one in sure._asdict().items() if one == one}}),
            "model": expert.model,
            "request": self.fields,
        }
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        result = self.result
        result.answers, result.asked, result.dollars = result.answers + 1, result.asked + 1, result.dollars + price
        result.cut[expert.name] += finish == "length"
        self.on_answer(result)
        return ""

    def body(self, expert: Expert, question: Question) -> bytes:
        """The request."""
        sure = {"logprobs": True, "top_logprobs": ALTERNATIVES} if expert.logprobs else {}
        return shaped(json.dumps({"model": expert.model, "messages": question.messages, **self.fields, **sure}).encode(), expert)

    @property
    def spent(self) -> bool:
        return self.result.dollars >= self.most_dollars


class _Asking:
    """One expert and the questions that it has yet to answer."""

    def __init__(self, expert: Expert, waiting: Iterator[Question], upstream: Upstream, run: _Run) -> None:
        self.expert, self.waiting, self.upstream, self.run = expert, waiting, upstream, run
        self.given_up, self.failures, self.rests_until = "", 0, 0.0
        self.left = run.result.left[expert.name]

    async def work(self) -> None:
        """Question after question."""
        for question in self.waiting:
            why = "nobody was asked, the dollars are spent" if self.run.spent else self.given_up or await self._asked(question)
            if why:
                self.left[why] += 1
                self.run.on_answer(self.run.result)

    async def _asked(self, question: Question) -> str:
        """Why there is no answer, "" where there is one."""
        body = self.run.body(self.expert, question)
        asked = parse("chat", body)
        until, wait = monotonic() + self.run.patience, _FIRST_WAIT
        while True:
            # All who wait for this expert wait as long.
            await asyncio.sleep(self.rests_until - monotonic())
            if self.given_up:
                return self.given_up
            began, start = time(), monotonic()
            try:
                reply = await self.upstream.ask(self.expert, "/chat/completions", body, {}, asked, fresh=wait > _FIRST_WAIT)
            except Failure as failure:
                if failure.came is not None:
                    # Key, model or address are wrong, for every question.
                    return self._gives_up(failure.message)
                if failure.rest is not None:
                    self.rests_until = max(self.rests_until, monotonic() + min(failure.rest, _LONGEST_WAIT))
                if monotonic() + wait > until:
                    return self._failed(failure.message)
                await asyncio.sleep(random.uniform(0.5, 1.0) * wait)
                wait = min(2 * wait, _LONGEST_WAIT)
                continue
            if reply.status >= 300:
                return f"refused with status {reply.status}, {_refusal(reply.body)}"
            self.failures = 0
            return self.run.keep(self.expert, question, reply, began, monotonic() - start)

    def _failed(self, why: str) -> str:
        self.failures += 1
        return self._gives_up(why) if self.failures >= _FAILURES_IN_A_ROW else why

    def _gives_up(self, why: str) -> str:
        if not self.given_up:
            _log.warning("%s is given up: it %s", self.expert.name, why)
        self.given_up = why
        return why


def _answer(reply: Any) -> tuple[str, str]:
    """The text of a chat completion, its calls of tools where it has no text, and why it ended, "" where that is not said."""
    choice = reply["choices"][0]
    message, finish = choice["message"], choice.get("finish_reason")
    text = message.get("content") or message.get("refusal") or ""
    if not isinstance(text, str):
        text = "".join(part.get("text", "") for part in text)
    calls = message.get("tool_calls")
    return text or (json.dumps(calls) if calls else ""), finish if isinstance(finish, str) else ""


def _refusal(body: bytes) -> str:
    """What a refusal says, in short."""
    try:
        said = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        said = body.decode("utf-8", "replace")
    return " ".join(str(said).split())[:150]
