"""How a gateway ends under load, by SIGTERM and by SIGKILL, and what it remembers when it is started again."""

import asyncio
import json
import signal
import socket
import sqlite3
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import aiohttp
import pytest
import uvicorn
from starlette.applications import Starlette

from deferral.gateway.experts_file import Expert
from deferral.gateway.keys import Keys
from deferral.gateway.preparing import prepare
from deferral.gateway.relaying import LONGER
from deferral.gateway.serve import _Server
from tests.faulty_upstream import Upstream
from tests.running_gateway import EASY, small_router
from tests.serving_process import Serving, serving

pytestmark = pytest.mark.ci_slow

CLIENTS = 12
# The promise is 100 ms; a busy machine may keep the writer waiting as long again.
UNWRITTEN = 0.2
DEAR = 1000.0  # dollars per million tokens


@pytest.fixture
def folder(tmp_path: Path, upstream: Upstream) -> Path:
    small_router().save(tmp_path / "router")
    experts = "".join(
        f'[experts.{name}]\nbase_url = "{upstream.url}"\ninput_price = {price}\noutput_price = {price}\n'
        for name, price in (("small", 0.1), ("large", DEAR))
    )
    (tmp_path / "experts.toml").write_text(experts)
    return tmp_path


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream(first_byte_s=0.05, chunk_s=0.002) as found:
        yield found


@dataclass
class Load:
    """What clients saw who asked one question after the other, each on a connection of its own, until the gateway was gone."""

    whole: dict[str, tuple[str, float]] = field(default_factory=dict)  # id: the question, when its answer was whole
    broken: list[tuple[str, str]] = field(default_factory=list)  # the question, what was wrong with its answer
    acknowledged: dict[str, float] = field(default_factory=dict)  # id: quality
    refused: int = 0  # with status 429

    async def client(self, url: str, number: int, *, feedback: bool = False, token: str = "", **fields: Any) -> None:
        count = 0
        timeout, connector = aiohttp.ClientTimeout(total=30), aiohttp.TCPConnector(force_close=True)
        headers = {"authorization": f"Bearer {token}"} if token else {}
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
            while True:
                count += 1
                question = f"{EASY} {number}-{count}"
                stream = count % 2 == 0
                body = {"model": "auto", "messages": [{"role": "user", "content": question}], "stream": stream} | fields
                began = False
                try:
                    async with session.post(f"{url}/chat/completions", json=body) as reply:
                        began = True
                        text = await reply.read()
                except (aiohttp.ClientError, OSError, TimeoutError) as error:
                    if began:
                        self.broken.append((question, repr(error)))
                    return
                if reply.status == 429:
                    self.refused += 1
                    return
                if reply.status != 200 or not (text.rstrip().endswith(b"[DONE]") if stream else json.loads(text)):
                    self.broken.append((question, f"{reply.status} {text!r}"))
                    return
                decision = reply.headers["x-deferral-id"]
                self.whole[decision] = question, time.monotonic()
                if feedback:
                    await self._tell(session, url, decision, quality=(count % 5) / 4)

    async def _tell(self, session: aiohttp.ClientSession, url: str, decision: str, quality: float) -> None:
        try:
            async with session.post(f"{url}/feedback", json={"id": decision, "quality": quality}) as reply:
                if reply.status == 200:
                    self.acknowledged[decision] = quality
        except (aiohttp.ClientError, OSError):
            pass


def rows(database: Path, query: str) -> list[tuple]:
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return connection.execute(query).fetchall()


def under_load(gateway: Serving, ending: int, seconds: float, **options: Any) -> tuple[Load, float, int]:
    """Clients ask for some time, then the signal comes.  -> what they saw, when the signal was sent, the exit status"""
    load = Load()

    async def run() -> tuple[float, int]:
        clients = [asyncio.create_task(load.client(gateway.url, number, **options)) for number in range(CLIENTS)]
        await asyncio.sleep(seconds)
        sent = time.monotonic()
        status = await asyncio.to_thread(gateway.end, ending)
        await asyncio.gather(*clients)
        return sent, status

    return load, *asyncio.run(run())


def test_after_sigterm_no_accepted_request_is_lost_and_every_row_is_there(folder: Path, upstream: Upstream) -> None:
    upstream.seen.clear()
    with serving(folder) as gateway:
        load, _, status = under_load(gateway, signal.SIGTERM, 1.5)
    assert status == 0, gateway.log
    assert load.broken == []
    answered = {question for question, _ in load.whole.values()}
    assert len(answered) > CLIENTS
    assert {seen.json["messages"][0]["content"] for seen in upstream.seen} == answered
    assert {id for (id,) in rows(gateway.database, "select id from decisions where outcome = 'ok'")} == set(load.whole)
    assert rows(gateway.database, "select count(*) from decisions") == [(len(load.whole),)]


