"""A gateway as a process, and the command `deferral serve`."""

import asyncio
import gc
import logging
import math
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import uvicorn
from threadpoolctl import threadpool_limits

from deferral.command_line import Command, FiniteRange, callers_errors
from deferral.gateway.access import must_have_key, no_key
from deferral.gateway.aliases import read_experts_file
from deferral.gateway.app import gateway
from deferral.gateway.database import connect
from deferral.gateway.experts_file import Expert
from deferral.gateway.generation import check_aliases
from deferral.gateway.hysteresis import RULES
from deferral.gateway.listening import BACKLOG, listening
from deferral.gateway.logs import logging_to
from deferral.gateway.opened import database_option, encoder_option
from deferral.gateway.preparing import look
from deferral.gateway.protocol import Protocol
from deferral.gateway.relaying import LONGER
from deferral.gateway.settings import Settings, is_loopback
from deferral.gateway.state import Gateway, load_router, stamps
from deferral.gateway.worker_metrics import fold
from deferral.gateway.workers import ignore_hangups, supervise

__all__ = ["run", "serve", "settings_of"]

_log = logging.getLogger("deferral.gateway")
# Clients keep connections for later; one that the server closes first may lose a request on its way.
_KEEP_ALIVE = 75
_CONNECTIONS, _FEW_CONNECTIONS = 65_536, 4_096
# The exit status where rows could not be written.
_LOST = 1
_OBJECTS_PER_COLLECTION = 5_000
_ADMIN_KEY = "DEFERRAL_ADMIN_KEY"
_ALARM_TOKEN = "DEFERRAL_ALARM_TOKEN"


def run(settings: Settings, *, log_level: str = "info") -> None:
    """Serve until SIGTERM or SIGINT; what is under way then is finished, streams too.  SystemExit 1 where rows are lost.

    ValueError where it would be reachable from other machines without any key, DataError where its address is not to be had.
    """
    assert settings.experts_file is not None
    ignore_hangups()
    if not is_loopback(settings.host):
        _must_have_tables(settings)
    with listening(settings.host, settings.port) as listener:
        must_have_key(settings)
        if settings.workers == 1:
            _serve(settings, log_level, listener)
            return
        if settings.traces:
            import_module("deferral.gateway.tracing")
        # Here a mistake in the files is an error of one command, and not of each worker.
        check_aliases(load_router(settings), *read_experts_file(settings.experts_file))
        with _until_the_end(log_level):
            _log.info("%d workers at %s:%d", settings.workers, *listener.getsockname()[:2])
            with tempfile.TemporaryDirectory(prefix="deferral-metrics-") as folder:
                shared = replace(settings, metrics_folder=Path(folder))
                ended_one = partial(fold, Path(folder))
                if not supervise(partial(_serve, shared, log_level), listener, settings.workers, ended_one=ended_one):
                    sys.exit(_LOST)


def _must_have_tables(settings: Settings) -> None:
    """ValueError where there can be no key; whoever is refused finds no new database afterwards."""
    engine = connect(settings.database)
    try:
        if look(engine) == 0:
            raise ValueError(no_key(settings.host))
    finally:
        engine.dispose()


def _serve(settings: Settings, log_level: str, listener: socket.socket) -> None:
    """In this process, from a socket that listens already."""
    assert settings.experts_file is not None
    read = stamps(settings)
    router = load_router(settings)
    experts, aliases = read_experts_file(settings.experts_file)
    # A product of one query takes less time than it takes to wake another thread.
    threadpool_limits(1, user_api="blas")
    # A signal that comes before uvicorn listens is kept for it.  At the very end uvicorn raises the one that ended it once more.
    ended_early = threading.Event()
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, lambda *_: ended_early.set())
    # uvloop looks up every address that it connects to in threads of libuv: four by default, which a few names that do not answer
    # would fill.
    os.environ.setdefault("UV_THREADPOOL_SIZE", "128")
    with _until_the_end(log_level):
        _allow_many_connections()
        app = gateway(router, experts, aliases=aliases, settings=settings, read=read)
        config = uvicorn.Config(
            app,
            http=Protocol,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="on",
            timeout_keep_alive=_KEEP_ALIVE,
            backlog=BACKLOG,
        )
        # What is there now stays, and what requests leave behind is mostly no garbage but rows that wait to be written: looking
        # through all that again and again would take time from requests.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_OBJECTS_PER_COLLECTION)
        place = ("[%s]:%d" if ":" in settings.host else "%s:%d") % (settings.host, listener.getsockname()[1])
        greeting = f"serving {', '.join(experts)} at http://{place}, page at http://{place}/dashboard"
        _Server(config, greeting, app.state.gateway, ended_early).run([listener])
        if app.state.gateway.record.lost:
            sys.exit(_LOST)


@contextmanager
def _until_the_end(log_level: str) -> Iterator[None]:
    """Log while this lasts; a process whose log nobody reads ends with it."""
    log = None
    try:
        with logging_to(level=log_level) as log:
            yield
    finally:
        if log is not None and log.stuck:
            error = sys.exc_info()[1]
            os._exit(0 if error is None else int(getattr(error, "code", 1)))


