"""A PostgreSQL server of the tests' own, where its binaries are found: on loopback, in a folder that goes with it."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError

__all__ = ["binaries", "fresh_database", "running"]


def binaries() -> Path | None:
    """The folder of initdb and postgres, which Debian keeps off the PATH."""
    found = [Path(path).parent for path in [shutil.which("initdb")] if path and shutil.which("postgres")]
    found += sorted(path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].resolve() if found else None


@contextmanager
def running(programs: Path, *, durable: bool = False) -> Iterator[str]:
    """The server's address, postgresql+psycopg://USER@127.0.0.1:PORT.  Unless `durable`, a power failure may spoil its data."""
    # PostgreSQL refuses to be run by root.
    user = next((name for name in ("postgres", "nobody") if _exists(name)), None) if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="deferral-postgres-"))
    try:
        if user is not None:
            shutil.chown(folder, user)
        data, log = folder / "data", folder / "log"
        made = subprocess.run(
            [programs / "initdb", "-D", data, "-U", "tester", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C"],
            user=user, cwd=folder, capture_output=True, text=True,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = (
            f"fsync={'on' if durable else 'off'}",
            "max_connections=60",
            "shared_buffers=32MB",
            f"unix_socket_directories={folder}",
        )
        command = [programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port)]
        with log.open("w") as output:
            server = subprocess.Popen(
                [*command, *(word for option in options for word in ("-c", option))],
                user=user, cwd=folder, stdout=output, stderr=output,
            )  # fmt: skip
        address = f"postgresql+psycopg://tester@127.0.0.1:{port}"
        try:
            _until_it_answers(address, server, log)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def fresh_database(address: str, name: str) -> Iterator[str]:
    """An empty database of the server; it is gone afterwards, whoever is still connected."""
    _run(address, f"CREATE DATABASE {name}")
    try:
        yield f"{address}/{name}"
    finally:
        _run(address, f"DROP DATABASE {name} WITH (FORCE)")


def _run(address: str, statement: str) -> None:
    engine = create_engine(f"{address}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(statement)
    engine.dispose()


def _until_it_answers(address: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            _run(address, "SELECT 1")
            return
        except OperationalError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True