def test_after_sigkill_what_was_acknowledged_is_there_and_the_gateway_starts_again(folder: Path) -> None:
    with serving(folder) as gateway:
        load, killed, _ = under_load(gateway, signal.SIGKILL, 1.5, feedback=True)
    assert load.acknowledged
    found = dict(rows(gateway.database, "select decision, quality from feedback"))
    assert {id: found.get(id) for id in load.acknowledged} == load.acknowledged
    written = {id for (id,) in rows(gateway.database, "select id from decisions")}
    missing = {id: killed - when for id, (_, when) in load.whole.items() if id not in written}
    assert all(age < UNWRITTEN for age in missing.values()), missing
    assert not set(load.acknowledged) - written, "whatever was judged is on record"
    with serving(folder) as again:
        more, _, status = under_load(again, signal.SIGTERM, 0.5)
    assert status == 0
    assert {id for (id,) in rows(again.database, "select id from decisions")} == written | set(more.whole)


@pytest.mark.slow
def test_rows_that_are_lost_at_the_end_are_told_by_the_status(folder: Path) -> None:
    load = Load()
    with serving(folder) as gateway:
        gateway.database.rename(folder / "away.db")
        ready = f"http://127.0.0.1:{gateway.port}/ready"
        client = threading.Thread(target=asyncio.run, args=(load.client(gateway.url, 1),))
        client.start()
        until = time.monotonic() + 10
        said = b""
        while b"cannot be written at present" not in said:
            assert time.monotonic() < until, said
            with urllib.request.urlopen(ready) as reply:
                said = reply.read()
        assert gateway.end(signal.SIGTERM) == 1
        client.join()
    assert load.whole
    assert not load.broken
    assert f"{len(load.whole)} rows are lost: the database still fails at the end, Replaced" in gateway.log


def test_a_budget_is_not_overspent_by_more_than_the_requests_in_flight_and_holds_across_a_kill(folder: Path) -> None:
    price = (7 + 40) * DEAR / 1e6
    budget = 30.5 * price
    store = Keys(str(folder / "gateway.db"))
    prepare(store.engine, create=True)
    token, key = store.create("poor", experts=["large"], budget=budget, window="month")
    store.close()
    fields = {"model": "large", "max_tokens": 40, "stream_options": {"include_usage": True}}
    with serving(folder) as gateway:
        load = asyncio.run(spend(gateway.url, token, **fields))
        time.sleep(UNWRITTEN)
        gateway.end(signal.SIGKILL)
    [(spent, count)] = rows(
        gateway.database, f"select sum(price), count(*) from decisions where key = '{key.id}' and status = 200"
    )
    assert load.broken == []
    assert load.refused == CLIENTS
    assert count == len(load.whole)
    assert budget - CLIENTS * price < spent <= budget + CLIENTS * price
    with serving(folder) as again:
        after = asyncio.run(spend(again.url, token, **fields))
        again.end(signal.SIGTERM)
    assert after.refused == CLIENTS
    assert spent + len(after.whole) * price <= budget + CLIENTS * price


def test_what_is_under_way_has_the_time_of_the_slowest_expert_as_it_is_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn.Server, "shutdown", AsyncMock())
    experts = {"small": Expert("small", "http://127.0.0.1:1"), "large": Expert("large", "http://127.0.0.1:1", total_s=0.5)}
    state: Any = SimpleNamespace(current=SimpleNamespace(experts=experts), ends=lambda: None)
    server = _Server(uvicorn.Config("none"), "", state, threading.Event())
    for slowest in (
        Expert("large", "http://127.0.0.1:1", total_s=900.0),
        Expert("large", "http://127.0.0.1:1", first_byte_s=700.0),
    ):
        experts["large"] = slowest
        asyncio.run(server.shutdown())
        # Its turn, its answer, and a client that reads as slowly as it may.
        assert server.config.timeout_graceful_shutdown == slowest.first_byte_s + slowest.total_s + LONGER


async def spend(url: str, token: str, **fields: Any) -> Load:
    """Ask until nobody is answered any more."""
    load = Load()
    load_with_key = [load.client(url, number, token=token, **fields) for number in range(CLIENTS)]
    await asyncio.gather(*load_with_key)
    return load


@pytest.mark.parametrize("early", [True, False])
def test_a_signal_that_comes_while_it_starts_ends_it_in_good_order(early: bool) -> None:
    lived: list[str] = []

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        lived.append("opened")
        yield
        lived.append("closed")

    ended = threading.Event()
    if early:
        ended.set()
    experts = {"small": Expert("small", "http://127.0.0.1:1", total_s=0.5)}
    state: Any = SimpleNamespace(current=SimpleNamespace(experts=experts), ends=lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = _Server(uvicorn.Config(Starlette(lifespan=lifespan), log_config=None), "", state, ended)

        async def run() -> None:
            serving = asyncio.create_task(server._serve([listener]))
            await asyncio.wait([serving], timeout=10 if early else 0.3)
            assert serving.done() == early
            server.should_exit = True
            await serving

        asyncio.run(run())
    assert lived == ["opened", "closed"]
