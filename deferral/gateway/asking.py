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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time
from typing import Any, BinaryIO

from deferral.gateway.answer_files import Question, answers_held, check_same, is_answered, line_of, up_to_date
from deferral.gateway.cascading import ALTERNATIVES
from deferral.gateway.experts_file import Expert
from deferral.gateway.failures import Failure
from deferral.gateway.problems import Problem
from deferral.gateway.requests import Asked, parse
from deferral.gateway.shaping import shaped
from deferral.gateway.upstream import Reply, Upstream
from deferral.routing.confidence import confidence_of_reply
from deferral.whole_files import claim, written_whole

__all__ = ["Result", "ask_all"]

_log = logging.getLogger("deferral.gateway")

# Fields that no caller may set: they are set here, or would give something else than one whole answer.
_TAKEN = frozenset({"model", "messages", "stream", "stream_options", "n", "logprobs", "top_logprobs"})
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0
# An expert that nobody gets an answer from is given up: its other questions would wait as long.
_FAILURES_IN_A_ROW = 10
_MOST_BYTES = 1 << 26


@dataclass
class Result:
    """What a run has done.  `left` counts, for each expert, why questions are not answered."""

    answers: int = 0  # in the file, those of earlier runs too
    asked: int = 0  # in this run
    dollars: float = 0.0  # for all replies in the file
    cut: Counter[str] = field(default_factory=Counter)  # answers that ended at their longest
    left: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """Answers that a further run would ask for."""
        return sum(sum(reasons.values()) for reasons in self.left.values())


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
    is given up.  References and tags in the file become those of the questions, prices those of the experts.  DataError where it
    holds answers to other questions, or of experts who were asked otherwise.
    """
    # Resolved, since the file behind a link is the one that is locked and replaced.
    fields, answers = dict(fields or {}), answers.resolve()
    if math.isnan(most_dollars):
        raise ValueError("most_dollars: expected a number, got nan")
    if taken := sorted(_TAKEN & set(fields)):
        raise ValueError(f"{taken[0]}: it is set for each request; expected other fields, max_tokens say")
    if len({expert.name for expert in experts}) < len(experts) or not experts:
        raise ValueError(f"experts: expected different ones, at least one, got {[expert.name for expert in experts]}")
    result = Result(left={expert.name: Counter() for expert in experts})
    with ExitStack() as held:
        file = held.enter_context(answers.open("ab+"))
        claim(file, answers)
        found = answers_held(file, answers)
        asking = {expert.name: (expert.model, _sent(expert, fields)) for expert in experts}
        check_same(found, answers, questions, asking)
        now = up_to_date(found, questions, experts)
        if now != found:
            with written_whole(answers) as partial:
                partial.write_bytes(b"".join(map(line_of, now)))
            file = held.enter_context(answers.open("ab+"))
            claim(file, answers)
        result.dollars = sum(line["price"] for line in now)
        answered = list(filter(is_answered, now))
        done, result.answers = {(answer["row"], answer["expert"]) for answer in answered}, len(answered)
        result.cut.update(answer["expert"] for answer in answered if answer.get("finish") == "length")
        run = _Run(file, result, fields, asking, most_dollars, patience, on_answer)
        on_answer(result)
        try:
            asyncio.run(run.all(questions, experts, done, concurrent))
        except ExceptionGroup as errors:
            # One is enough to end the work: a full disk, say.
            raise errors.exceptions[0] from None
    return result


class _Run:
    """The calls of one run."""

    def __init__(
        self,
        file: BinaryIO,
        result: Result,
        fields: dict[str, Any],
        asking: dict[str, tuple[str, dict[str, Any]]],
        most_dollars: float,
        patience: float,
        on_answer: Callable[[Result], None],
    ) -> None:
        self.file, self.result, self.fields, self.asking = file, result, fields, asking
        self.most_dollars, self.patience, self.on_answer = most_dollars, patience, on_answer

    async def all(
        self, questions: Sequence[Question], experts: Sequence[Expert], done: set[tuple[int, str]], concurrent: int
    ) -> None:
        upstream = Upstream(max_reply_bytes=_MOST_BYTES)
        try:
            async with asyncio.TaskGroup() as group:
                for expert in experts:
                    waiting = iter([question for question in questions if (question.row, expert.name) not in done])
                    one = _Asking(expert, waiting, upstream, self, heard=any(name == expert.name for _, name in done))
                    for _ in range(min(concurrent, expert.max_concurrent * len(expert.servers))):
                        group.create_task(one.work())
        finally:
            await upstream.close()

    def keep(self, expert: Expert, question: Question, reply: Reply, began: float, seconds: float) -> str:
        """Put an answer into the file before anything else is done.  -> why it is none, "" where it is one"""
        usage = reply.usage
        text, finish, sure, why = None, "", None, ""
        try:
            said = json.loads(reply.body)
            text, finish = _answer(said)
            sure = confidence_of_reply(said) if expert.logprobs else None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            why = f"answered with something that is no chat completion: {_refusal(reply.body)}"
            if usage.estimated:
                return why
        # What reports tokens is to be paid for, whatever it is: the next run has to know.
        price = expert.price(usage.input_tokens, usage.output_tokens, usage.cached_tokens)
        model, request = self.asking[expert.name]
        line = {
            "row": question.row,
            "query": question.query,
            "expert": expert.name,
            "answer": text,
            "finish": finish,
            "price": price,
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cached_tokens": usage.cached_tokens,
            "latency_s": round(seconds, 4),
            "time": round(began, 3),
            **question.given,
            **({} if sure is None else {"confidence": {name: one for name, one in sure._asdict().items() if one == one}}),
            "model": model,
            "request": request,
        }
        self.file.write(line_of(line))
        self.file.flush()
        result = self.result
        result.dollars += price
        if text is not None:
            result.answers, result.asked = result.answers + 1, result.asked + 1
            result.cut[expert.name] += finish == "length"
            self.on_answer(result)
        return why

    def body(self, expert: Expert, question: Question) -> bytes:
        """The request."""
        sure = {"logprobs": True, "top_logprobs": ALTERNATIVES} if expert.logprobs else {}
        return shaped(json.dumps({"model": expert.model, "messages": question.messages, **self.fields, **sure}).encode(), expert)

    @property
    def spent(self) -> bool:
        return self.result.dollars >= self.most_dollars


class _Asking:
    """One expert and the questions that it has yet to answer."""

    def __init__(self, expert: Expert, waiting: Iterator[Question], upstream: Upstream, run: _Run, *, heard: bool) -> None:
        self.expert, self.waiting, self.upstream, self.run, self.heard = expert, waiting, upstream, run, heard
        self.servers = list(expert.servers)
        # Requests at each of them, with those that wait for their turn there.
        self.at = dict.fromkeys((server.base_url for server in self.servers), 0)
        self.turns = {url: asyncio.Semaphore(expert.max_concurrent) for url in self.at}
        self.rests_until = dict.fromkeys(self.at, 0.0)
        self.given_up, self.failures = "", 0
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
        try:
            body = self.run.body(self.expert, question)
            asked = parse("chat", body)
        except Problem as problem:
            return problem.message
        until, wait = monotonic() + self.run.patience, _FIRST_WAIT
        last: Expert | None = None
        refused_by: set[str] = set()
        while not self.given_up:
            server = last = self._in_turn(last, refused_by)
            try:
                found = await self._reply(server, body, asked, fresh=wait > _FIRST_WAIT)
            except Failure as failure:
                if failure.came == 403 and self.heard:
                    # Others were answered: a moderator refuses this question alone, or this one of the servers refuses the key.
                    refused_by.add(server.base_url)
                    if not any(each.base_url not in refused_by for each in self.servers):
                        return self._failed("refused with status 403")
                    continue
                if failure.came is not None:
                    # Key, model or address are wrong, for every question.
                    if self._left_with_others(server, failure.message):
                        continue
                    return self._gives_up(failure.message)
                if failure.rest is not None:
                    rests_until = monotonic() + min(failure.rest, self.run.patience)
                    self.rests_until[server.base_url] = max(self.rests_until[server.base_url], rests_until)
                if monotonic() + wait > until:
                    return self._failed(failure.message)
                await asyncio.sleep(random.uniform(0.5, 1.0) * wait)
                wait = min(2 * wait, _LONGEST_WAIT)
                continue
            if found is None:
                break
            reply, began, seconds = found
            if reply.status >= 300:
                return f"refused with status {reply.status}, {_refusal(reply.body)}"
            if why := self.run.keep(self.expert, question, reply, began, seconds):
                return self._failed(why)
            self.failures, self.heard = 0, True
            return ""
        return self.given_up

    async def _reply(self, server: Expert, body: bytes, asked: Asked, *, fresh: bool) -> tuple[Reply, float, float] | None:
        """What a server answers, when it was asked, and how many seconds it took; None where the expert is given up by then.

        Limits hold for each server.
        """
        url = server.base_url
        self.at[url] += 1
        try:
            async with self.turns[url]:
                # All who wait for this server wait as long.
                await asyncio.sleep(self.rests_until[url] - monotonic())
                if self.given_up:
                    return None
                began, start = time(), monotonic()
                reply = await self.upstream.ask(server, "/chat/completions", body, {}, asked, fresh=fresh)
                return reply, began, monotonic() - start
        finally:
            self.at[url] -= 1

    def _in_turn(self, last: Expert | None, refused_by: Collection[str]) -> Expert:
        """The server that is asked next: none that refused, the first to have rested, not the last one, and one that is free."""
        now = monotonic()

        def against(server: Expert) -> tuple[bool, float, bool, bool]:
            url = server.base_url
            rest, full = max(self.rests_until[url] - now, 0.0), self.at[url] >= server.max_concurrent
            return url in refused_by, rest, server == last, full

        server = min(self.servers, key=against)
        self.servers.remove(server)
        self.servers.append(server)
        return server

    def _left_with_others(self, server: Expert, why: str) -> bool:
        """Ask this server no more.  -> whether there are others"""
        if server in self.servers:
            self.servers.remove(server)
            if self.servers:
                _log.warning("%s is not asked any more: it %s", self.expert.shown(server), why)
        return bool(self.servers)

    def _failed(self, why: str) -> str:
        self.failures += 1
        return self._gives_up(why) if self.failures >= _FAILURES_IN_A_ROW else why

    def _gives_up(self, why: str) -> str:
        if not self.given_up:
            _log.warning("%s is given up: it %s", self.expert.name, why)
        self.given_up = why
        return why


def _sent(expert: Expert, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that this expert gets with every question, by its own names."""
    request = json.loads(shaped(json.dumps({"model": expert.model, "messages": [], **fields}).encode(), expert))
    return {name: value for name, value in request.items() if name not in ("model", "messages")}


def _answer(reply: Any) -> tuple[str, str]:
    """The text of a chat completion, its calls of tools where it has no text, and why it ended, "" where that is not said."""
    choice = reply["choices"][0]
    message, finish = choice["message"], choice.get("finish_reason")
    text = message.get("content") or message.get("refusal") or ""
    if not isinstance(text, str):
        text = "".join(part.get("text") or "" for part in text)
    calls = message.get("tool_calls")
    return text or (json.dumps(calls) if calls else ""), finish if isinstance(finish, str) else ""


def _refusal(body: bytes) -> str:
    """What a refusal says, in short."""
    try:
        said = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        said = body.decode("utf-8", "replace")
    shown = "".join(one if one.isprintable() else " " for one in str(said)[:1000])
    return " ".join(shown.split())[:150]
