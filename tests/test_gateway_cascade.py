"""One expert asked first: what is sent, kept, deferred and charged, and what happens when a part of it fails."""

import asyncio
import json
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deferral.gateway import cascading
from deferral.gateway.accounts import Hold
from deferral.gateway.answering import Unanswered
from deferral.gateway.cascading import AskingFirst, Silence, asking_first
from deferral.gateway.choice import Choice
from deferral.gateway.experts_file import Expert
from deferral.gateway.problems import Problem
from deferral.gateway.requests import Hints, parse
from deferral.gateway.upstream import Reply
from deferral.gateway.usage import Usage
from deferral.routing import Router, confidence_of
from tests.handmade_cascade import GUESS, PRICES, handmade, unsure_router
from tests.running_gateway import EASY, HARD

CONTENT = [{"token": "t", "logprob": -2.5}] * 3


def told(content: Any, **more: Any) -> bytes:
    choice = {"index": 0, "message": {"content": "a"}, "logprobs": content and {"content": content}}
    return json.dumps({"id": "r", "choices": [choice], "big": 1e2} | more).encode()


class FakeCall:
    """A reply that is there."""

    def __init__(self, expert: Expert, body: bytes, status: int = 200) -> None:
        self.expert, self.attempts, self.ended = expert, 1, []
        self.reply = Reply(status, [], body, Usage(100, 1000, False, "r", cached_tokens=40))

    def end(self, good: bool | None) -> None:
        if not self.ended:
            self.ended.append(good)


@pytest.fixture(scope="module")
def router() -> Router:
    return unsure_router()


def a_choice(router: Router, query: str = GUESS, **changes: Any) -> Choice:
    quality = np.clip(router.fitted.estimate(router.encoder([query]))[0][0], 0, 1)
    quality_of = dict(zip(router.experts, map(float, quality), strict=True))
    price = {"small": 0.0001, "large": 0.01}
    cost = {name: 1 - quality_of[name] + price[name] / 0.05 for name in price}
    return Choice(("large", "small"), "because", 0.75, quality_of, price, cost, 0.05, "large", False)._replace(**changes)


def first_of(
    router: Router, choice: Choice | None = None, *, wanted: Hints | None = None, left: float | None = None, **fields: Any
) -> Any:
    experts = {
        name: Expert(name, "http://127.0.0.1:1/v1", input_price=price, output_price=price, total_s=0.3, logprobs=True)
        for name, price in PRICES.items()
    }
    body = json.dumps({"model": "auto", "messages": [{"role": "user", "content": GUESS}]} | fields).encode()
    now: Any = SimpleNamespace(router=router, experts=experts)
    return asking_first(now, Silence(), parse("chat", body), wanted or Hints(), choice or a_choice(router), body, left)


def test_nobody_is_asked_first_where_that_cannot_pay_or_was_not_judged(router: Router) -> None:
    assert isinstance(first_of(router), AskingFirst)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    for fields in ({"stream": True}, {"n": 2}, {"tools": [tool]}, {"messages": picture}):
        assert first_of(router, **fields) is None, fields
    assert first_of(router, n=1) is not None
    for wanted in (Hints(budget=1.0), Hints(min_quality=0.9), Hints(max_latency=1.0)):
        assert first_of(router, wanted=wanted) is None
    assert first_of(router, left=0.01) is None, "both answers have to be covered"
    assert first_of(router, left=0.0102).dollars == pytest.approx(0.0101)
    sent = [{"role": "system", "content": "x" * 400_000}, {"role": "user", "content": GUESS}]
    dear = first_of(router, messages=sent).dollars
    assert dear == pytest.approx(sum(PRICES.values()) * 0.1, rel=0.01), "both read all of it, some 100,000 tokens"
    assert first_of(router, messages=sent, left=dear - 0.001) is None
    assert first_of(router, a_choice(router, fast_path=True)) is None
    assert first_of(router, a_choice(router, ranking=("large",), cost={"large": 0.2}, price={"large": 0.01})) is None
    assert first_of(router, a_choice(router, f"{EASY} 7")) is None
    assert first_of(router, a_choice(router, f"{HARD} 7 in full")) is None
    assert first_of(router, a_choice(router, price_of_error=5.0)) is None, "nothing was judged there"
    # It does not depend on who was drawn.
    assert first_of(router, a_choice(router, ranking=("small", "large"))) is not None
    doubtful = unsure_router()
    doubtful.cascade = handmade(half_width=0.2)
    assert first_of(doubtful) is None
    doubtful.cascade = None
    assert first_of(doubtful) is None


