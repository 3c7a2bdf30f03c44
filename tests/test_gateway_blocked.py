"""PostgreSQL that answers nobody, as long as another has locked a table, or for good: who is served, who is told, and the end."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, func, select

from deferral.gateway import keys as keys_module
from deferral.gateway import record as record_module
from deferral.gateway.database import connect, wait_for
from deferral.gateway.dialects import alone
from deferral.gateway.experts_file import Expert
from deferral.gateway.preparing import look, prepare
from deferral.gateway.record import Record
from deferral.gateway.schema import VERSION, decisions
from deferral.gateway.settings import Settings
from tests.faulty_upstream import Upstream
from tests.gateway_rows import row
from tests.postgres_server import fresh_database
from tests.running_gateway import EASY, RunningGateway, small_router

pytestmark = pytest.mark.ci_slow

ADMIN = "an-admin-key-of-some-length"


@pytest.fixture
def url(postgres: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A database whose gateways wait for a lock for half a second only."""
    for module in (record_module, keys_module):
        monkeypatch.setattr(module, "LOCK_S", 0.5)
    with fresh_database(postgres, f"blocked_{abs(hash(request.node.name))}") as found:
        yield found


@pytest.fixture
def other(url: str) -> Iterator[Engine]:
    """A way to it that has no such limit."""
    found = connect(url)
    prepare(found)
    yield found
    found.dispose()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_a_locked_table_stops_nobody_and_is_told(url: str, other: Engine) -> None:
    with Upstream() as upstream:
        experts = {name: Expert(name, upstream.url) for name in ("small", "large")}
        settings = Settings(database=url, admin_key=ADMIN)
        with RunningGateway(small_router(), experts, settings) as gateway, ThreadPoolExecutor(12) as clients:
            with other.connect() as holding:
                holding.exec_driver_sql("LOCK TABLE decisions IN ACCESS EXCLUSIVE MODE")
                pages = [clients.submit(gateway.ask, "GET", "/admin/decisions", key=ADMIN) for _ in range(12)]
                began = time.monotonic()
                assert gateway.chat(EASY)[0] == 200
                going_on = {"model": "auto", "input": "and then?", "previous_response_id": "resp_1"}
                assert gateway.ask("POST", "/v1/responses", going_on)[0] == 503
                assert gateway.ask("GET", "/metrics", key=ADMIN)[0] == 200
                assert time.monotonic() - began < 1.5, "pages have threads of their own"
                until(lambda: b"cannot be written at present" in gateway.ask("GET", "/ready")[2])
                assert b"deferral_record_failing 1.0" in gateway.ask("GET", "/metrics", key=ADMIN)[2]
                assert {page.result()[0] for page in pages} == {503}
            until(lambda: gateway.state.record.waiting == 0)
            assert gateway.ask("GET", "/ready")[2] == b'{"status":"ready"}'
    with other.connect() as connection:
        assert connection.execute(select(func.count()).select_from(decisions)).scalar_one() == 2


def test_the_record_ends_in_time_though_a_table_stays_locked(url: str, other: Engine) -> None:
    record = Record(url)
    record.start()
    with other.connect() as holding:
        holding.exec_driver_sql("LOCK TABLE decisions IN ACCESS EXCLUSIVE MODE")
        for number in range(3):
            record.add(row(number))
        began = time.monotonic()
        record.stop(timeout=0.3)
        assert time.monotonic() - began < 3
    assert record.lost == 3


def test_a_statement_without_an_answer_is_not_waited_for_at_the_end(other: Engine) -> None:
    failed = []

    def wait() -> None:
        with other.connect() as connection:
            try:
                connection.exec_driver_sql("SELECT pg_sleep(60)")
            except Exception as error:
                failed.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    time.sleep(0.2)
    began = time.monotonic()
    assert wait_for(thread, other, 0.5)
    assert time.monotonic() - began < 5
    assert failed


def test_making_tables_may_take_its_time(url: str) -> None:
    other, limited = connect(url), connect(url, lock_s=0.1, statement_s=0.1)
    made = threading.Thread(target=prepare, args=(limited,), daemon=True)
    with other.connect() as holding, alone(holding, "schema"):
        made.start()
        time.sleep(0.4)
        assert made.is_alive(), "another makes them, and is waited for"
    made.join(10)
    assert look(limited) == VERSION
    limited.dispose()
    other.dispose()
