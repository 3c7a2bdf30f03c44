"""Alarms are told to a URL once, whoever sees them, and until they have arrived."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import Engine, select, update

from deferral.gateway import alarms as alarms_module
from deferral.gateway import notices as module
from deferral.gateway.alarms import MEANINGS, Alarms
from deferral.gateway.database import connect
from deferral.gateway.experts_file import Expert
from deferral.gateway.notices import Notices, keep_notices
from deferral.gateway.preparing import prepare
from deferral.gateway.schema import notices
from deferral.gateway.serve import serve
from deferral.gateway.settings import Settings
from tests.faulty_upstream import Upstream, closed_port
from tests.running_gateway import EASY, RunningGateway, small_router
from tests.test_gateway_alarms import DAY, EXPECTED, NOW, filled

SECRET, TOKEN = "secret-part-of-the-address", "token-of-the-receiver"


class Receiver:
    """A server that keeps what is posted to it, and answers with the next of `statuses`, with 200 when there are none left."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.got: list[tuple[int, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.hold = threading.Event()
        self.hold.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                receiver.hold.wait(50)
                status = receiver.statuses.pop(0) if receiver.statuses else 200
                receiver.headers.append({name.lower(): value for name, value in self.headers.items()})
                receiver.got.append((status, body))
                self.send_response(status)
                self.send_header("location", "/elsewhere")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/{SECRET}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def taken(self) -> list[dict[str, Any]]:
        """What it said 200 to."""
        return [body for status, body in self.got if status == 200]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setattr(module, "backoff", lambda attempt: 0.0)
    # A machine that is busy is no receiver that is too slow.
    monkeypatch.setattr(module, "_TIMEOUT", 50.0)
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def engine(database: str) -> Iterator[Engine]:
    made = connect(database)
    prepare(made)
    yield made
    made.dispose()


def keep(engine: Engine, *texts: str, late: float = 0.0) -> None:
    """Notices, kept so many seconds before now."""
    fresh = notices.c.due > time.time() - 1
    with engine.begin() as connection:
        keep_notices(connection, [{"text": text} for text in texts])
        connection.execute(update(notices).where(fresh).values(time=notices.c.time - late, due=notices.c.due - late))


def waiting(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(select(notices).order_by(notices.c.time)))


