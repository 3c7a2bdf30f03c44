"""An expert at several addresses: they share its requests and stand in for each other, and who fails is left alone by itself."""

import asyncio
import time
from collections.abc import Callable, Iterator
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
from deferral.gateway.slots import Full, Slots
from deferral.gateway.standing import Servers, Standing, Talk
from deferral.gateway.upstream import Reply
from deferral.gateway.usage import Usage
from tests.faulty_upstream import CHUNKS, Upstream
from tests.running_gateway import EASY, RunningGateway, small_router
from tests.whole_gateway import calm, rows

BODY = b'{"model": "small", "messages": [{"role": "user", "content": "hi"}]}'


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


SMALL = Expert("small", "http://a/v1", other_urls=["http://b/v1"], max_concurrent=2, region="eu")


def answerers_of(ask: Callable[..., Any], *experts: Expert, retry_share: float = 0.2) -> Answerers:
    made = Answerers(SimpleNamespace(forget_all_but=set, ask=ask), Metrics(), retry_share=retry_share)  # type: ignore[arg-type]
    made.update({expert.name: expert for expert in experts})
    return made


async def outcome(answerers: Answerers, *ranking: Expert, key: str = "") -> str:
    try:
        call = await answerers.answer(ranking, Outgoing("/chat/completions", {}, parse("chat", BODY), key), lambda _: BODY)
    except Unanswered as nobody:
        return nobody.code
    call.end(True)
    return "ok"


def reply() -> Reply:
    return Reply(200, [], b"{}", Usage(1, 1, False, ""))


def test_who_waits_at_an_address_that_goes_down_is_answered_by_another_whatever_the_retries_are() -> None:
    async def ask(server: Expert, *_: Any, **__: Any) -> Reply:
        await asyncio.sleep(0)
        if server.base_url == "http://a/v1":
            raise Failure(502, "upstream_unreachable", "cannot be reached", again=True, of_server=True)
        return reply()

    async def run() -> list[str]:
        answerers = answerers_of(ask, SMALL)
        outcomes = await asyncio.gather(*(outcome(answerers, SMALL) for _ in range(100)))
        assert [each.slots.taken for each in answerers.servers["small"].each] == [0, 0]
        return outcomes

    assert asyncio.run(run()) == ["ok"] * 100


def test_a_key_that_asks_for_everything_at_once_does_not_make_the_others_wait() -> None:
    answered: list[str] = []

    async def ask(*_: Any, **__: Any) -> Reply:
        await asyncio.sleep(0.001)
        return reply()

    async def run() -> None:
        expert = replace(SMALL, other_urls=[], max_waiting=60)
        answerers = answerers_of(ask, expert)

        async def one(key: str) -> None:
            answered.append(f"{key} {await outcome(answerers, expert, key=key)}")

        batch = [asyncio.create_task(one("batch")) for _ in range(62)]
        await asyncio.sleep(0)
        await asyncio.gather(one("chat"), *batch)

    asyncio.run(run())
    assert answered.index("chat ok") <= 4
    # There was no place left for it in the queue, and the last of the batch made room.
    assert (answered.count("batch ok"), answered.count("batch queue_full")) == (61, 1)


def test_who_has_waited_in_vain_at_one_address_goes_where_a_slot_is_free() -> None:
    async def run() -> str:
        impatient = replace(SMALL, first_byte_s=0.01)
        answerers = answerers_of(AsyncMock(return_value=reply()), impatient, retry_share=0.0)
        first, second = answerers.servers["small"].each
        for each in (first, first, second, second):
            await each.slots.take(1.0)
        waiting = asyncio.create_task(outcome(answerers, impatient))
        while not first.slots.queued:
            await asyncio.sleep(0)
        second.slots.give_back(0.0)
        return await waiting

    assert asyncio.run(run()) == "ok"