class _Server(uvicorn.Server):
    """Says where it serves once it does, and lets what is under way end."""

    def __init__(self, config: uvicorn.Config, greeting: str, state: Gateway, ended_early: threading.Event) -> None:
        super().__init__(config)
        self._greeting, self._state, self._ended_early = greeting, state, ended_early

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the database and the connections, then the door."""
        await super().startup(sockets)
        _log.info("%s", self._greeting)
        if self._ended_early.is_set():
            # Not at once: without a shutdown, uvicorn would leave open what has been opened.
            asyncio.get_running_loop().call_soon(self._end)

    def _end(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """What is under way ends by itself, within the time of the experts as they are now."""
        self.config.timeout_graceful_shutdown = _longest(self._state.current.experts.values())
        self._state.ends()
        await super().shutdown(sockets)


def _longest(experts: Iterable[Expert]) -> int:
    """Seconds that a request may take of the slowest: to get its turn, for its answer, and until its client has read that."""
    return math.ceil(max(expert.first_byte_s + expert.total_s for expert in experts) + LONGER)


def _allow_many_connections() -> None:
    """Each request under way has two; the limit that processes start with is often 1,024."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, _CONNECTIONS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < _FEW_CONNECTIONS:
        _log.warning("%d files and connections may be open at a time, two a request: raise the limit (ulimit -Hn)", wanted)


@click.command(cls=Command)
@click.argument("router", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--experts",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file: where each expert is reached, what it can do, what it costs.",
)
@encoder_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind to; any other than loopback needs a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="How many processes serve; each takes a core.",
)
@database_option
@click.option(
    "--explore",
    type=FiniteRange(0, 1, max_open=True),
    help="Share of the queries that go to an expert drawn at random.  [default: the router's own]",
)
@click.option(
    "--shadow",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of a candidate router, whose decisions are recorded but not used; see `deferral gateway shadow`.",
)
@click.option("--store-text", is_flag=True, help="Keep the text of queries, which retraining needs; requires --retention-days.")
@click.option("--retention-days", type=FiniteRange(min=0, min_open=True), help="How many days texts are kept.")
@click.option(
    "--record-days",
    type=FiniteRange(min=0, min_open=True),
    help="How many days decisions and feedback are kept.  [default: forever]",
)
@click.option(
    "--deadline-ms",
    type=FiniteRange(min=0, min_open=True),
    default=25.0,
    show_default=True,
    help="How long a decision waits for the encoder before the static mix decides.",
)
@click.option(
    "--max-request-mb",
    type=FiniteRange(0, 1_000_000, min_open=True),
    default=10.0,
    show_default=True,
    help="The largest request that is accepted, in MiB.",
)
@click.option(
    "--alarm-url",
    envvar="DEFERRAL_ALARM_URL",
    help="Address that drift alarms are posted to, as JSON; give a secret one in DEFERRAL_ALARM_URL instead.",
)
@click.option(
    "--traces", is_flag=True, help="Send OpenTelemetry spans; the environment variables OTEL_* say where, and of which requests."
)
@click.option("--no-conversations", is_flag=True, help="Decide every request of a conversation on its own.")
@click.option(
    "--patience",
    type=click.IntRange(min=1),
    default=RULES.patience,
    show_default=True,
    help="How many requests in a row must prefer a cheaper expert before a conversation changes to it.",
)
@click.option(
    "--follow-up",
    type=click.IntRange(min=0),
    help="Requests of fewer characters follow up the one before.  [default: from the router's log, at most 40]",
)
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True)
def serve(log_level: str, **options: Any) -> None:
    """Serve an OpenAI-compatible API around the router in the folder ROUTER.

    SIGHUP reads ROUTER and the experts file again, without dropping a request; SIGTERM ends it once all requests are answered.
    The admin endpoints require the key in the environment variable DEFERRAL_ADMIN_KEY, or one made by `deferral gateway keys
    create --admin`.  What is posted to the alarm URL carries the token in DEFERRAL_ALARM_TOKEN, if there is one.
    """
    with callers_errors(click.UsageError):
        run(settings_of(**options), log_level=log_level)


def settings_of(
    router: Path,
    experts: Path,
    encoder: Path | None,
    host: str,
    port: int,
    workers: int,
    database: str,
    explore: float | None,
    shadow: Path | None,
    store_text: bool,
    retention_days: float | None,
    record_days: float | None,
    deadline_ms: float,
    max_request_mb: float,
    alarm_url: str | None,
    traces: bool,
    no_conversations: bool,
    patience: int,
    follow_up: int | None,
) -> Settings:
    """The settings that the options of `serve` stand for; ValueError where they make no sense."""
    return Settings(
        database=database,
        host=host,
        port=port,
        workers=workers,
        explore=explore,
        store_text=store_text,
        retention_days=retention_days,
        record_days=record_days,
        admin_key=os.environ.get(_ADMIN_KEY, "").strip() or None,
        max_request_bytes=int(max_request_mb * (1 << 20)),
        deadline_s=deadline_ms / 1000,
        router_folder=router,
        experts_file=experts,
        encoder=encoder,
        shadow_folder=shadow,
        alarm_url=alarm_url or None,
        alarm_token=os.environ.get(_ALARM_TOKEN, "").strip() or None,
        traces=traces,
        conversations=None if no_conversations else replace(RULES, patience=patience, follow_up=follow_up),
    )
