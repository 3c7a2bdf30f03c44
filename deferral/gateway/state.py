"""What the requests of a gateway share, from its start to its end."""

import asyncio
import errno
import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from deferral.errors import DataError
from deferral.gateway.access import Access
from deferral.gateway.alarms import Alarms
from deferral.gateway.aliases import Alias, read_experts_file
from deferral.gateway.answering import Answerers
from deferral.gateway.cascading import Silence
from deferral.gateway.experts_file import Expert
from deferral.gateway.forgetting import Forgotten, forget
from deferral.gateway.generation import Generation, generation
from deferral.gateway.keys import Keys
from deferral.gateway.metrics import Metrics
from deferral.gateway.notices import Notices
from deferral.gateway.problems import Problem
from deferral.gateway.record import Record
from deferral.gateway.reloads import Reloads
from deferral.gateway.replies import Replies
from deferral.gateway.settings import Settings
from deferral.gateway.shadow import Shadow, load_shadow
from deferral.gateway.shared_limits import limits_of
from deferral.gateway.upstream import Upstream
from deferral.gateway.worker_metrics import WorkerMetrics
from deferral.routing.encoders import FunctionEncoder
from deferral.routing.router import Router

if TYPE_CHECKING:
    from deferral.gateway.tracing import Tracing

__all__ = ["Gateway", "Stamps", "descriptor_left", "load_router", "stamps"]

_log = logging.getLogger("deferral.gateway")

_T = TypeVar("_T")
_LOOK = 1.0
_QUERIES = 4
_LONGEST_QUERY = 60.0

Stamps = tuple[tuple[int, int], ...]


