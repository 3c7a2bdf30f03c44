"""Three processes that serve from one socket, on each kind of database: one budget, one router, one end."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import aiohttp
import pytest
from sqlalchemy import func, select

from deferral.gateway.database import connect
from deferral.gateway.keys import Keys
from deferral.gateway.preparing import prepare
from deferral.gateway.schema import decisions
from tests.faulty_upstream import Upstream
from tests.running_gateway import EASY, small_router
from tests.serving_process import Serving, serving

pytestmark = pytest.mark.ci_slow

CLIENTS, DEAR, ADMIN = 24, 1000.0, "admin-key-of-the-tests"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    small_router().save(tmp_path / "router")
    with Upstream(first_byte_s=0.02) as upstream:
        experts = "".join(
            f'[experts.{name}]\nbase_url = "{upstream.url}"\ninput_price = {price}\noutput_price = {price}\n'
            for name, price in (("small", 0.1), ("large", DEAR))
        )
        (tmp_path / "experts.toml").write_text(experts)
        yield tmp_path


@pytest.fixture
def tokens(database: str) -> dict[str, str]:
    keys = Keys(database)
    prepare(keys.engine)
    made = {
        "budget": keys.create("budget", budget=1.0, window="month")[0],
        "rate": keys.create("rate", requests_per_minute=30)[0],
        "free": keys.create("free")[0],
    }
    keys.close()
    return made


@pytest.fixture
def gateway(folder: Path, database: str, tokens: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.setenv("DEFERRAL_ADMIN_KEY", ADMIN)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with serving(folder, "--database", database, "--workers", "3") as found:
        until(lambda: found.log.count("startup complete") == 3)
        yield found


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def ask(gateway: Serving, method: str, path: str, token: str) -> tuple[int, dict]:
    """On a connection of its own, so that any worker may take it."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=20)
    try:
        connection.request(method, path, headers={"authorization": f"Bearer {token}"})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def metrics(gateway: Serving) -> str:
    """Of all workers, by whichever answers."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=20)
    try:
        connection.request("GET", "/metrics", headers={"authorization": f"Bearer {ADMIN}"})
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def workers(gateway: Serving) -> set[int]:
    """The processes that serve, by what they said of themselves, as far as they live."""
    said = {int(pid) for pid in re.findall(r"Started server process \[(\d+)\]", gateway.log)}
    return {pid for pid in said if Path(f"/proc/{pid}").exists()}


def spend(gateway: Serving, token: str, clients: int = CLIENTS, **fields) -> list[int]:
    """Clients that ask until they are told to come back much later.  -> the statuses"""
    statuses: list[int] = []

    async def client(number: int) -> None:
        wait = 0.0
        headers = {"authorization": f"Bearer {token}"}
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True), headers=headers) as session:
            while wait <= 2:
                await asyncio.sleep(wait)
                body = {"messages": [{"role": "user", "content": f"{EASY} {number}"}], **fields}
                async with session.post(f"{gateway.url}/chat/completions", json=body) as reply:
                    await reply.read()
                    statuses.append(reply.status)
                    wait = float(reply.headers.get("retry-after", 0))

    async def run() -> None:
        await asyncio.gather(*(client(number) for number in range(clients)))

    # A budget that does not hold would never refuse anybody.
    asyncio.run(asyncio.wait_for(run(), 60))
    return statuses


@pytest.mark.parametrize("count", ["1", pytest.param("3", marks=pytest.mark.slow)])
def test_a_reload_that_comes_before_they_are_up_ends_nobody_and_is_not_missed(folder: Path, count: str) -> None:
    file = folder / "experts.toml"
    good = file.read_text()
    gateway = Serving(folder, "--workers", count)
    try:
        # One process says nothing until it is up, but holds its port before.
        until(lambda: "workers at" in gateway.log or (count == "1" and listens(gateway.port)))
        file.write_text(good + '[experts.third]\nroute = false\nbase_url = "http://127.0.0.1:1"\n')
        while gateway.log.count("serving small, large") < int(count):
            assert gateway.process.poll() is None, gateway.log
            gateway.process.send_signal(signal.SIGHUP)
            time.sleep(0.02)
        assert "ended with status" not in gateway.log
        assert all("third" in str(ask(gateway, "GET", "/v1/models", "")[1]) for _ in range(12))
        assert gateway.end(signal.SIGTERM) == 0
    finally:
        gateway.close()


@pytest.mark.slow
def test_a_signal_to_the_whole_group_ends_no_stream_and_the_parent_ends_last(folder: Path) -> None:
    with Upstream(chunk_s=0.1) as upstream:
        (folder / "experts.toml").write_text(
            "".join(f'[experts.{name}]\nbase_url = "{upstream.url}"\n' for name in ("small", "large"))
        )
        with serving(folder, "--workers", "2", alone=True) as gateway:
            until(lambda: gateway.log.count("startup complete") == 2)
            with closing(http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=20)) as client:
                body = {"model": "small", "stream": True, "messages": [{"role": "user", "content": EASY}]}
                client.request("POST", "/v1/chat/completions", json.dumps(body))
                reply, began = client.getresponse(), time.monotonic()
                os.killpg(gateway.process.pid, signal.SIGTERM)
                assert b"[DONE]" in reply.read()
                lasted = time.monotonic() - began
            assert gateway.process.wait(20) == 0
            assert not workers(gateway)
    assert lasted > 1, "there was something to be waited for"


@pytest.mark.slow
def test_workers_outlive_the_process_that_they_are_copies_of_and_nobody_takes_their_place(folder: Path) -> None:
    with serving(folder, "--workers", "2") as gateway:
        until(lambda: gateway.log.count("startup complete") == 2)
        before = workers(gateway)
        (parent,) = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in before}
        assert parent != gateway.process.pid
        os.kill(parent, signal.SIGKILL)
        time.sleep(1)
        assert "ended with status" not in gateway.log
        assert workers(gateway) == before
        killed = min(before)
        os.kill(killed, signal.SIGKILL)
        until(lambda: gateway.log.count("startup complete") == 3)
        gateway.process.send_signal(signal.SIGHUP)
        until(lambda: gateway.log.count("reloaded: experts") == 2, 10)
        # How the one of before ended nobody can say.
        assert gateway.end(signal.SIGTERM) == 1
        assert gateway.log.count("Finished server process") == 2


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def test_three_workers_hold_one_budget_one_rate_and_one_router(
    gateway: Serving, folder: Path, database: str, tokens: dict[str, str]
) -> None:
    # Each answer costs more than the request was expected to.
    statuses = spend(gateway, tokens["budget"], model="large", max_tokens=10)
    assert set(statuses) == {200, 429}
    assert spend(gateway, tokens["rate"], 6, model="small").count(200) == 30
    answered = f'deferral_answers_total{{expert="large",outcome="ok"}} {statuses.count(200):.1f}'
    until(lambda: answered in metrics(gateway), 5)

    file = folder / "experts.toml"
    good = file.read_text()
    file.write_text(good + "[experts.large]\n")
    assert ask(gateway, "POST", "/admin/reload", ADMIN)[0] == 409
    file.write_text(good + '[experts.third]\nroute = false\nbase_url = "http://127.0.0.1:1"\n')
    status, said = ask(gateway, "POST", "/admin/reload", ADMIN)
    assert (status, "third" in said["reloaded"]) == (200, True)
    until(lambda: gateway.log.count("reloaded: experts small, large, third") == 3, 10)
    assert "not reloaded" not in gateway.log

    before = workers(gateway)
    assert len(before) == 3
    os.kill(min(before), signal.SIGKILL)
    until(lambda: gateway.log.count("startup complete") == 4)
    assert "another takes its place" in gateway.log
    assert all("third" in str(ask(gateway, "GET", "/v1/models", tokens["free"])[1]) for _ in range(12))
    gateway.process.send_signal(signal.SIGHUP)
    until(lambda: gateway.log.count("reloaded: experts") == 6, 10)
    assert "a request failed" not in gateway.log
    if "postgresql" in database:
        # Killed, it cannot end them; they see that themselves.
        gateway.end(signal.SIGKILL)
        until(lambda: not workers(gateway))
    else:
        assert gateway.end(signal.SIGTERM) == 0
        assert not workers(gateway)

    engine = connect(database)
    with engine.connect() as connection:
        d = decisions.c
        spent, dearest, count = connection.execute(
            select(func.sum(d.price), func.max(d.price), func.count()).where(d.requested == "large", d.price > 0)
        ).one()
    engine.dispose()
    assert count == statuses.count(200)
    # All of it is spent but what no request would fit in, and overspent by no more than what was in flight.
    assert 1.0 - dearest <= spent <= 1.0 + CLIENTS * dearest