def answered(
    first: AskingFirst, replies: dict[str, Any], *, began: float | None = None
) -> tuple[Any, Hold, list[tuple[str, dict]]]:
    """The call that is given, the hold, and who was asked what.  A reply is bytes, (status, bytes), seconds to wait, or None."""
    sent: list[tuple[str, dict]] = []
    hold = Hold(None, 1.0, threading.Lock())

    async def ask(experts: Any, body_for: Any) -> Any:
        for expert in experts:
            sent.append((expert.name, json.loads(body_for(expert))))
            reply = replies[expert.name]
            if isinstance(reply, float):
                await asyncio.sleep(reply)
            if isinstance(reply, bytes | tuple):
                status, body = reply if isinstance(reply, tuple) else (200, reply)
                return FakeCall(expert, body, status)
        raise Unanswered(2, 502, "upstream_error", "nobody", None)

    async def run() -> Any:
        return await first.answer(ask, GUESS, hold, time.perf_counter() if began is None else began)

    return asyncio.run(run()), hold, sent


SURE_CONTENT = [{"token": "t", "logprob": -0.01}] * 3


def test_a_sure_answer_is_kept_and_told_as_if_nobody_had_asked_for_log_probabilities(router: Router) -> None:
    first = first_of(router, temperature=0.5)
    call, hold, sent = answered(first, {"small": told(SURE_CONTENT)})
    [(name, body)] = sent
    assert (name, body["logprobs"], body["top_logprobs"], body["model"], body["temperature"]) == ("small", True, 5, "small", 0.5)
    assert json.loads(call.reply.body) == json.loads(told(None))
    assert (first.row.ending, first.row.extra, first.choice.ranking, first.choice.propensity) == (
        "kept",
        0.0,
        ("small", "large"),
        1.0,
    )
    assert first.row.confidence[0] == 3
    assert "small answered first, by its log-probabilities with an expected quality of 0.9" in first.choice.reason
    assert hold.spent == pytest.approx(0.0011)


def test_an_unsure_answer_is_deferred_and_both_are_paid(router: Router) -> None:
    first, large = first_of(router), told(None, text="é")
    call, hold, sent = answered(first, {"small": told(CONTENT), "large": large})
    assert [name for name, _ in sent] == ["small", "large"]
    assert "logprobs" not in sent[1][1]
    assert (call.expert.name, call.reply.body) == ("large", large)
    assert (first.row.ending, first.attempts, first.choice.ranking) == ("deferred", 1, ("large", "small"))
    assert first.row.extra == hold.spent == pytest.approx(0.0011)


def test_a_first_answer_costs_less_for_what_the_prompt_cache_held(router: Router) -> None:
    first = first_of(router)
    first.now.experts["small"] = replace(first.first, cached_input_price=0.0)
    _, hold, _ = answered(first, {"small": told(CONTENT), "large": told(None)})
    assert first.row.extra == hold.spent == pytest.approx(0.00106), "of 100 tokens of input 40 were cached"


def test_a_request_that_is_too_deep_to_be_written_is_not_asked_first(router: Router) -> None:
    count, choice = 0, a_choice(router)
    for depth in range(sys.getrecursionlimit() - 300, sys.getrecursionlimit()):
        deep: Any = "[" * depth + "]" * depth
        body = json.dumps({"model": "auto", "messages": [{"role": "user", "content": GUESS}], "x": 0}).replace("0", deep).encode()
        try:
            asked = parse("chat", body)
        except Problem:
            continue
        first = asking_first(first_of(router).now, Silence(), asked, Hints(), choice, body, None)
        count += first is not None
        reply = body.replace(b'"messages"', b'"choices": [{"logprobs": {"content": []}}], "messages"')
        assert cascading._without_logprobs(cascading._parsed(reply), reply)
    assert count > 0


def test_who_asks_for_log_probabilities_gets_every_byte_of_them(router: Router) -> None:
    call, _, [(_, body)] = answered(first_of(router, logprobs=True), {"small": told(SURE_CONTENT)})
    assert call.reply.body == told(SURE_CONTENT)
    assert "top_logprobs" not in body
    # What JSON does not have would be spoiled.
    odd = told(SURE_CONTENT)[:-1] + b', "x": NaN}'
    assert answered(first_of(router), {"small": odd})[0].reply.body == odd
    assert answered(first_of(router, logprobs=False), {"small": told(SURE_CONTENT)})[2][0][1]["logprobs"] is True


@pytest.mark.parametrize("second", [None, (400, b"{}"), 30.0], ids=["fails", "refuses", "takes too long"])
def test_where_the_second_fails_the_first_answer_is_given(router: Router, second: Any) -> None:
    first = first_of(router)
    began = time.monotonic()
    call, _, _ = answered(first, {"small": told(CONTENT), "large": second})
    assert time.monotonic() - began < 10, "a request has the time of one expert, not of two"
    assert (call.expert.name, call.ended) == ("small", [True])
    assert json.loads(call.reply.body) == json.loads(told(None))
    assert (first.row.ending, first.row.extra) == ("failed", 0.0)
    assert first.choice.ranking[0] == "large"
    assert "so the first answer is given" in first.choice.reason