class Gateway:
    """What the requests share.  `read` are the `stamps` of the files, taken before they were read."""

    answerers: Answerers

    def __init__(
        self,
        router: Router,
        experts: Mapping[str, Expert],
        settings: Settings,
        *,
        aliases: Mapping[str, Alias] | None = None,
        read: Stamps | None = None,
    ) -> None:
        self.settings = settings
        self._files = stamps(settings) if read is None else read
        self.current = generation(router, experts, settings, aliases)
        self.record = Record(
            settings.database,
            store_text=settings.store_text,
            retention_days=settings.retention_days,
            record_days=settings.record_days,
        )
        self.replies = Replies(self.record.engine)
        self.keys = Keys(settings.database, serving=True)
        self.limits = limits_of(self.record, settings)
        self.reloads = Reloads(self.record.engine)
        self.access = Access(self.keys, settings)
        self.metrics, self.silence = Metrics(), Silence()
        self._reloading = asyncio.Lock()
        url, token = settings.alarm_url, settings.alarm_token
        self.alarms = Alarms(self.record.patient, None if url is None else Notices(self.record.engine, url, token))
        self.shadow: Shadow | None = None
        self.traces = _traces() if settings.traces else None
        shared = self.settings.metrics_folder
        self.worker_metrics = None if shared is None else WorkerMetrics(self.metrics, shared)
        self._following: list[asyncio.Task] = []
        self._crowded = False
        self._queries = ThreadPoolExecutor(_QUERIES, "queries")
        self._deletions, self._ends = ThreadPoolExecutor(1, "deletions"), threading.Event()

    @property
    def trouble(self) -> str:
        """Why no request should be sent here; "" if there is no reason."""
        if self.record.full:
            return "the record cannot be written; the log has the reason"
        if self._crowded:
            return "no file descriptor is left; the log says what to do"
        down = self.answerers.down()
        return "all experts are down" if all(name in down for name in self.current.experts) else ""

    async def start(self) -> None:
        """Open the database and the connections."""
        await asyncio.to_thread(self._open_database)
        upstream = Upstream(max_reply_bytes=self.settings.max_reply_bytes)
        self.answerers = Answerers(upstream, self.metrics, retry_share=self.settings.retry_share, traces=self.traces)
        self.answerers.update(self.current.experts)
        self.metrics.expect(self.current.experts)
        self.metrics.watch_servers(lambda: self.answerers.servers)
        await self._new_shadow()
        self.metrics.watch_shadow(lambda: self.shadow)
        self.metrics.watch_alarms(lambda: self.alarms.now)
        self.metrics.watch_record(self.record)
        self.metrics.watch_budgets(lambda: self.limits.known(self.keys))
        self._following = [
            asyncio.create_task(self.reloads.follow(self.reload_or_say)),
            asyncio.create_task(self.alarms.follow(lambda: self.current.decider.expected)),
            asyncio.create_task(self._look_after_itself()),
        ]
        if self.worker_metrics is not None:
            self._following.append(asyncio.create_task(self.worker_metrics.follow()))

    def ends(self) -> None:
        """No deletion goes on; what else is under way does."""
        self._ends.set()

    async def stop(self) -> None:
        """Everything is written before this returns."""
        for task in self._following:
            task.cancel()
        if self.worker_metrics is not None:
            self.worker_metrics.leave()
        await self.answerers.upstream.close()
        self.current.decider.close()
        if self.shadow is not None:
            await asyncio.to_thread(self.shadow.close)
        self.ends()
        for pool in (self._queries, self._deletions):
            pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.alarms.close)
        await asyncio.to_thread(self.limits.close)
        self.replies.close()
        await self.record.close()
        await asyncio.to_thread(self.keys.close)
        if self.traces is not None:
            await asyncio.to_thread(self.traces.close)

    async def query(self, work: Callable[..., _T], *args: Any, **options: Any) -> _T:
        """Work for an admin that waits for the database: in threads of its own, which it alone can fill.

        Problem 503 where there is no answer within a minute; what was begun may end later.
        """
        try:
            async with asyncio.timeout(_LONGEST_QUERY):
                return await asyncio.get_running_loop().run_in_executor(self._queries, partial(work, *args, **options))
        except TimeoutError:
            message = f"the database has not answered within {_LONGEST_QUERY:.0f} s; what was begun may end later"
            raise Problem(503, "record_unavailable", message, retry_after=_LONGEST_QUERY) from None

    async def forget(self, *, key: str | None = None, response: str | None = None) -> Forgotten:
        """Delete what is on record, one such request after another: that may take minutes, and nobody else waits for it.

        Problem 503 where the gateway ends before; what is deleted until then stays so, and asking again goes on from there.
        """

        def go_on(so_far: Forgotten) -> None:
            if self._ends.is_set():
                message = f"the gateway ends; {so_far}, and the same request goes on from there"
                raise Problem(503, "server_ends", message, retry_after=_LONGEST_QUERY)

        work = partial(forget, self.record.patient, key=key, response=response, progress=go_on)
        return await asyncio.get_running_loop().run_in_executor(self._deletions, work)

    async def _look_after_itself(self) -> None:
        while True:
            self.record.look()
            crowded = not descriptor_left()
            if crowded and not self._crowded:
                _log.error("no file descriptor is left: new connections are dropped; raise the limit of open files (ulimit -n)")
            self._crowded = crowded
            await asyncio.sleep(_LOOK)

    async def reload(self) -> str:
        """Read the router folder and the experts file again.  -> what is in force now

        DataError or ValueError where one of them is bad; then both stay as they were.
        """
        settings = self.settings
        if settings.router_folder is None and settings.experts_file is None:
            raise ValueError("reload: this gateway was not made from files")
        async with self._reloading:
            fresh = await asyncio.to_thread(self._read)
            # From here on in one step: no request sees half of it.
            self.current = fresh
            self.answerers.update(fresh.experts)
            self.metrics.expect(fresh.experts)
            await self._new_shadow()
        message = f"experts {', '.join(fresh.experts)}; router of {', '.join(fresh.router.experts)}"
        _log.info("reloaded: %s", message)
        return message

    async def reload_or_say(self) -> None:
        """Reload; where that fails all stays as it was, and the log says why."""
        try:
            await self.reload()
        except (DataError, ValueError) as error:
            _log.error("not reloaded, all stays as it was: %s", error)
        except Exception:
            _log.exception("not reloaded, all stays as it was")

    async def catch_up(self) -> None:
        """Reload if the files have changed since they were read: that was announced before this gateway listened."""
        if stamps(self.settings) != self._files:
            await self.reload_or_say()

    async def reload_everywhere(self) -> str:
        """Reload here, and if that is good, have all others on the same database do so within a second or two."""
        message = await self.reload()
        await self.query(self.reloads.announce)
        return message

    async def _new_shadow(self) -> None:
        """The candidate as it is now; what is wrong with it is told in the log, and changes nothing else."""
        folder, before = self.settings.shadow_folder, self.shadow
        if folder is None:
            return
        self.shadow = await asyncio.to_thread(load_shadow, folder, self.settings.encoder, self.record.engine)
        if before is not None:
            await asyncio.to_thread(before.close)

    def _read(self) -> Generation:
        settings, now = self.settings, self.current
        encoder = now.router.encoder
        encode = encoder.encode if isinstance(encoder, FunctionEncoder) else None
        router = now.router if settings.router_folder is None else load_router(settings, encode)
        if settings.experts_file is None:
            return generation(router, now.experts, settings, now.aliases)
        experts, aliases = read_experts_file(settings.experts_file)
        return generation(router, experts, settings, aliases)

    def _open_database(self) -> None:
        self.record.start()
        self.keys.start()
        self.access.started()
        self.limits.load(list(self.keys))
        self.keys.tell(self.limits.follow)
        self.reloads.start()


def stamps(settings: Settings) -> Stamps:
    """What tells whether the router's folder or the experts file was replaced; what is not there has none."""
    found = []
    for path in (settings.router_folder, settings.experts_file):
        with suppress(OSError):
            if path is not None:
                status = path.stat()
                found.append((status.st_ino, status.st_mtime_ns))
    return tuple(found)


def descriptor_left() -> bool:
    """Whether this process can open one more file, or take one more connection."""
    try:
        os.close(os.open(os.curdir, os.O_RDONLY))
    except OSError as error:
        return error.errno not in (errno.EMFILE, errno.ENFILE)
    return True


def load_router(settings: Settings, encode: Callable[[list[str]], Any] | None = None) -> Router:
    """The router of the settings' folder; `encode` is the encoder that is loaded already, if one is."""
    assert settings.router_folder is not None
    return Router.load(settings.router_folder, encoder=settings.encoder if encode is None else encode)


def _traces() -> "Tracing":
    # Whoever does without traces has nothing of them in memory.
    from deferral.gateway.tracing import Tracing, provider

    return Tracing(provider())
