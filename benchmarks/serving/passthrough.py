"""The least that a proxy in this language does: Starlette, uvicorn, aiohttp, and nothing else.

python -m benchmarks.serving.passthrough UPSTREAM PORT
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route


def app(upstream: str) -> Starlette:
    """Every chat completion goes to the upstream as it is, and its reply comes back as it is."""

    async def chat(request: Request) -> Response:
        body = await request.body()
        session: aiohttp.ClientSession = request.app.state.session
        reply = await session.post(f"{upstream}/chat/completions", data=body, headers={"content-type": "application/json"})
        if reply.content_type == "text/event-stream":
            return StreamingResponse(_chunks(reply), media_type="text/event-stream")
        async with reply:
            return Response(await reply.read(), reply.status, media_type=reply.content_type)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as app.state.session:
            yield

    return Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])], lifespan=lifespan)


async def _chunks(reply: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async with reply:
        async for chunk in reply.content.iter_any():
            yield chunk


if __name__ == "__main__":
    uvicorn.run(app(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", access_log=False, backlog=4096)