def test_where_the_second_cannot_be_sent_the_request_the_first_answer_is_given(router: Router) -> None:
    first = first_of(router, odd=float("inf"))
    first.now.experts["large"] = replace(first.now.experts["large"], drop=["store"])
    call, hold, _ = answered(first, {"small": told(CONTENT), "large": told(None)})
    assert (call.expert.name, first.row.ending, first.row.extra, first.attempts) == ("small", "failed", 0.0, 0)
    assert hold.spent == pytest.approx(0.0011)


def test_where_the_first_fails_the_router_alone_decides(router: Router) -> None:
    first = first_of(router)
    call, hold, sent = answered(first, {"small": None, "large": told(None)})
    assert [name for name, _ in sent] == ["small", "large"]
    assert (call.expert.name, first.row.ending, first.attempts, hold.spent) == ("large", "unanswered", 2, 0.0)
    with pytest.raises(Unanswered):
        answered(first_of(router), {"small": None, "large": None})


@pytest.mark.parametrize("chosen", ["small", "large"])
def test_an_answer_without_log_probabilities_says_nothing_and_the_record_says_so(router: Router, chosen: str) -> None:
    ranking = (chosen, *(name for name in PRICES if name != chosen))
    first = first_of(router, a_choice(router, ranking=ranking))
    call, _, sent = answered(first, {"small": told(None), "large": told(None)})
    assert call.expert.name == chosen
    assert first.row.ending == "silent"
    assert first.row.extra == pytest.approx(0.0 if chosen == "small" else 0.0011)
    assert "without log-probabilities; because" in first.choice.reason
    assert first.choice.propensity == 0.75, "the router's own"
    assert len(sent) == 1 + (chosen == "large")
    refused = first_of(router, a_choice(router, ranking=ranking))
    call, hold, sent = answered(refused, {"small": (400, b'{"error": {}}'), "large": told(None)})
    assert hold.spent == 0.0
    assert "logprobs" not in sent[-1][1], "perhaps it did not want to be asked for them"


@pytest.mark.parametrize("second", [None, (400, b"{}"), 30.0], ids=["fails", "refuses", "takes too long"])
def test_an_answer_without_log_probabilities_is_given_where_nobody_better_has_one(router: Router, second: Any) -> None:
    first = first_of(router)
    call, hold, sent = answered(first, {"small": told(None), "large": second})
    assert [name for name, _ in sent] == ["small", "large"], "what was answered and paid for is not asked for again"
    assert (call.expert.name, call.ended) == ("small", [True])
    assert (first.row.ending, first.row.extra, hold.spent) == ("failed", 0.0, pytest.approx(0.0011))
    assert first.choice.ranking == ("large", "small")
    assert "without log-probabilities; because; large " in first.choice.reason
    assert "so the first answer is given" in first.choice.reason


def test_who_never_tells_is_not_asked_first_for_a_while() -> None:
    silence = Silence()
    for _ in range(2):
        silence.missed("small", "why")
    silence.heard("small")
    for _ in range(2):
        silence.missed("small", "why")
    assert not silence.of("small")
    silence.missed("small", "why")
    assert silence.of("small")
    assert not silence.of("large")


def test_requests_that_all_refuse_do_not_end_the_asking_for_others(router: Router) -> None:
    refusal = (400, b'{"error": {}}')
    for second, quiet in ((refusal, False), (told(None), True)):
        silence = Silence()
        for _ in range(3):
            first = first_of(router)
            first.silence = silence
            answered(first, {"small": refusal, "large": second})
        assert silence.of("small") is quiet


def test_what_is_kept_or_not_is_drawn_where_the_router_explores() -> None:
    router = unsure_router()
    router.explore = 0.5
    found = Counter()
    for number in range(200):
        first = first_of(router)
        first.choice = a_choice(router)
        sure = confidence_of([-0.01] * 3)
        assert sure is not None
        second = first._judged(sure, f"query {number}")
        kept = second is None
        assert first.choice.propensity == pytest.approx(0.75 if kept else 0.25)
        assert ("drawn at random" in first.choice.reason) == (not kept)
        found[kept] += 1
        again = first_of(router)
        assert again._judged(sure, f"query {number}") is second or (second and again.choice.ranking[0] == second.name)
    # The draws are a hash of query and salt, the same in every run: 4.9 standard deviations around 150.
    assert 120 <= found[True] <= 180