@pytest.mark.parametrize(("others", "share"), [(["http://b/v1", "http://c/v1"], 0.0), (["http://b/v1"], 0.2)])
def test_who_has_only_waited_at_an_address_is_asked_once_more_like_others(others: list[str], share: float) -> None:
    asked: list[str] = []

    async def ask(server: Expert, *_: Any, **__: Any) -> Reply:
        asked.append(server.base_url)
        if asked == ["http://b/v1"]:
            raise Failure(502, "upstream_bad_reply", "closed the connection before it answered", again=True)
        return reply()

    async def run() -> str:
        impatient = replace(SMALL, other_urls=others, max_concurrent=1, first_byte_s=0.01)
        answerers = answerers_of(ask, impatient, retry_share=share)
        first, *rest = answerers.servers["small"].each
        for each in (first, *rest):
            await each.slots.take(1.0)
        waiting = asyncio.create_task(outcome(answerers, impatient))
        while not first.slots.queued:
            await asyncio.sleep(0)
        for each in rest:
            each.slots.give_back(0.0)
        return await waiting

    assert asyncio.run(run()) == "ok"
    assert asked == ["http://b/v1", others[-1]]


def test_who_waits_at_one_address_has_the_first_slot_of_any() -> None:
    asked: list[str] = []

    async def run() -> None:
        slow = asyncio.Event()

        async def ask(server: Expert, *_: Any, **__: Any) -> Reply:
            asked.append(server.base_url)
            await (slow.wait() if server.base_url == "http://a/v1" else asyncio.sleep(0))
            return reply()

        expert = replace(SMALL, max_concurrent=1)
        answerers = answerers_of(ask, expert)
        first, second = answerers.servers["small"].each
        tasks = [asyncio.create_task(outcome(answerers, expert)) for _ in range(20)]
        await asyncio.sleep(0)
        assert (first.slots.queued, second.slots.queued) == (9, 9)
        while sum(task.done() for task in tasks) < 19:
            await asyncio.sleep(0)
        slow.set()
        assert await asyncio.gather(*tasks) == ["ok"] * 20
        assert (first.load, second.load) == (0, 0)

    asyncio.run(asyncio.wait_for(run(), 10))
    assert (asked.count("http://a/v1"), asked.count("http://b/v1")) == (1, 19)


def test_who_waits_is_not_sent_where_it_has_failed_nor_where_the_breaker_is_open() -> None:
    asked: list[str] = []

    async def ask(server: Expert, *_: Any, **__: Any) -> Reply:
        asked.append(server.base_url)
        await asyncio.sleep(0)
        if server.base_url == "http://a/v1":
            raise Failure(502, "upstream_error", "failed")
        return reply()

    async def run() -> None:
        expert = replace(SMALL, max_concurrent=1)
        answerers = answerers_of(ask, expert, retry_share=0.0)
        first, second = answerers.servers["small"].each
        await second.slots.take(1.0)
        tasks = []
        for number in range(1, 8):
            tasks.append(asyncio.create_task(outcome(answerers, expert, key="came later" if number > 5 else "")))
            while second.slots.queued < number:
                await asyncio.sleep(0)
            assert asked == ["http://a/v1"] * min(number, 5)
        assert first.breaker.state == "open"
        await first.slots.take(1.0)
        first.give_back(0.0, "")
        assert second.slots.queued == 7
        second.give_back(0.0, "")
        assert await asyncio.gather(*tasks) == ["ok"] * 7

    asyncio.run(asyncio.wait_for(run(), 10))
    assert asked == ["http://a/v1"] * 5 + ["http://b/v1"] * 7


def test_who_waits_behind_others_that_have_failed_at_an_address_has_its_slot_nevertheless() -> None:
    async def run() -> None:
        slots = Slots(1, 9), Slots(1, 9), Slots(1, 9)
        first, second, third = slots
        for each in slots:
            await each.take(1.0)
        tasks = []
        # In the longest queue only the last may go to the first address.
        for at, others in ((second, [third]), (second, [third]), (third, [first]), (second, [first])):
            tasks.append(asyncio.create_task(at.take(1.0, "", others)))
            await asyncio.sleep(0)
        for done in ([3], [2, 3]):
            first.give_back(0.0)
            assert first.let_in([second, third])
            await asyncio.sleep(0)
            assert [place for place, task in enumerate(tasks) if task.done()] == done
        first.give_back(0.0)
        assert not first.let_in([second, third])
        for each in (second, second, second):
            each.give_back(0.0)
        assert await asyncio.gather(*tasks) == [second, second, first, first]

    asyncio.run(run())


async def busy_servers(expert: Expert) -> Servers:
    """None of them has a slot free."""
    servers = Servers(expert)
    servers.update()
    for standing in servers.each:
        for _ in range(expert.max_concurrent):
            await standing.slots.take(1.0)
    return servers


