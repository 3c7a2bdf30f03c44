"""Connections to experts: who waits is told of them, none is kept for ever, and proxies are those of the environment."""

from collections.abc import Callable
from contextvars import ContextVar
from time import monotonic
from typing import Any
from urllib.request import getproxies, proxy_bypass
from weakref import WeakKeyDictionary

import aiohttp
from yarl import URL

from deferral.gateway.settings import is_loopback

__all__ = ["connected", "opened", "proxy_of", "session"]

_LONGEST_HEADER = 1 << 16
# The longest life of a connection: when a name moves to another address, the old one gets requests for as long.
_LONGEST_KEPT_S = 300.0
# For each request: whether a connection was opened for it, and whom to tell once it has one.
opened: ContextVar[bool] = ContextVar("opened")
connected: ContextVar[Callable[[], None]] = ContextVar("connected", default=lambda: None)


def session(**connections: Any) -> aiohttp.ClientSession:
    """For the life of an app, to be made in its event loop."""
    # How many requests an expert gets at a time is decided before this.
    connector = _Connector(limit=0, ttl_dns_cache=30, **connections)
    return aiohttp.ClientSession(
        connector=connector, cookie_jar=aiohttp.DummyCookieJar(), max_line_size=_LONGEST_HEADER, max_field_size=_LONGEST_HEADER
    )


def proxy_of(url: URL) -> str | None:
    """What HTTPS_PROXY, HTTP_PROXY and NO_PROXY say of a URL; on this machine no proxy is ever asked.

    aiohttp would look them up anew for each request, in a thread.
    """
    if url.host is None or is_loopback(url.host) or proxy_bypass(url.host_port_subcomponent or url.host):
        return None
    return getproxies().get(url.scheme)


class _Connector(aiohttp.TCPConnector):
    """Tells whoever asks that the request has a connection, and whether it was opened for it.

    A connection that is old ends with the request that it has: a name may lead to another address by now, and would never be
    looked up again while requests come.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._since: WeakKeyDictionary[Any, float] = WeakKeyDictionary()

    async def connect(self, *request: Any, **options: Any) -> Any:
        connection = await super().connect(*request, **options)
        if (protocol := connection.protocol) is not None and monotonic() - self._since[protocol] > _LONGEST_KEPT_S:
            protocol.force_close()
        connected.get()()
        return connection

    async def _create_connection(self, *request: Any) -> Any:
        opened.set(True)
        protocol = await super()._create_connection(*request)
        self._since[protocol] = monotonic()
        return protocol
