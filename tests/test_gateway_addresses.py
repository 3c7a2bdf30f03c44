"""An expert at several addresses: they share its requests and stand in for each other, and who fails is left alone by itself."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count as count_up
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from deferral.gateway.answering import Answerers, Outgoing, Unanswered
from deferral.gateway.experts_file import Expert
from deferral.gateway.failures import Failure
from deferral.gateway.metrics import Metrics
from deferral.gateway.requests import parse
from deferral.gateway.settings import Settings
from deferral.gateway.standing import Servers, Talk
from deferral.gateway.upstream import Reply
from tests.faulty_upstream import CHUNKS, Upstream
from tests.running_gateway import EASY, RunningGateway, small_router
from tests.scripted_answerers import BODY, SMALL, answerers_of, outcome, reply
from tests.whole_gateway import calm, rows


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("addresses")
    with Upstream(forever_s=2) as first, Upstream(forever_s=2) as second:
        small = Expert("small", first.url, other_urls=[second.url], output_price=2.5, first_byte_s=1.0)
        experts = {"small": small, "large": Expert("large", second.url, output_price=250.0)}
        with RunningGateway(small_router(), experts, Settings(database=str(folder / "gateway.db"))) as gateway:
            yield SimpleNamespace(gateway=gateway, first=first, second=second, folder=folder, experts=experts)


@pytest.fixture(autouse=True)
def as_new(running: Any) -> None:
    for upstream in (running.first, running.second):
        upstream.behave("small", "good")
        upstream.seen.clear()
    calm(running.gateway)


def states(running: Any) -> list[str]:
    return [each.breaker.state for each in running.gateway.state.answerers.servers["small"].each]


def texts_at(running: Any, place: int, count: int) -> list[str]:
    """First requests of conversations that belong at one of the addresses, whatever their ports are."""
    standings = running.gateway.state.answerers.servers["small"].each

    def belongs(text: str) -> bool:
        return max(standings, key=lambda each: each.affinity(Talk(text, False))) is standings[place]

    return list(islice(filter(belongs, (f"{EASY} {number}" for number in count_up())), count))


def breaker_open(running: Any) -> str:
    _, _, said = running.gateway.ask("GET", "/metrics")
    return next(line for line in said.decode().splitlines() if line.startswith('deferral_breaker_open{expert="small"}'))


@pytest.mark.parametrize("fault", ["reset-first", "status-500", "status-429", "status-401", "wrong-content-type"])
def test_no_request_is_lost_with_one_of_two_addresses(running: Any, fault: str) -> None:
    running.first.behave("small", fault)
    began = time.time()
    for number, text in enumerate(texts_at(running, 0, 12)):
        status, headers, said = running.gateway.chat(text, model="small", stream=number % 3 == 1)
        assert (status, headers["x-deferral-expert"]) == (200, "small")
        assert (said.count(b"data: ") > CHUNKS) if number % 3 == 1 else said["choices"]
    kept = rows(running, f"time >= {began}")
    assert [(row["expert"], row["outcome"], row["status"]) for row in kept] == [("small", "ok", 200)] * 12
    asked = len(running.first.asked("small"))
    assert sum(row["attempts"] - 1 for row in kept) == asked
    assert 1 <= asked <= 5, "its own breaker spares it the rest"
    # A rest of a second, which this one asks for, is no state of its own.
    assert states(running) == ["closed" if fault == "status-429" else "open", "closed"]
    assert breaker_open(running).endswith(" 0.0"), "the expert is there"
    _, _, said = running.gateway.ask("GET", "/metrics")
    assert f'deferral_addresses_away{{expert="small"}} {float(fault != "status-429")}' in said.decode()


def test_whoever_has_the_fewest_requests_is_asked(running: Any) -> None:
    running.first.behave("small", "slow-first-byte")
    running.second.behave("small", "slow-first-byte")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: running.gateway.chat(f"{EASY} {number}", model="small"), range(8)))
    assert abs(len(running.first.asked("small")) - len(running.second.asked("small"))) <= 1


def test_a_conversation_stays_where_it_began(running: Any) -> None:
    for place, upstream in enumerate((running.first, running.second)):
        for number, begin in enumerate(texts_at(running, place, 3)):
            messages = []
            for text in (begin, "and in French?", "now explain why, in three sentences"):
                messages.append({"role": "user", "content": text})
                assert running.gateway.ask("POST", "/v1/chat/completions", {"model": "small", "messages": messages})[0] == 200
                messages.append({"role": "assistant", "content": f"an answer {number}"})
            assert len(upstream.asked("small")) == 3 * (number + 1)
    # A client that sends its last request alone says which conversation it belongs to.
    asked = len(running.first.asked("small"))
    for number in range(6):
        assert running.gateway.chat(f"{EASY} {number}", model="small", x_deferral_conversation="one")[0] == 200
    assert len(running.first.asked("small")) - asked in (0, 6)


def test_a_home_that_is_busier_than_the_others_is_left_and_a_name_stands_for_the_conversation() -> None:
    servers = Servers(replace(SMALL, max_concurrent=20))
    first, second = servers.each

    def at(name: str, *, begun: bool) -> str:
        standing = servers.next(talk=Talk(name, begun))
        assert standing is not None
        return standing.server.base_url

    homes = {name: at(name, begun=False) for name in map(str, range(100))}
    assert 30 <= list(homes.values()).count("http://a/v1") <= 70
    # The same by whoever counts, and for whom another address was added only where that is the new home.
    more = Servers(replace(SMALL, other_urls=["http://b/v1", "http://c/v1"]))
    moved = [name for name, url in homes.items() if more.next(talk=Talk(name, True)).server.base_url != url]  # type: ignore[union-attr]
    assert all(more.next(talk=Talk(name, True)) is more.each[2] for name in moved)
    name = next(name for name, url in homes.items() if url == "http://a/v1")
    first.slots.taken = 1
    assert (at(name, begun=False), at(name, begun=True)) == ("http://b/v1", "http://a/v1")
    first.slots.taken, second.slots.taken = 12, 8
    assert at(name, begun=True) == "http://a/v1"
    first.slots.taken = 13
    assert at(name, begun=True) == "http://b/v1"
    first.slots.taken, second.slots.taken = 20, 19
    assert at(name, begun=True) == "http://b/v1", "it has no slot free"
    first.slots.taken = 0
    for _ in range(5):
        first.breaker.failure(first.breaker.enter() or 0)
    assert at(name, begun=True) == "http://b/v1", "it is down"


def test_only_when_all_addresses_fail_is_the_expert_down(running: Any) -> None:
    for upstream in (running.first, running.second):
        upstream.behave("small", "status-503")
    for number in range(12):
        status, headers, said = running.gateway.chat(f"{EASY} {number}", model="small")
        assert status in (502, 503)
        assert int(headers["x-deferral-attempts"]) <= 2
    assert (status, said["error"]["code"]) == (503, "experts_down")
    assert states(running) == ["open", "open"]
    assert breaker_open(running).endswith(" 1.0")
    assert running.gateway.chat(EASY)[1]["x-deferral-expert"] == "large", "who is routed goes on to the next best"


def test_another_file_keeps_what_is_known_of_the_addresses_that_stay(running: Any) -> None:
    answerers = running.gateway.state.answerers
    before = answerers.servers["small"].each
    moved = replace(running.experts["small"], base_url=running.second.url, other_urls=["http://127.0.0.1:1/v1"])
    answerers.update({**running.experts, "small": moved})
    after = answerers.servers["small"].each
    assert after[0] is before[1]
    assert (len(after), after[1] in before) == (2, False)
    call = running.gateway.call(answerers.answer([moved], Outgoing("/chat/completions", {}, parse("chat", BODY)), lambda _: BODY))
    call.end(True)
    assert call.reply.status == 200
    assert running.first.asked("small") == []


def test_an_outage_of_all_addresses_is_multiplied_no_more_than_the_retries_allow() -> None:
    failing = AsyncMock(side_effect=Failure(502, "upstream_error", "failed", again=True))
    expert = Expert("small", "http://127.0.0.1:1", other_urls=[f"http://127.0.0.1:{port}" for port in range(2, 40)])

    async def run() -> list[int]:
        answerers = Answerers(SimpleNamespace(forget_all_but=set, ask=failing), Metrics(), retry_share=0.001)  # type: ignore[arg-type]
        answerers.update({"small": expert})
        attempts = []
        for _ in range(3):
            with pytest.raises(Unanswered) as nobody:
                await answerers.answer([expert], Outgoing("/chat/completions", {}, parse("chat", BODY)), lambda _: BODY)
            attempts.append(nobody.value.attempts)
        return attempts

    assert asyncio.run(run()) == [12, 2, 2], "one other address, and ten retries"


def test_the_log_names_the_address(running: Any, caplog: pytest.LogCaptureFixture) -> None:
    running.second.behave("small", "status-500")
    running.first.behave("small", "status-500")
    running.gateway.chat(EASY, model="small")
    told = [record.getMessage() for record in caplog.records if record.name == "deferral.gateway"]
    for upstream in (running.first, running.second):
        assert any(f"small at {upstream.url} failed" in line for line in told)


def test_a_request_under_way_goes_where_its_expert_was_when_it_was_chosen() -> None:
    asked, first = [], Expert("first", "http://c/v1")

    async def ask(server: Expert, *_: Any, **__: Any) -> Reply:
        asked.append((server.base_url, server.region))
        if server.name == "first":
            answerers.update({"first": first, "small": replace(SMALL, base_url="http://d/v1", other_urls=[], region="us")})
            raise Failure(502, "upstream_error", "failed")
        return reply()

    answerers = answerers_of(ask, first, SMALL)
    assert asyncio.run(outcome(answerers, first, SMALL)) == "ok"
    assert asked == [("http://c/v1", None), ("http://a/v1", "eu")]


def test_an_address_that_was_left_out_for_a_while_is_still_as_busy_as_it_was() -> None:
    async def run() -> None:
        answerers = answerers_of(AsyncMock(), SMALL)
        standing = answerers.servers["small"].each[1]
        await standing.slots.take(1.0)
        answerers.update({"small": replace(SMALL, other_urls=[])})
        answerers.update({})
        answerers.update({"small": SMALL})
        assert answerers.servers["small"].each[1] is standing

    asyncio.run(run())


def test_an_address_that_may_be_tried_again_gets_one_request_also_where_the_first_does_for_all() -> None:
    asked = []

    async def ask(server: Expert, *_: Any, **__: Any) -> Reply:
        asked.append(server.base_url)
        return reply()

    async def run() -> None:
        answerers = answerers_of(ask, SMALL)
        second = answerers.servers["small"].each[1]
        for _ in range(5):
            second.breaker.failure(second.breaker.enter() or 0)
        second.breaker._until = 0.0
        assert second.due
        for _ in range(3):
            assert await outcome(answerers, SMALL) == "ok"
        assert answerers.servers["small"].away == 0

    asyncio.run(run())
    assert asked == ["http://b/v1", "http://a/v1", "http://a/v1"]


@pytest.mark.parametrize("rests", [(5.0, 100.0), (100.0, 5.0)])
def test_a_client_is_to_come_back_when_the_first_of_the_addresses_may_be_asked(rests: tuple[float, float]) -> None:
    async def ask(server: Expert, *_: Any, **__: Any) -> Reply:
        rest = rests[server.base_url != "http://a/v1"]
        raise Failure(429, "upstream_rate_limited", "asks for fewer requests", blame=False, rest=rest)

    async def run() -> str:
        with pytest.raises(Unanswered) as nobody:
            await answerers_of(ask, SMALL).answer([SMALL], Outgoing("/chat/completions", {}, parse("chat", BODY)), lambda _: BODY)
        return nobody.value.headers["retry-after"]

    assert asyncio.run(run()) == "5"
