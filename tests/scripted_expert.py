"""An expert that replies what the test has written down, byte for byte."""

import asyncio
import gzip
import json
from collections.abc import Sequence

from deferral.gateway.answering import Answerers, Call, Outgoing, Unanswered
from deferral.gateway.experts_file import Expert
from deferral.gateway.metrics import Metrics
from deferral.gateway.requests import parse
from deferral.gateway.upstream import Upstream

__all__ = ["ANSWER", "CHAT", "CHUNK", "asked", "begun", "streamed", "whole"]

CHAT = "/chat/completions"
ANSWER = {"id": "c1", "choices": [{"message": {"content": "yes"}}], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}
CHUNK = b'{"choices": [{"delta": {"content": "the end is [DONE]"}}]}'


def whole(body: object = ANSWER, head: bytes = b"", status: int = 200, *, packed: bool = False) -> bytes:
    data = json.dumps(body).encode()
    data = gzip.compress(data) if packed else data
    begin = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n"
    return begin % (status, head, len(data)) + data


def streamed(*events: bytes) -> bytes:
    data = b"".join(b"data: " + event + b"\n\n" for event in events)
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(data) + data


def asked(
    connections: Sequence[Sequence[bytes]], times: int = 1, key: str | None = None, address: str = "http://127.0.0.1"
) -> tuple[list[Call | Exception], int]:
    """Calls of an expert, one after another, that may never be retried; one list of replies for each connection, b"" ends it.

    `address` is what it is called by, without its port.  -> what came of each, and how many requests the expert got
    """
    served: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for reply in waiting.pop(0):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            served.append(head)
            if not reply:
                break
            writer.write(reply)
        writer.close()

    async def run() -> list[Call | Exception]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        expert = Expert("small", f"{address}:{server.sockets[0].getsockname()[1]}/v1", key=key)
        upstream = Upstream(max_reply_bytes=1 << 20)
        answerers = Answerers(upstream, Metrics(), retry_share=0.0)
        answerers.update({"small": expert})
        body = b'{"model": "small", "messages": [], "stream": true}'
        found: list[Call | Exception] = []
        for _ in range(times):
            try:
                call = await answerers.answer([expert], Outgoing(CHAT, {}, parse("chat", body)), lambda _: body)
                call.end(True)
                found.append(call)
            except Unanswered as nobody:
                found.append(nobody)
        assert answerers.servers["small"].each[0].slots.taken == 0
        await upstream.close()
        server.close()
        return found

    waiting = list(connections)
    return asyncio.run(run()), len(served)


def begun(parts: Sequence[bytes]) -> bytes:
    """How the reply begins of an expert that streams these parts, one after the other, and then says nothing; or the Failure."""

    async def run() -> bytes:
        over, served = asyncio.Event(), asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
            for part in parts:
                writer.write(part)
                await asyncio.sleep(0.03)
            await over.wait()
            writer.close()
            served.set()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        expert = Expert("small", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        upstream = Upstream(max_reply_bytes=1 << 20)
        body = b'{"model": "small", "messages": [], "stream": true}'
        try:
            reply = await upstream.ask(expert, CHAT, body, {}, parse("chat", body))
            reply.close()
            return reply.body
        finally:
            over.set()
            await served.wait()
            await upstream.close()
            server.close()

    return asyncio.run(run())