def test_a_turn_that_comes_too_late_is_for_who_waits_at_another_address() -> None:
    async def run() -> None:
        servers = await busy_servers(replace(SMALL, max_concurrent=1))
        first, second = servers.each
        leaves, stays = (asyncio.create_task(servers.slot(standing, "", [standing])) for standing in servers.each)
        await asyncio.sleep(0)
        first.give_back(0.0, "")
        leaves.cancel()
        assert await stays is first
        assert (first.load, second.load) == (1, 1)

    asyncio.run(asyncio.wait_for(run(), 10))


def test_other_limits_let_in_who_waits_at_another_address() -> None:
    async def run() -> None:
        servers = await busy_servers(replace(SMALL, max_concurrent=1))
        second = servers.each[1]
        waiting = [asyncio.create_task(servers.slot(second, "", [second])) for _ in range(2)]
        await asyncio.sleep(0)
        Servers(replace(SMALL, max_concurrent=2), servers).update()
        assert {await each for each in waiting} == {*servers.each}

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_stream_that_shows_that_its_address_is_back_lets_in_who_waits_at_another() -> None:
    async def run() -> None:
        servers = await busy_servers(SMALL)
        first, second = servers.each
        waiting = asyncio.create_task(servers.slot(second, "", [second]))
        await asyncio.sleep(0)
        for _ in range(5):
            first.breaker.failure(first.breaker.enter() or 0)
        for _ in range(2):
            first.give_back(0.0, "")
        assert (second.slots.queued, first.slots.taken) == (1, 0)
        first.breaker._until = 0.0
        await first.slots.take(1.0)
        first.begun(first.enter(""))
        assert await waiting is first

    asyncio.run(asyncio.wait_for(run(), 10))


def test_who_has_lost_its_slot_with_an_idle_connection_does_not_wait_where_another_address_has_one() -> None:
    asked: list[str] = []

    async def ask(server: Expert, *_: Any, **__: Any) -> Reply:
        asked.append(server.base_url)
        await asyncio.sleep(0.01)
        if len(asked) == 1:
            raise Failure(502, "upstream_bad_reply", "closed the connection before it answered", again=True, stale=True)
        return reply()

    async def run() -> None:
        expert = replace(SMALL, max_concurrent=1)
        answerers = answerers_of(ask, expert)
        first, second = answerers.servers["small"].each
        loses = asyncio.create_task(outcome(answerers, expert))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(first.slots.take(1.0))
        assert await loses == "ok"
        assert await waiting is first.slots
        assert (first.load, second.load) == (1, 0)

    asyncio.run(asyncio.wait_for(run(), 10))
    assert asked == ["http://a/v1", "http://b/v1"]


def test_who_waits_keeps_its_place_while_another_address_is_to_be_tried() -> None:
    async def run() -> None:
        answerers = answerers_of(AsyncMock(return_value=reply()), SMALL)
        first, second = answerers.servers["small"].each
        for each in (first, first, second, second):
            await each.slots.take(1.0)
        waiting = [asyncio.create_task(answerers.servers["small"].slot(second, "", [second])) for _ in range(3)]
        await asyncio.sleep(0)
        for _ in range(5):
            first.breaker.failure(first.breaker.enter() or 0)
        first.breaker._until = 0.0
        # What began before the breaker opened ends now.
        first.give_back(0.0, "")
        assert (first.breaker.state, second.slots.queued) == ("half-open", 3)
        assert await outcome(answerers, SMALL) == "ok"
        assert await waiting[0] is first
        first.give_back(0.0, "")
        for each in waiting[1:]:
            assert await each is first
            first.give_back(0.0, "")

    asyncio.run(asyncio.wait_for(run(), 10))


def test_who_finds_its_server_down_says_nothing_of_how_long_a_request_takes() -> None:
    async def run() -> None:
        standing = Standing(replace(SMALL, other_urls=[], max_concurrent=1, max_waiting=0))
        await standing.slots.take(1.0)
        for _ in range(100):
            standing.give_back(30.0, "")
            await standing.slots.take(1.0)
        for _ in range(5):
            standing.breaker.failure(standing.breaker.enter() or 0)
        for _ in range(100):
            with pytest.raises(Failure) as down:
                standing.enter("")
            assert down.value.code == "experts_down"
            await standing.slots.take(1.0)
        with pytest.raises(Full) as full:
            await standing.slots.take(1.0)
        assert full.value.retry_after == 30.0

    asyncio.run(run())


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
