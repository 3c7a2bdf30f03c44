"""One expert asked first: what is sent, kept, deferred, charged and recorded, and what happens when a part of it fails."""

import asyncio
import json
import math
import re
import socket
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import uvicorn

from deferral.cli import main
from deferral.errors import DataError
from deferral.gateway import cascading
from deferral.gateway.answering import Unanswered
from deferral.gateway.cascade_answers import answers_on_record
from deferral.gateway.cascading import AskingFirst, Silence, asking_first
from deferral.gateway.choice import Choice
from deferral.gateway.database import connect
from deferral.gateway.experts_file import Expert
from deferral.gateway.export import CERTAIN, logged
from deferral.gateway.forgetting import forget
from deferral.gateway.limits import Hold
from deferral.gateway.problems import Problem
from deferral.gateway.record import Record
from deferral.gateway.requests import Hints, parse
from deferral.gateway.rows import CascadeRow
from deferral.gateway.settings import Settings
from deferral.gateway.upstream import Reply
from deferral.gateway.usage import Usage
from deferral.gateway.what_if import what_if
from deferral.routing import Log, Outcome, Router, answers_in, confidence_of, fit_cascade
from deferral.routing.cascade import features
from deferral.routing.policies import Linear
from tests.faulty_upstream import Upstream
from tests.gateway_rows import row
from tests.handmade_cascade import GUESS, handmade, unsure_router
from tests.running_gateway import EASY, HARD, RunningGateway

SURELY = f"{GUESS}, surely"
PRICES = {"small": 1.0, "large": 100.0}
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
        assert ("drawn by chance" in first.choice.reason) == (not kept)
        found[kept] += 1
        again = first_of(router)
        assert again._judged(sure, f"query {number}") is second or (second and again.choice.ranking[0] == second.name)
    # The draws are a hash of query and salt, the same in every run: 4.9 standard deviations around 150.
    assert 120 <= found[True] <= 180


async def _recorded(path: str, rows: list[Any], quality: dict[str, float]) -> None:
    record = Record(path, store_text=True, retention_days=1e6)
    record.start()
    for one in rows:
        record.add(one)
    assert all(await asyncio.gather(*(record.feedback(name, good, source_key="") for name, good in quality.items())))
    await record.close()


def through(number: int, ending: str, propensity: float, **more: Any) -> Any:
    expert, extra = ("small", 0.0) if ending == "kept" else ("large", 1e-4)
    sure = tuple(confidence_of([-0.5, -0.1]) or ())
    cascade = CascadeRow("small", ending, extra, 0.6, sure)
    price = 1e-4 if ending == "kept" else 1e-3 + extra
    return row(number, expert=expert, chosen=expert, propensity=propensity, price=price, cascade=cascade, **more)


