"""An expert at several addresses: they share its requests and stand in for each other, and who fails is left alone by itself."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from deferral.gateway.answering import Answerers, Unanswered
from deferral.gateway.experts_file import Expert
from deferral.gateway.failures import Failure
from deferral.gateway.metrics import Metrics
from deferral.gateway.requests import parse
from deferral.gateway.settings import Settings
from tests.faulty_upstream import CHUNKS, Upstream
from tests.running_gateway import EASY, RunningGateway, small_router
from tests.whole_gateway import calm, rows

BODY = b'{"model": "small", "messages": []}'


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


def breaker_open(running: Any) -> str:
    _, _, said = running.gateway.ask("GET", "/metrics")
    return next(line for line in said.decode().splitlines() if line.startswith('deferral_breaker_open{expert="small"}'))


@pytest.mark.parametrize("fault", ["reset-first", "status-500", "status-429", "status-401", "wrong-content-type"])
def test_no_request_is_lost_with_one_of_two_addresses(running: Any, fault: str) -> None:
    running.first.behave("small", fault)
    began = time.time()
    for number in range(12):
        status, headers, said = running.gateway.chat(f"{EASY} {number}", model="small", stream=number % 3 == 1)
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


def test_whoever_has_the_fewest_requests_is_asked_and_at_rest_the_first(running: Any) -> None:
    for number in range(3):
        assert running.gateway.chat(f"{EASY} {number}", model="small")[0] == 200
    assert (len(running.first.asked("small")), len(running.second.asked("small"))) == (3, 0)
    running.first.behave("small", "slow-first-byte")
    running.second.behave("small", "slow-first-byte")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: running.gateway.chat(f"{EASY} {number}", model="small"), range(8)))
    assert abs(len(running.first.asked("small")) - 3 - len(running.second.asked("small"))) <= 1


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
    assert running.gateway.chat(EASY, model="small")[0] == 200
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
                await answerers.answer([expert], "/chat/completions", lambda _: BODY, {}, parse("chat", BODY))
            attempts.append(nobody.value.attempts)
        return attempts

    assert asyncio.run(run()) == [11, 1, 1]


def test_the_log_names_the_address(running: Any, caplog: pytest.LogCaptureFixture) -> None:
    running.second.behave("small", "status-500")
    running.first.behave("small", "status-500")
    running.gateway.chat(EASY, model="small")
    told = [record.getMessage() for record in caplog.records if record.name == "deferral.gateway"]
    for upstream in (running.first, running.second):
        assert any(f"small at {upstream.url} failed" in line for line in told)
