"""A gateway made from files, with a key and two experts that are routed to, one that stalls, and one with a wrong key."""

import io
import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deferral.gateway.experts_file import read_experts
from deferral.gateway.logs import JsonLines
from deferral.gateway.retries import RetryBudget
from deferral.gateway.settings import Settings
from tests.faulty_upstream import Upstream
from tests.running_gateway import RunningGateway, small_router

__all__ = ["ADMIN_KEY", "UPSTREAM_KEY", "calm", "experts_file", "rows", "whole_gateway"]

UPSTREAM_KEY, ADMIN_KEY = "sk-upstream-0123456789abcdef", "admin-key-of-the-tests"


@contextmanager
def whole_gateway(folder: Path) -> Iterator[SimpleNamespace]:
    """A gateway with keys, and its upstream; `log` holds all that was logged."""
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(JsonLines())
    logging.getLogger().addHandler(handler)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.DEBUG)
    with Upstream(forever_s=2) as upstream:
        file = folder / "experts.toml"
        file.write_text(experts_file(upstream.port), encoding="utf-8")
        monkeypatch = pytest.MonkeyPatch()
        monkeypatch.setenv("UPSTREAM_KEY", UPSTREAM_KEY)
        router = small_router()
        router.save(folder / "router")
        experts = read_experts(file)
        options = Settings(
            database=str(folder / "gateway.db"), admin_key=ADMIN_KEY, router_folder=folder / "router", experts_file=file
        )
        with RunningGateway(router, experts, options) as gateway:
            token, _ = gateway.state.keys.create("tests")
            yield SimpleNamespace(gateway=gateway, upstream=upstream, key=token, folder=folder, log=log, experts=experts)
    monkeypatch.undo()
    logging.getLogger().removeHandler(handler)
    logging.getLogger().setLevel(level)


def experts_file(port: int, extra: str = "") -> str:
    common = f"""base_url = "http://127.0.0.1:{port}/v1"
key_env = "UPSTREAM_KEY"
connect_s = 1
first_byte_s = 1"""
    return f"""
[experts.small]
{common}
images = false
context_tokens = 5000
output_price = 2.5
[experts.large]
{common}
model = "big/one"
input_price = 1.0
output_price = 250.0
{extra}
[experts.narrow]
{common}
model = "stall"
route = false
input_price = 3.0
max_concurrent = 1
max_waiting = 0
[experts.misled]
{common}
model = "status-401"
route = false
"""


def calm(gateway: RunningGateway) -> None:
    """As if no expert had ever failed."""
    answerers = gateway.state.answerers
    answerers.servers.clear()
    answerers.budget = RetryBudget(answerers.budget.share)
    answerers.update(gateway.state.current.experts)


def rows(running: Any, where: str = "1") -> list[dict[str, Any]]:
    """Of the record, when all that waits is written."""
    until = time.monotonic() + 5
    while running.gateway.state.record._waiting and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    with closing(sqlite3.connect(running.folder / "gateway.db")) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"select * from decisions where {where} order by time")]