def test_the_record_keeps_both_prices_and_no_text_is_needed_to_learn_from_it(database: str) -> None:
    rows = [
        through(0, "kept", 0.9),
        through(1, "deferred", 0.1),
        through(2, "kept", 1.0),
        row(3),
        through(4, "kept", 0.9, query=None),
    ]
    rows += [replace(through(5, "deferred", 0.9), expert="small"), through(6, "kept", 0.9)]
    asyncio.run(_recorded(database, rows, {f"id-{number}": 1.0 for number in range(6)}))
    engine = connect(database)
    left_out: Counter[str] = Counter()
    answers = answers_on_record(engine, ["small", "large"], "small", left_out)
    assert answers.mask.tolist() == [[True, False], [False, True], [True, False], [False, False]]
    np.testing.assert_allclose(answers.price, [[1e-4, 1e-3]] * 4)
    # Two of the small expert's three answers are judged, and all of the large one's.
    np.testing.assert_allclose(answers.propensity, [[0.6, 1], [1, 0.1], [0.6, 1], [1, 1]])
    np.testing.assert_allclose(answers.estimate, [[0.5, 0.9]] * 4)
    np.testing.assert_allclose(answers.confidence[0], features([confidence_of([-0.5, -0.1])])[0])  # type: ignore[list-item]
    assert sum(left_out.values()) == 3
    left_out.clear()
    outcomes = [one.outcome for one in logged(engine, left_out)]
    assert [outcome.price for outcome in outcomes] == pytest.approx([1e-4, 1e-3, 1e-4])
    assert [outcome.confidence is not None for outcome in outcomes] == [True, False, False]
    assert [outcome.latency_s for outcome in outcomes[:2]] == [0.25, pytest.approx(math.nan, nan_ok=True)], (
        "of one answer, or not"
    )
    assert left_out[CERTAIN] == 1
    assert what_if(engine, since=0, until=1e9, present=0.01).rows == 5, "what was kept with certainty proves nothing"
    with pytest.raises(DataError, match="Serve with --explore"):
        answers_on_record(engine, ["small", "large"], "large", Counter())
    forget(engine, key="")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("select count(*) from cascades").scalar_one() == 0
    engine.dispose()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A gateway whose small expert is sure of texts with "surely" in them, and tells nothing of those with "mute"."""
    folder = tmp_path_factory.mktemp("cascade")
    with Upstream(forever_s=30) as upstream:
        common = {"connect_s": 1, "first_byte_s": 20, "total_s": 20}
        experts = {
            name: Expert(name, upstream.url, input_price=price, output_price=price, logprobs=True, **common)
            for name, price in PRICES.items()
        }  # type: ignore[arg-type]
        router = unsure_router()
        router.save(folder / "router")
        with RunningGateway(router, experts, Settings(database=str(folder / "gateway.db"))) as gateway:
            yield SimpleNamespace(gateway=gateway, upstream=upstream, folder=folder)


def on_record(running: Any, identity: str) -> dict[str, Any]:
    """The decision and its cascade."""
    until = time.monotonic() + 5
    query = "select * from decisions left join cascades on cascades.decision = decisions.id where id = ?"
    while time.monotonic() < until:
        with closing(sqlite3.connect(running.folder / "gateway.db")) as connection:
            connection.row_factory = sqlite3.Row
            if found := connection.execute(query, (identity,)).fetchone():
                return dict(found)
        time.sleep(0.01)
    raise AssertionError("it is not on record")


def test_first_answers_that_are_judged_more_often_do_not_count_for_more(tmp_path: Path) -> None:
    """Six were kept and six deferred, by a coin; all of the kept ones are judged .7, and two of the others .9."""
    database = str(tmp_path / "g.db")
    rows = [through(number, "kept" if number < 6 else "deferred", 0.5) for number in range(12)]
    asyncio.run(_recorded(database, rows, {f"id-{number}": 0.7 if number < 6 else 0.9 for number in range(8)}))
    answers = answers_on_record(connect(database), ["small", "large"], "small", Counter())
    for guess in (0.5, 0.0):
        quality = guess + np.where(answers.mask, (answers.quality - guess) / answers.propensity, 0.0)
        np.testing.assert_allclose(quality.mean(0), [0.7, 0.9])


@pytest.mark.ci_slow
def test_through_a_gateway_answers_are_kept_or_deferred_charged_and_recorded(running: Any) -> None:
    gateway, upstream = running.gateway, running.upstream
    token, key = gateway.state.keys.create("cascade", budget=1.0)

    def deferred_so_far() -> float:
        text = gateway.ask("GET", "/metrics", key=None)[2] if gateway.state.access.open else gateway.state.metrics.text()
        counted = re.search(rb'deferral_cascades_total\{expert="small",outcome="deferred"\} (\S+)', text)
        return float(counted[1]) if counted else 0.0

    before = deferred_so_far()
    del upstream.seen[:]
    status, headers, reply = gateway.chat(f"{SURELY} 71", key=token)
    assert (status, headers["x-deferral-expert"], headers["x-deferral-cascade"], headers["x-deferral-first"]) == (
        200,
        "small",
        "kept",
        "small",
    )
    assert reply["choices"][0]["logprobs"] is None
    assert reply["x_unknown"] == {"kept": ["as", "it", "is"]}
    assert [seen.model for seen in upstream.seen] == ["small"]
    kept = on_record(running, headers["x-deferral-id"])
    assert (kept["ending"], kept["extra"], kept["price"]) == ("kept", 0.0, pytest.approx(47e-6))
    assert len(json.loads(kept["confidence"])) == 7
    del upstream.seen[:]
    status, headers, reply = gateway.chat(f"{GUESS} 72", key=token)
    assert (status, headers["x-deferral-expert"], headers["x-deferral-cascade"], headers["x-deferral-attempts"]) == (
        200,
        "large",
        "deferred",
        "2",
    )
    small, large = upstream.seen
    assert (small.model, small.json["top_logprobs"], large.model) == ("small", 5, "large")
    assert "logprobs" not in large.json
    deferred = on_record(running, headers["x-deferral-id"])
    assert (deferred["attempts"], deferred["ending"], deferred["extra"], deferred["price"]) == (
        2,
        "deferred",
        pytest.approx(47e-6),
        pytest.approx(47e-4 + 47e-6),
    )
    assert gateway.state.limits.left(key) == pytest.approx(1.0 - 47e-4 - 2 * 47e-6)
    assert deferred_so_far() == before + 1
    del upstream.seen[:]
    body = {"model": "auto", "messages": [{"role": "user", "content": f"{GUESS} 72"}]}
    status, headers, _ = gateway.ask("POST", "/v1/chat/completions", body, key=token, idempotency_key="once")
    assert (status, len(upstream.seen), "x-deferral-cascade" in headers) == (200, 1, False), "two would have one key"
    # Easy and hard queries are routed as ever, and so is what is streamed or asked for by name.
    for text, fields in (
        (f"{EASY} 7", {}),
        (f"{HARD} 7 in full", {}),
        (f"{GUESS} 7", {"stream": True}),
        (f"{GUESS} 7", {"model": "small"}),
    ):
        del upstream.seen[:]
        status, headers, _ = gateway.chat(text, key=token, **fields)
        assert (status, len(upstream.seen)) == (200, 1)
        assert "x-deferral-cascade" not in headers
        assert b"logprobs" not in upstream.seen[0].body


@pytest.mark.ci_slow
def test_a_client_that_leaves_ends_both_and_has_paid_for_what_there_was(running: Any) -> None:
    gateway, upstream = running.gateway, running.upstream
    token, key = gateway.state.keys.create("leaves", budget=1.0)
    upstream.behave("large", "slow-first-byte")
    try:
        del upstream.seen[:]
        body = json.dumps({"model": "auto", "messages": [{"role": "user", "content": f"{GUESS} 73"}]}).encode()
        with socket.create_connection(("127.0.0.1", gateway.port)) as client:
            client.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n%b"
                % (token.encode(), len(body), body)
            )
            until = time.monotonic() + 10
            while len(upstream.seen) < 2:
                assert time.monotonic() < until
                time.sleep(0.01)
        while not upstream.seen[1].gone:
            assert time.monotonic() < until
            time.sleep(0.01)
        with closing(sqlite3.connect(running.folder / "gateway.db")) as connection:
            while not (rows := connection.execute("select id from decisions where outcome = 'cancelled'").fetchall()):
                assert time.monotonic() < until
                time.sleep(0.01)
        left = on_record(running, rows[0][0])
        # The first answer, and what the second expert has read by then.
        price = 47e-6 + left["input_tokens"] * PRICES["large"] / 1e6
        assert (left["ending"], left["price"], left["extra"]) == ("deferred", pytest.approx(price), pytest.approx(47e-6))
        assert (left["expert"], left["output_tokens"], left["estimated"]) == ("large", 0, 1)
        assert gateway.state.limits.left(key) == pytest.approx(1.0 - price)
        assert gateway.state.answerers.standings["large"].slots.taken == 0
        assert gateway.state.answerers.standings["small"].slots.taken == 0
    finally:
        upstream.behave("large", "good")


@pytest.mark.ci_slow
def test_failures_of_either_through_a_gateway(running: Any) -> None:
    gateway, upstream = running.gateway, running.upstream
    token, _ = gateway.state.keys.create("fails")
    upstream.behave("large", "status-401")
    status, headers, reply = gateway.chat(f"{GUESS} 74", key=token)
    upstream.behave("large", "good")
    assert (status, headers["x-deferral-expert"], headers["x-deferral-cascade"]) == (200, "small", "failed")
    assert reply["choices"][0]["logprobs"] is None
    row = on_record(running, headers["x-deferral-id"])
    assert (row["chosen"], row["expert"], row["price"]) == ("large", "small", pytest.approx(47e-6))
    upstream.behave("small", "status-401")
    status, headers, _ = gateway.chat(f"{GUESS} 75", key=token)
    upstream.behave("small", "good")
    assert (status, headers["x-deferral-expert"], headers["x-deferral-cascade"]) == (200, "large", "unanswered")
    status, headers, _ = gateway.chat(f"{GUESS} mute 76", key=token)
    assert (status, headers["x-deferral-cascade"]) == (200, "silent")
    assert "without log-probabilities" in headers["x-deferral-reason"]
    assert "without log-probabilities" in on_record(running, headers["x-deferral-id"])["reason"]


@pytest.fixture(scope="module")
def tiny() -> Iterator[Any]:
    """A tiny language model with random weights behind an endpoint that reports its tokens' log-probabilities."""
    from deferral.demo.endpoint import app
    from deferral.demo.language import LanguageModel, make_tokenizer, new_model
    from deferral.demo.questions import questions

    asked = [question.text for question in questions(400, seed=0)]
    model = LanguageModel(new_model(width=32, layers=2, heads=4, seed=0), make_tokenizer(asked))
    server = uvicorn.Server(uvicorn.Config(app(model, "small"), log_config=None, port=0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        threading.Event().wait(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield SimpleNamespace(model=model, questions=asked, url=f"http://127.0.0.1:{port}/v1")
    server.should_exit = True
    thread.join(10)


@pytest.mark.slow
def test_with_a_tiny_models_own_log_probabilities_it_costs_less_than_routing_alone(tiny: Any, tmp_path: Path) -> None:
    """The small model is right, by construction and with noise, where its answer is likelier than its median answer."""
    from deferral.demo.language import Sampling

    prompts = [tiny.model.prompt([{"role": "user", "content": text}]) for text in tiny.questions]
    steps: dict[int, list[Any]] = {number: [] for number in range(len(prompts))}
    for number, step in tiny.model.steps(prompts, [Sampling(8, alternatives=5)] * len(prompts)):
        steps[number].append(step)
    sure = [
        confidence_of(
            [step.logprob for step in one if step.text], [[p for _, p in step.alternatives] for step in one if step.text]
        )
        for one in steps.values()
    ]
    likely = np.array([-np.inf if one is None else one.mean for one in sure])
    generator = np.random.default_rng(0)
    right = (likely > np.median(likely)) ^ (generator.random(len(likely)) < 0.1)
    price = {"small": 0.0001, "large": 0.01}
    log = Log()
    for text, one, good in zip(tiny.questions[:300], sure, right, strict=False):
        log.append(Outcome(text, "small", float(good), price["small"], confidence=one))
        log.append(Outcome(text, "large", 1.0, price["large"]))
    router = Router(0.05, policies=(Linear,)).fit(log)
    router.cascade = fit_cascade(answers_in(log, router, "small"))
    assert router.cascade.why_not(0.05) == "", router.cascade.report(0.05)
    with Upstream() as upstream:
        experts = {"small": Expert("small", tiny.url, logprobs=True), "large": Expert("large", upstream.url)}
        with RunningGateway(router, experts, Settings(database=str(tmp_path / "gateway.db"))) as gateway:
            saved, endings = [], Counter()
            for number in range(300, 360):
                status, headers, reply = gateway.chat(tiny.questions[number], max_tokens=8, temperature=0.0)
                assert status == 200
                ending = headers.get("x-deferral-cascade", "not asked first")
                endings[ending] += 1
                given = headers["x-deferral-expert"]
                if given == "small":
                    assert reply["choices"][0]["message"]["content"] == "".join(step.text for step in steps[number])
                    assert reply["choices"][0]["logprobs"] is None
                alone = router.route(tiny.questions[number]).expert
                cost = {"small": 1 - right[number] + price["small"] / 0.05, "large": price["large"] / 0.05}
                saved.append(cost[alone] - cost[given] - (price["small"] / 0.05 if ending == "deferred" else 0.0))
    assert set(endings) <= {"kept", "deferred", "not asked first"}
    assert endings["kept"] > 10
    assert endings["deferred"] > 10
    assert np.mean(saved) > 0.03, (np.mean(saved), endings)


@pytest.mark.slow
def test_the_command_replaces_a_cascade_only_by_one_that_the_record_shows_to_be_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cascade that is there takes every answer for as good as any other; the record knows who was sure, and rightly."""
    router = unsure_router()
    assert router.cascade is not None
    flat = {
        name: 0 * value if name in ("4.weight", "4.bias", "shifts") else value for name, value in router.cascade.arrays.items()
    }
    router.cascade = replace(router.cascade, arrays=flat)
    router.save(tmp_path / "router")
    generator = np.random.default_rng(0)
    rows, quality = [], {}
    for number in range(800):
        sure, kept = generator.random(2) < 0.5
        told = confidence_of([-0.01, -0.02] if sure else [-2.5, -2.0])
        assert told is not None
        one = through(number, "kept" if kept else "deferred", 0.5)
        cascade = replace(one.cascade, confidence=tuple(told))
        expected = {"expected_quality": {"small": 0.5, "large": 0.95}, "expected_price": {"small": 1e-4, "large": 1e-2}}
        price = 1e-4 if kept else 1e-2 + 1e-4
        rows.append(replace(one, cascade=cascade, price=price, query=None, **expected))
        quality[one.id] = float(generator.random() < (0.95 if not kept else 0.95 if sure else 0.05))
    database = str(tmp_path / "gateway.db")
    asyncio.run(_recorded(database, rows, quality))
    arguments = ["gateway", "cascade", str(tmp_path / "router"), "--database", database]
    before = (tmp_path / "router" / "router.json").read_bytes()
    main([*arguments, "--dry-run"])
    assert (tmp_path / "router" / "router.json").read_bytes() == before
    assert "dry run: " in capsys.readouterr().out
    main(arguments)
    assert "has the new cascade" in capsys.readouterr().out
    found = Router.load(tmp_path / "router").cascade
    assert found is not None
    assert found.why_not(0.05) == ""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 3, "none is better than itself"
