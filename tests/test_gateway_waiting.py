"""Who waits for a turn at one of several addresses has the first slot that comes free at any, and keeps its place."""

import asyncio
from dataclasses import replace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from deferral.gateway.experts_file import Expert
from deferral.gateway.failures import Failure
from deferral.gateway.slots import Full, Slots
from deferral.gateway.standing import Servers, Standing
from deferral.gateway.upstream import Reply
from tests.scripted_answerers import SMALL, answerers_of, outcome, reply


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
