"""Two gateways on one database, as two machines have them: what a command changes in a key holds at both, under the same id."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import select

from deferral.cli import main
from deferral.gateway.database import connect
from deferral.gateway.experts_file import Expert
from deferral.gateway.keys import Keys
from deferral.gateway.preparing import prepare
from deferral.gateway.schema import decisions
from deferral.gateway.settings import Settings
from deferral.gateway.shared_limits import SharedLimits
from tests.faulty_upstream import Upstream
from tests.running_gateway import EASY, RunningGateway, small_router

pytestmark = pytest.mark.ci_slow


@pytest.fixture
def token(database: str) -> str:
    keys = Keys(database)
    prepare(keys.engine)
    made, _ = keys.create("alice", budget=1.0, requests_per_minute=10_000)
    keys.close()
    return made


@pytest.fixture
def gateways(database: str, token: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RunningGateway]]:
    monkeypatch.setattr("deferral.gateway.keys._REFRESH", 0.1)
    router, settings = small_router(), Settings(database=database, workers=2)
    with Upstream() as upstream:
        experts = {
            name: Expert(name, upstream.url, "good", input_price=100.0, output_price=1000.0) for name in ("small", "large")
        }
        with RunningGateway(router, experts, settings) as one, RunningGateway(router, experts, settings) as two:
            assert all(isinstance(gateway.state.limits, SharedLimits) for gateway in (one, two))
            yield [one, two]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        threading.Event().wait(0.02)


def test_a_key_changes_under_two_gateways(
    gateways: list[RunningGateway], database: str, token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str) -> str:
        main(["gateway", "keys", *arguments, "--database", database])
        return capsys.readouterr().out.strip()

    def statuses(key: str, model: str = "small") -> list[int]:
        return [gateway.chat(EASY, key=key, model=model, max_tokens=10)[0] for gateway in gateways]

    first = [gateway.chat(EASY, key=token, model="small", max_tokens=10) for gateway in gateways]
    assert [status for status, _, _ in first] == [200, 200]
    command("set", "alice", "--budget", "0.05")
    until(lambda: statuses(token) == [429, 429])
    command("set", "alice", "--budget", "100")
    until(lambda: statuses(token) == [200, 200])
    command("set", "alice", "--expert", "large")
    until(lambda: statuses(token) == [404, 404])
    assert statuses(token, "large") == [200, 200]
    command("set", "alice", "--requests-per-minute", "1")
    until(lambda: statuses(token, "large") == [429, 429])
    command("set", "alice", "--any-rate", "--name", "alicia")
    until(lambda: statuses(token, "large") == [200, 200])

    second = command("rotate", "alicia", "--grace-hours", "1")
    until(lambda: statuses(second, "large") == [200, 200])
    assert statuses(token, "large") == [200, 200]
    third = command("rotate", "alicia")
    until(lambda: statuses(third, "large") == [200, 200])
    for ended in (token, second):
        until(lambda ended=ended: statuses(ended, "large") == [401, 401])
    # What was answered to the first token is the third's to judge.
    for _, headers, _ in first:
        body = {"id": headers["x-deferral-id"], "thumbs": "up"}
        assert gateways[0].ask("POST", "/v1/feedback", body, key=third)[0] == 200
    engine = connect(database)
    with engine.connect() as connection:
        [identity] = connection.execute(select(decisions.c.key).distinct().where(decisions.c.price > 0)).scalars()
    engine.dispose()
    assert token.startswith(f"dk-{identity}-")
    assert third.startswith(f"dk-{identity}-")
