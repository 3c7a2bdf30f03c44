import importlib.util
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from openai import OpenAI
    from sqlalchemy import Connection, Engine

    from deferral.gateway.keys import Keys
    from tests.several_workers import Workers

# On a shared machine torch's default threads slow small tensors down twentyfold.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def engines() -> "Iterator[set[Engine]]":
    """Those that are connected to a database, but for what `databases_closed` has closed."""
    found: set[Engine] = set()
    if "sqlalchemy" not in sys.modules:
        yield found
        return
    import sqlalchemy.event

    def note(connection: "Connection") -> None:
        found.add(connection.engine)

    sqlalchemy.event.listen(sqlalchemy.Engine, "engine_connect", note)
    yield found
    sqlalchemy.event.remove(sqlalchemy.Engine, "engine_connect", note)


@pytest.fixture(autouse=True)
def databases_closed(engines: "set[Engine]") -> Iterator[None]:
    """From Python 3.13 on a connection to SQLite that is left to the garbage collector is a warning, and so an error here."""
    of_others = set(engines)
    yield
    for engine in engines - of_others:
        engine.dispose()
    engines &= of_others


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data, or a skip that says how to get the test to run."""
    root = os.environ.get("DEFERRAL_DATA")
    if not root:
        pytest.skip("real data: set DEFERRAL_DATA to the folder that holds cifar-10-batches-py/ and l2d/")
    return Path(root)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The address of a PostgreSQL server, or a skip that says what is missing."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("PostgreSQL: pip install '.[postgres]'")
    from tests.postgres_server import binaries, running

    programs = binaries()
    if programs is None:
        pytest.skip("PostgreSQL: initdb and postgres were not found; install them, as with `apt-get install postgresql`")
    with running(programs) as address:
        yield address


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.ci_slow)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each kind that the gateway knows."""
    if request.param == "sqlite":
        yield str(tmp_path / "gateway.db")
        return
    from tests.postgres_server import fresh_database

    with fresh_database(request.getfixturevalue("postgres"), f"test_{secrets.token_hex(6)}") as url:
        yield url


@pytest.fixture
def keys(tmp_path: Path) -> Iterator["Keys"]:
    """API keys in an SQLite file, gateway.db."""
    with _keys(str(tmp_path / "gateway.db")) as store:
        yield store


@pytest.fixture
def shared_keys(database: str) -> Iterator["Keys"]:
    """API keys in a database of each kind."""
    with _keys(database) as store:
        yield store


@contextmanager
def _keys(database: str) -> Iterator["Keys"]:
    from deferral.gateway.keys import Keys
    from deferral.gateway.preparing import prepare

    store = Keys(database)
    prepare(store.engine)
    yield store
    store.close()


@pytest.fixture
def worker(database: str) -> Iterator["Workers"]:
    """Makes another worker on the database whenever it is called."""
    from tests.several_workers import Workers

    made = Workers(database)
    yield made
    made.end()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A gateway with keys, and its upstream, one for each file of tests; `log` holds all that was logged."""
    from tests.whole_gateway import whole_gateway

    with whole_gateway(tmp_path_factory.mktemp("gateway")) as found:
        yield found


@pytest.fixture
def client(running: Any) -> Iterator["OpenAI"]:
    """The official client of that gateway."""
    from openai import OpenAI

    with OpenAI(base_url=running.gateway.url, api_key=running.key, max_retries=0, timeout=20) as found:
        yield found


@pytest.fixture
def nobody_is_down(running: Any) -> None:
    """Whatever came before: tests are handed out to processes in any order."""
    from tests.whole_gateway import calm

    calm(running.gateway)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def adders() -> Iterator[dict[str, Any]]:
    """Experts that add, and a judge."""
    from tests.asked_servers import adding_experts

    with adding_experts() as experts:
        yield experts


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A file of additions, with references."""
    from tests.asked_servers import additions

    return additions(tmp_path / "questions.jsonl")
