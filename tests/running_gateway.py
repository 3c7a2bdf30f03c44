"""A gateway on loopback, in a thread of the test's own process, and a small router for it."""

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Mapping
from typing import Any

import uvicorn

from deferral.gateway.aliases import Alias
from deferral.gateway.app import gateway
from deferral.gateway.experts_file import Expert
from deferral.gateway.protocol import Protocol
from deferral.gateway.settings import Settings
from deferral.gateway.state import Gateway
from deferral.routing import Log, Outcome, Router
from deferral.routing.policies import Linear

__all__ = ["EASY", "HARD", "RunningGateway", "small_router"]

EASY, HARD = "add the two numbers", "prove the theorem about primes"


def small_router(**options: Any) -> Router:
    """What is easy both can answer, what is hard only the large one, which costs a hundred times as much."""
    rows = []
    for number in range(60):
        for query, small in ((f"{EASY} {number} and {number + 1}", 1.0), (f"{HARD} number {number} in full", 0.0)):
            rows.append(Outcome(query, "small", small, 0.0001, latency_s=0.1))
            rows.append(Outcome(query, "large", 1.0, 0.01, latency_s=0.8))
    return Router(**({"price_of_error": 0.05, "policies": (Linear,)} | options)).fit(Log(rows))


class RunningGateway:
    """The app behind uvicorn.  `port`, `url` (as the openai client takes it) and `state`, its `Gateway`."""

    def __init__(
        self, router: Router, experts: Mapping[str, Expert], settings: Settings, *, aliases: Mapping[str, Alias] | None = None
    ) -> None:
        self.app = gateway(router, experts, aliases=aliases, settings=settings)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._server = uvicorn.Server(uvicorn.Config(self.app, http=Protocol, log_config=None, access_log=False, lifespan="on"))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)

    @property
    def state(self) -> Gateway:
        return self.app.state.gateway

    def __enter__(self) -> "RunningGateway":
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the gateway did not start"
            threading.Event().wait(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._socket.close()
        assert not self._thread.is_alive(), "the gateway did not end"

    def call(self, coroutine: Any) -> Any:
        """Run something in the gateway's own event loop."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    def ask(
        self, method: str, path: str, body: Any = None, *, key: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one request; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            sent["authorization"] = f"Bearer {key}"
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, sent)
            reply = connection.getresponse()
            return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()
        finally:
            connection.close()

    def chat(self, text: str, *, key: str | None = None, **fields: Any) -> tuple[int, dict[str, str], Any]:
        """One chat completion; headers may be given as x_deferral_...; a JSON reply is read."""
        headers = {name: fields.pop(name) for name in list(fields) if name.startswith("x_deferral")}
        request = {"model": "auto", "messages": [{"role": "user", "content": text}]} | fields
        status, said, body = self.ask("POST", "/v1/chat/completions", request, key=key, **headers)
        return status, said, json.loads(body) if said["content-type"] == "application/json" else body

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.serve(sockets=[self._socket])

        asyncio.run(serve())
