"""A reload that is announced once is heard by all others on the database, once."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from deferral.errors import DataError
from deferral.gateway import reloads as module
from deferral.gateway.database import connect
from deferral.gateway.preparing import prepare
from deferral.gateway.reloads import Reloads
from deferral.gateway.state import Gateway


@pytest.fixture
def three(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Reloads]]:
    monkeypatch.setattr(module, "_LOOK", 0.01)
    engines = [connect(database) for _ in range(3)]
    prepare(engines[0])
    yield [Reloads(engine) for engine in engines]
    for engine in engines:
        engine.dispose()


def heard(gateways: list[Reloads], then, *, awaited: int = 0) -> list[int]:
    """How often each reloads while `then` is done, until so many have been heard of in all, and for a while after."""
    counts = [0] * len(gateways)

    async def follow() -> None:
        def reload(place: int):
            async def do() -> None:
                counts[place] += 1

            return do

        tasks = [asyncio.create_task(one.follow(reload(place))) for place, one in enumerate(gateways)]
        await asyncio.to_thread(then)
        with suppress(TimeoutError):
            async with asyncio.timeout(20):
                while sum(counts) < awaited:
                    await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        for task in tasks:
            task.cancel()

    asyncio.run(follow())
    return counts


def test_all_others_hear_of_it_once(three: list[Reloads]) -> None:
    three[1].announce()
    three[1].announce()
    for one in three:
        one.start()
    assert [one.count() for one in three] == [2, 2, 2]
    assert heard(three, lambda: None) == [0, 0, 0]
    assert heard(three, three[0].announce, awaited=2) == [0, 1, 1]
    # Of two at about the same time nobody hears less than one that was not its own.
    both = heard(three, lambda: (three[1].announce(), three[2].announce()), awaited=2)
    assert both[0] in (1, 2)
    assert both[1] >= 1
    assert three[0].count() == 5


@pytest.mark.parametrize("fault", [DataError("no router"), ValueError("no expert"), RuntimeError("a surprise")], ids=repr)
def test_files_that_cannot_be_read_are_told_and_end_nothing(fault: Exception, caplog: pytest.LogCaptureFixture) -> None:
    async def reload() -> str:
        raise fault

    asyncio.run(Gateway.reload_or_say(SimpleNamespace(reload=reload)))
    (line,) = caplog.records
    assert "not reloaded, all stays as it was" in line.message
    assert str(fault) in line.message or line.exc_info


def test_a_database_that_is_away_is_asked_again(three: list[Reloads], monkeypatch: pytest.MonkeyPatch) -> None:
    count, faults = three[1].count, iter([OperationalError("", {}, Exception())] * 3)

    def failing() -> int:
        for fault in faults:
            raise fault
        return count()

    monkeypatch.setattr(three[1], "count", failing)
    assert heard(three[:2], three[0].announce, awaited=1) == [0, 1]


def test_whom_a_failing_database_kept_from_hearing_hears_of_it_later(
    three: list[Reloads], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, faults = module.alone, iter([OperationalError("", {}, Exception())] * 3)

    def failing(*arguments: Any) -> Any:
        for fault in faults:
            raise fault
        return alone(*arguments)

    monkeypatch.setattr(module, "alone", failing)

    def announce() -> None:
        with pytest.raises(OperationalError):
            three[0].announce()

    assert heard(three, announce, awaited=2) == [0, 1, 1]
    assert heard(three, lambda: None) == [0, 0, 0]