def make_due(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(update(notices).values(due=time.time() - 1))


def test_what_rises_and_what_is_over_is_told_once_whoever_looks(database: str, receiver: Receiver) -> None:
    engines = [connect(database) for _ in range(3)]
    gateways = [Alarms(engine, Notices(engine, receiver.url, TOKEN)) for engine in engines]

    def everybody(at: float) -> None:
        async def send() -> None:
            await asyncio.gather(*(gateway._notices.send() for gateway in gateways))  # type: ignore[union-attr]

        for gateway in gateways:
            gateway.look(EXPECTED, at)
        asyncio.run(send())

    filled(database, 800)
    everybody(NOW)
    assert receiver.got == []
    filled(database, 800, end=NOW + DAY, start=10_000, price=3.0)
    everybody(NOW + DAY)
    everybody(NOW + DAY + 1000)
    [told] = receiver.taken()
    assert told["text"].startswith("alarm: A price that moved of large: ")
    title, meaning = MEANINGS["price"]
    assert told | {"text": 0, "id": 0, "rows": 0, "found": 0, "low": 0, "high": 0} == {
        "text": 0, "id": 0, "status": "raised", "name": "price", "expert": "large", "rows": 0, "found": 0, "low": 0, "high": 0,
        "least": 1 / 1.5, "most": 1.5, "ringing": True, "since": NOW + DAY, "title": title, "meaning": meaning,
    }  # fmt: skip
    filled(database, 800, end=NOW + 3 * DAY, start=20_000)
    everybody(NOW + 3 * DAY)
    everybody(NOW + 3 * DAY + 1000)
    _, over = receiver.taken()
    assert (over["status"], over["ringing"], over["name"], over["expert"]) == ("over", False, "price", "large")
    assert over["id"] != told["id"]
    assert {headers["authorization"] for headers in receiver.headers} == {f"Bearer {TOKEN}"}
    assert len(receiver.got) == 2
    assert waiting(engines[0]) == []
    for engine in engines:
        engine.dispose()


def test_an_expert_that_is_gone_has_no_figures_and_is_told_all_the_same(tmp_path: Path, receiver: Receiver) -> None:
    database = str(tmp_path / "g.db")
    filled(database, 800, price=3.0)
    engine = connect(database)
    gateway = Alarms(engine, Notices(engine, receiver.url))
    gateway.look(EXPECTED, NOW)
    gateway.look(type(EXPECTED)(["small"], EXPECTED.kinds, EXPECTED.shares), NOW + 1000)
    asyncio.run(gateway._notices.send())  # type: ignore[union-attr]
    assert [told["status"] for told in receiver.taken()] == ["raised", "over"]
    assert receiver.taken()[1]["found"] is None
    engine.dispose()


def test_without_a_url_nothing_is_kept(tmp_path: Path) -> None:
    database = str(tmp_path / "g.db")
    filled(database, 800, price=3.0)
    engine = connect(database)
    Alarms(engine).look(EXPECTED, NOW)
    assert waiting(engine) == []
    engine.dispose()


def test_a_receiver_that_fails_first_gets_it_later_and_in_order(
    engine: Engine, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "deferral.gateway")
    keep(engine, "first", "second")
    receiver.statuses = [500, 302, 404]
    sender = Notices(engine, receiver.url, TOKEN)
    asyncio.run(sender.send())
    assert [status for status, _ in receiver.got] == [500, 302, 404], "three attempts, and no redirect is followed"
    assert [(one.attempts, json.loads(one.body)["text"]) for one in waiting(engine)] == [(1, "first"), (0, "second")]
    asyncio.run(sender.send())
    assert len(receiver.got) == 3, "it is not due, and the second waits for it"
    make_due(engine)
    receiver.statuses = [503]
    asyncio.run(sender.send())
    assert [told["text"] for told in receiver.taken()] == ["first", "second"]
    assert len({body["id"] for _, body in receiver.got}) == 2
    assert waiting(engine) == []
    assert caplog.text.count("could not be told") == 1
    assert SECRET not in caplog.text
    assert TOKEN not in caplog.text


def test_nobody_there_waits_longer_each_time_and_ten_minutes_at_most(
    engine: Engine, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    keep(engine, "only")
    sender, waits = Notices(engine, f"http://127.0.0.1:{closed_port()}/{SECRET}"), []
    for _ in range(7):
        make_due(engine)
        asyncio.run(sender.send())
        waits.append(waiting(engine)[0].due - time.time())
    assert waits == pytest.approx([30, 60, 120, 240, 480, 600, 600], abs=20)
    assert SECRET not in caplog.text
    make_due(engine)
    asyncio.run(Notices(engine, receiver.url).send())
    assert [told["text"] for told in receiver.taken()] == ["only"]


def test_many_at_once_send_each_notice_once(engine: Engine, database: str, receiver: Receiver) -> None:
    keep(engine, *map(str, range(5)))
    engines = [connect(database) for _ in range(4)]

    async def send() -> None:
        for _ in range(5):
            await asyncio.gather(*(Notices(one, receiver.url).send() for one in engines))

    asyncio.run(send())
    assert [told["text"] for told in receiver.taken()] == list("01234")
    for one in engines:
        one.dispose()


def test_who_dies_while_it_tells_leaves_it_to_another_after_a_minute(engine: Engine, receiver: Receiver) -> None:
    keep(engine, "only")
    assert Notices(engine, receiver.url)._taken() is not None
    asyncio.run(Notices(engine, receiver.url).send())
    assert receiver.got == []
    [held] = waiting(engine)
    assert held.due - time.time() == pytest.approx(60, abs=20)
    make_due(engine)
    asyncio.run(Notices(engine, receiver.url).send())
    assert [told["text"] for told in receiver.taken()] == ["only"]


def test_a_week_later_it_is_given_up_and_a_clock_set_back_gives_up_nothing(
    engine: Engine, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    keep(engine, "stale", late=8 * DAY)
    keep(engine, "of the future", late=-DAY)
    asyncio.run(Notices(engine, receiver.url).send())
    assert [told["text"] for told in receiver.taken()] == ["of the future"]
    assert "1 alarms of a week ago are given up" in caplog.text


@pytest.mark.parametrize("url", ["", "example.com/hook", "ftp://example.com/x", "http://", "http://[::1/x", "https://a:b/x"])
def test_an_address_that_is_none_is_refused_without_being_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="alarm_url: expected an address that begins with") as error:
        Settings(alarm_url=url)
    assert "hook" not in str(error.value)


def test_neither_address_nor_token_is_shown_by_the_settings() -> None:
    settings = Settings(alarm_url=f"https://example.com/{SECRET}", alarm_token=TOKEN)
    assert SECRET not in repr(settings)
    assert TOKEN not in repr(settings)
    with pytest.raises(ValueError, match="expected alarm_url"):
        Settings(alarm_token=TOKEN)


def test_the_command_reads_the_address_of_the_environment_and_keeps_it_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = tmp_path / "experts.toml"
    experts.write_text("")
    monkeypatch.setenv("DEFERRAL_ALARM_URL", SECRET)
    said = CliRunner().invoke(serve, [str(tmp_path), "--experts", str(experts)])
    assert said.exit_code == 2
    assert "alarm_url: expected an address" in said.output
    assert SECRET not in said.output
    monkeypatch.delenv("DEFERRAL_ALARM_URL")
    monkeypatch.setenv("DEFERRAL_ALARM_TOKEN", TOKEN)
    said = CliRunner().invoke(serve, [str(tmp_path), "--experts", str(experts)])
    assert "expected alarm_url (--alarm-url) as well" in said.output
    assert TOKEN not in said.output


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.ci_slow
def test_a_gateway_tells_and_serves_while_the_receiver_keeps_it_waiting(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alarms_module, "_FIRST", 0.0)
    monkeypatch.setattr(alarms_module, "_READ", 0.05)
    database = str(tmp_path / "g.db")
    filled(database, 800, end=time.time(), price=3.0)
    receiver.hold.clear()
    with Upstream() as upstream:
        experts = {name: Expert(name, upstream.url) for name in ("small", "large")}
        with RunningGateway(small_router(), experts, Settings(database=database, alarm_url=receiver.url)) as gateway:
            until(lambda: any(alarm.ringing for alarm in gateway.state.alarms.now))
            assert gateway.chat(EASY)[0] == 200
            assert receiver.got == []
            receiver.hold.set()
            until(lambda: len(receiver.taken()) == 1)
            until(lambda: waiting(gateway.state.record.engine) == [])
    assert [(told["status"], told["expert"]) for told in receiver.taken()] == [("raised", "large")]
