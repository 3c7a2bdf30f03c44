"""The gateway's routes around its state, as a Starlette app."""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from deferral.gateway import admin, dashboard
from deferral.gateway.aliases import Alias
from deferral.gateway.endpoints import Admin, error_handlers, routes
from deferral.gateway.experts_file import Expert
from deferral.gateway.proxying import KINDS, Proxy
from deferral.gateway.settings import Settings
from deferral.gateway.state import Gateway, Stamps
from deferral.routing.router import Router

__all__ = ["gateway"]


class _App(Starlette):
    """Requests to be passed through take the short way: a proxy answers all errors itself, and its path is a plain text."""

    def __init__(self, proxies: Mapping[str, Proxy], **options: Any) -> None:
        super().__init__(**options)
        self._proxies = proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        proxy = self._proxies.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        await (proxy or super().__call__)(scope, receive, send)


def gateway(
    router: Router,
    experts: Mapping[str, Expert],
    *,
    aliases: Mapping[str, Alias] | None = None,
    settings: Settings | None = None,
    read: Stamps | None = None,
) -> Starlette:
    """An OpenAI-compatible app around a router; `app.state.gateway` is its `Gateway`.

    `read` are the `stamps` of the settings' files from before they were read: what changes after that is read once more when the
    app starts.  ValueError where the experts are not those of the router, or an alias cannot be met.
    """
    state = Gateway(router, experts, settings or Settings(), aliases=aliases, read=read)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await state.start()
        remove = _on_hangup(state)
        try:
            await state.catch_up()
            yield
        finally:
            remove()
            await state.stop()

    proxies = {f"/v1{proxy.path}": proxy for proxy in (Proxy(state, kind) for kind in KINDS)}
    app = _App(
        proxies,
        routes=[
            *(Route(path, proxy, methods=["POST"]) for path, proxy in proxies.items()),
            *routes(state),
            *dashboard.pages(),
            Mount("/admin", Admin(state, [*admin.routes(state), *dashboard.routes(state)])),
        ],
        exception_handlers=error_handlers(),
        lifespan=lifespan,
    )
    # A redirect names the scheme, and would lead to http:// where a proxy in front of the gateway ends TLS.
    app.router.redirect_slashes = False
    app.state.gateway = state
    return app


def _on_hangup(state: Gateway) -> Callable[[], None]:
    """SIGHUP reloads, where there are signals and this is the thread that gets them.  -> what undoes it"""
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is None or threading.current_thread() is not threading.main_thread():
        return lambda: None
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task] = set()
    before = signal.getsignal(hangup)

    def begin() -> None:
        # A reload that has not begun yet will read the newest files: a third would read the same.
        if len(tasks) < 2:
            task = loop.create_task(state.reload_or_say())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    def remove() -> None:
        loop.remove_signal_handler(hangup)
        # Removing has set the default action, by which a hangup would end the process before all rows are written.
        signal.signal(hangup, before or signal.SIG_DFL)

    loop.add_signal_handler(hangup, begin)
    return remove
