"""An OpenAI-compatible server on loopback that fails as asked: the name of the model in a request chooses how.

    with Upstream() as upstream:
        ...  # base URL upstream.url; models "good", "status-500", "stall" ...: see FAULTS
        upstream.behave("small", "status-500")  # from now on this model fails, until behave("small", "good")
        upstream.seen  # every request that came in, as it was sent

`python -m tests.faulty_upstream --port 8001` runs it as a process.  It writes HTTP by hand, because a server that keeps to the
protocol cannot break it.
"""

import argparse
import asyncio
import http
import json
import re
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

__all__ = ["CHUNKS", "FAULTS", "OVERSIZED", "Seen", "Upstream", "closed_port"]

CHUNKS = 40  # of a streamed answer, each one word
OVERSIZED = 80 << 20  # bytes of the reply that is too long
_TLS = b"\x16"  # what a client begins with that has been told https://
_BEFORE_THE_FAULT = 3  # chunks of a stream that fails on its way


@dataclass
class Seen:
    """A request as it came in.  `gone` once the client has left before the reply was whole."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    gone: bool = False

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def model(self) -> str:
        return self.json.get("model", "") if self.body else ""


@dataclass
class Reply:
    """The writing half of one connection, during one request."""

    writer: asyncio.StreamWriter
    seen: Seen
    forever_s: float
    chunk_s: float
    keep_alive: bool = True

    async def whole(self, status: int, body: bytes, *, content_type: str = "application/json", **headers: str) -> None:
        """A reply of known length."""
        self.head(status, content_type, content_length=str(len(body)), **headers)
        await self.write(body)

    def head(self, status: int, content_type: str, **headers: str) -> None:
        names = {"content-type": content_type, "x-upstream": "kept"}
        names |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in names.items())]
        self.writer.write("\r\n".join([*lines, "", ""]).encode())

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        await self.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def events(self, events: list[bytes], *, end: bool = True) -> None:
        """Server-sent events, chunked; without `end` the reply stays open."""
        self.head(200, "text/event-stream; charset=utf-8", transfer_encoding="chunked")
        named = self.seen.path.endswith("/responses")
        for event in events:
            kind = _TYPE.match(event) if named else None
            name = b"event: " + kind[1] + b"\n" if kind else b""
            await self.chunk(name + b"data: " + event + b"\n\n")
            if self.chunk_s:
                await asyncio.sleep(self.chunk_s)
        if end:
            await self.write(b"0\r\n\r\n")

    def reset(self) -> None:
        """End the connection with a RST: the peer sees a reset, not an end."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        self.keep_alive = False

    def close(self) -> None:
        self.keep_alive = False


_TYPE = re.compile(rb'\{"type": ?"([a-z_.]+)"')

Behaviour = Callable[[Reply], Coroutine[Any, Any, None]]


async def good(reply: Reply) -> None:
    """A whole answer: JSON, or 40 chunks and what the protocol asks for after them."""
    path = reply.seen.path.partition("?")[0]
    if path == "/v1/models":
        await reply.whole(200, _bytes({"object": "list", "data": [{"id": "good", "object": "model", "owned_by": "tests"}]}))
    elif path == "/v1/embeddings":
        inputs = reply.seen.json["input"]
        count = 1 if isinstance(inputs, str) else len(inputs)
        data = [{"object": "embedding", "index": row, "embedding": [0.25, -0.5, float(row)]} for row in range(count)]
        usage = {"prompt_tokens": 4 * count, "total_tokens": 4 * count}
        await reply.whole(200, _bytes({"object": "list", "data": data, "model": reply.seen.model, "usage": usage}))
    elif path not in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        await reply.whole(404, _error("no such path", "not_found_error"))
    elif reply.seen.json.get("stream"):
        await reply.events(_events(reply.seen))
    else:
        await reply.whole(200, _bytes(_answer(reply.seen)))


def _status(status: int, **headers: str) -> Behaviour:
    async def fail(reply: Reply) -> None:
        await reply.whole(status, _error(f"status {status}, as asked", "upstream_error"), **headers)

    return fail


async def not_able(reply: Reply) -> None:
    """A refusal of what another model might take."""
    error = {"message": "too long, as asked", "type": "invalid_request_error", "param": None, "code": "context_length_exceeded"}
    await reply.whole(400, _bytes({"error": error}))


async def slow_first_byte(reply: Reply) -> None:
    """A good answer, after a wait that is longer than anybody's patience."""
    await asyncio.sleep(reply.forever_s)
    await good(reply)


async def stall(reply: Reply) -> None:
    """Half of the answer, then nothing, on an open connection."""
    await _part(reply)
    await asyncio.sleep(reply.forever_s)


async def reset(reply: Reply) -> None:
    """Half of the answer, then a reset."""
    await _part(reply)
    # What was written must have left before the reset discards it.
    await asyncio.sleep(0.05)
    reply.reset()


async def reset_first(reply: Reply) -> None:
    """A reset before the first byte."""
    reply.reset()


async def malformed_json(reply: Reply) -> None:
    """A reply that is whole by its length, and no JSON; the fourth event of a stream is none either."""
    if _streams(reply):
        await reply.events([*_events(reply.seen)[:_BEFORE_THE_FAULT], b'{"choices": [', b"[DONE]"])
    else:
        await reply.whole(200, b'{"id": "chatcmpl-1", "choices": [')


async def truncated_sse(reply: Reply) -> None:
    """A stream that ends in good order, without an end of the answer; a JSON reply shorter than its declared length."""
    if _streams(reply):
        await reply.events(_events(reply.seen)[:_BEFORE_THE_FAULT])
    else:
        body = _bytes(_answer(reply.seen))
        reply.head(200, "application/json", content_length=str(len(body)))
        await reply.write(body[: len(body) // 2])
        reply.close()


async def cut_sse(reply: Reply) -> None:
    """A chunked stream whose connection is closed (no reset) before its last chunk."""
    await _part(reply)
    reply.close()


async def oversized(reply: Reply) -> None:
    """A reply of 80 MiB without a declared length."""
    reply.head(200, "text/event-stream" if _streams(reply) else "application/json", transfer_encoding="chunked")
    start = b'data: {"choices": [{"delta": {"content": "' if _streams(reply) else b'{"choices": [{"message": {"content": "'
    await reply.chunk(start)
    block = b"x" * (1 << 18)
    for _ in range(OVERSIZED // len(block)):
        await reply.chunk(block)
    await reply.chunk(b'"}}]}' + (b"\n\n" if _streams(reply) else b""))
    await reply.write(b"0\r\n\r\n")


async def wrong_content_type(reply: Reply) -> None:
    """A proxy's error page, with status 200."""
    await reply.whole(200, b"<html><body>It works!</body></html>", content_type="text/html")


async def empty(reply: Reply) -> None:
    """The connection is closed without a word."""
    reply.close()


async def not_http(reply: Reply) -> None:
    """Bytes that are no HTTP."""
    await reply.write(b"SSH-2.0-OpenSSH_9.2\r\n")
    reply.close()


FAULTS: dict[str, Behaviour] = {
    "status-400": _status(400),
    "status-401": _status(401),
    "status-429": _status(429, retry_after="1"),
    "status-500": _status(500),
    "status-503": _status(503),
    "not-able": not_able,
    "slow-first-byte": slow_first_byte,
    "stall": stall,
    "reset": reset,
    "reset-first": reset_first,
    "malformed-json": malformed_json,
    "truncated-sse": truncated_sse,
    "cut-sse": cut_sse,
    "oversized": oversized,
    "wrong-content-type": wrong_content_type,
    "empty": empty,
    "not-http": not_http,
}


class Upstream:
    """The server, in a thread of its own.  Safe to ask from any thread.

    `forever_s` is how long what never ends takes (tests cannot wait for ever), `first_byte_s` and `chunk_s` are waits of good
    answers.
    """

    def __init__(self, *, forever_s: float = 60.0, first_byte_s: float = 0.0, chunk_s: float = 0.0, port: int = 0) -> None:
        self.forever_s, self.first_byte_s, self.chunk_s = forever_s, first_byte_s, chunk_s
        self.seen: list[Seen] = []
        self.port = port
        self._behaviour: dict[str, str] = {}
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upstream", daemon=True)

    @property
    def url(self) -> str:
        """The base URL, as the openai client takes it."""
        return f"http://127.0.0.1:{self.port}/v1"

    def behave(self, model: str, fault: str) -> None:
        """From now on this model does that: a key of FAULTS, or "good"."""
        if fault != "good" and fault not in FAULTS:
            raise ValueError(f"fault: expected good or one of {', '.join(FAULTS)}, got {fault!r}")
        self._behaviour[model] = fault

    def asked(self, model: str) -> list[Seen]:
        """The requests for this model, oldest first."""
        return [seen for seen in self.seen if seen.model == model]

    def __enter__(self) -> "Upstream":
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        with closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        self._connections: set[asyncio.Task] = set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=64 << 20, backlog=2048)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with suppress(ConnectionError, asyncio.CancelledError, TimeoutError):
                while await self._one(reader, writer):
                    pass
        finally:
            self._connections.discard(task)
            writer.close()
            with suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            head = await reader.readexactly(1)
            if head == _TLS:
                writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
                return False
            head += await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        try:
            method, path, _ = first.split(" ")
        except ValueError:
            return False
        body = b"".join([part async for part in _body(reader, headers)])
        seen = Seen(method, path, headers, body)
        self.seen.append(seen)
        reply = Reply(writer, seen, self.forever_s, self.chunk_s)
        name = self._behaviour.get(seen.model, seen.model)
        if self.first_byte_s and name not in FAULTS:
            await asyncio.sleep(self.first_byte_s)
        answering = asyncio.create_task(FAULTS.get(name, good)(reply))
        leaving = asyncio.create_task(_left(reader))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                seen.gone = True
                return False
            answering.result()
            return reply.keep_alive
        except ConnectionError:
            seen.gone = True
            return False
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)


@contextmanager
def closed_port() -> Iterator[int]:
    """A port on which nobody listens, and nobody will while the block runs."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if "chunked" in headers.get("transfer-encoding", ""):
        while size := int(await reader.readline(), 16):
            yield await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
    elif length := int(headers.get("content-length", 0)):
        yield await reader.readexactly(length)


async def _left(reader: asyncio.StreamReader) -> None:
    # Looked at, not read: what comes may be the next request.
    while not (reader.at_eof() or reader.exception()):
        await asyncio.sleep(0.01)


async def _part(reply: Reply) -> None:
    if _streams(reply):
        await reply.events(_events(reply.seen)[:_BEFORE_THE_FAULT], end=False)
    else:
        body = _bytes(_answer(reply.seen))
        reply.head(200, "application/json", content_length=str(len(body)))
        await reply.write(body[: len(body) // 2])


def _streams(reply: Reply) -> bool:
    return bool(reply.seen.body and reply.seen.json.get("stream"))


def _answer(seen: Seen) -> dict[str, Any]:
    """The answer names the model and repeats the last message, or calls the first tool with it."""
    request = seen.json
    if seen.path.endswith("/responses"):
        return _response(request)
    text = _last_text(request)
    reply = {
        "id": f"chatcmpl-{request.get('seed', 1)}",
        "object": "chat.completion" if "messages" in request else "text_completion",
        "created": 1,
        "model": request.get("model", ""),
        "choices": [{"index": 0, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 7, "completion_tokens": CHUNKS, "total_tokens": 7 + CHUNKS},
        "x_unknown": {"kept": ["as", "it", "is"]},
    }
    choice: dict[str, Any] = reply["choices"][0]
    if "messages" not in request:
        choice["text"] = f"{request.get('model')}: {text}"
    elif tools := request.get("tools"):
        call = {"name": tools[0]["function"]["name"], "arguments": json.dumps({"text": text})}
        calls = [{"id": "call_1", "type": "function", "function": call}]
        choice["message"] = {"role": "assistant", "content": None, "tool_calls": calls}
        choice["finish_reason"] = "tool_calls"
    else:
        choice["message"] = {"role": "assistant", "content": f"{request.get('model')}: {text}"}
        if request.get("logprobs") and "mute" not in text:
            choice["logprobs"] = {"content": _logprobs(-0.01 if "surely" in text else -2.5, request.get("top_logprobs", 0))}
    return reply


def _logprobs(logprob: float, count: int) -> list[dict[str, Any]]:
    """What is sure of itself has every token near certain; a text with "mute" in it is told without."""
    others = [{"token": "o", "logprob": logprob - 3 * number} for number in range(count)]
    return [{"token": "t", "logprob": logprob, "bytes": None, "top_logprobs": others} for _ in range(6)]


def _response(request: dict[str, Any]) -> dict[str, Any]:
    """The same in the shape of the Responses API.  The usage is not the last usage in it by name alone."""
    model, text, tools = request.get("model", ""), _last_text(request), request.get("tools") or []
    said: dict[str, Any] = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
    said["content"] = [{"type": "output_text", "text": f"{model}: {text}", "annotations": []}]
    if tools:
        call = {"name": tools[0]["name"], "arguments": json.dumps({"text": text}), "call_id": "call_1"}
        said = {"type": "function_call", "id": "fc_1", "status": "completed", **call}
    details = {
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }
    return {
        "id": f"resp_{(request.get('metadata') or {}).get('seed', 1)}", "object": "response", "created_at": 1,
        "status": "completed", "error": None, "model": model, "output": [said], "tools": tools,
        "usage": {"input_tokens": 7, "output_tokens": CHUNKS, "total_tokens": 7 + CHUNKS, **details},
        "metadata": {"filler": "x" * 5000, **(request.get("metadata") or {})},
    }  # fmt: skip


def _response_events(request: dict[str, Any]) -> list[bytes]:
    whole = _response(request)
    begun = whole | {"status": "in_progress", "output": [], "usage": None}
    words = [f"word{number} " for number in range(CHUNKS)]
    events: list[dict[str, Any]] = [{"type": "response.created", "response": begun}]
    events += [{"type": "response.output_text.delta", "item_id": "msg_1", "delta": word} for word in words]
    events += [{"type": "response.output_text.done", "item_id": "msg_1", "text": "".join(words)}]
    if code := (request.get("metadata") or {}).get("fails"):
        events += [{"type": "response.failed", "response": whole | {"status": "failed", "error": {"code": code, "message": "x"}}}]
    else:
        events += [{"type": "response.completed", "response": whole}]
    return [_bytes(event | {"sequence_number": number}) for number, event in enumerate(events)]


def _events(seen: Seen) -> list[bytes]:
    request = seen.json
    if seen.path.endswith("/responses"):
        return _response_events(request)
    chat = "messages" in request
    head = {
        "id": f"chatcmpl-{request.get('seed', 1)}",
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": 1,
        "model": request.get("model", ""),
    }

    def event(delta: dict[str, Any], reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta} if chat else {"index": 0, "text": delta.get("content", "")}
        return _bytes(head | {"choices": [choice | {"finish_reason": reason}]} | more)

    if tools := request.get("tools"):
        whole = json.dumps({"text": _last_text(request)})
        function = {"name": tools[0]["function"]["name"], "arguments": ""}
        name = {"index": 0, "id": "call_1", "type": "function", "function": function}
        parts = [{"index": 0, "function": {"arguments": character}} for character in whole]
        events = [event({"tool_calls": [part]}) for part in (name, *parts)]
        events.append(event({}, "tool_calls"))
    else:
        events = [event({"content": f"word{number} "}) for number in range(CHUNKS)]
        events.append(event({}, "stop"))
    if (request.get("stream_options") or {}).get("include_usage"):
        usage = {"prompt_tokens": 7, "completion_tokens": CHUNKS, "total_tokens": 7 + CHUNKS}
        events.append(_bytes(head | {"choices": [], "usage": usage}))
    return [*events, b"[DONE]"]


def _last_text(request: dict[str, Any]) -> str:
    messages = request.get("messages", request.get("input"))
    if not isinstance(messages, list):
        return str(request.get("prompt", messages))
    content = messages[-1].get("content")
    if isinstance(content, list):
        return " ".join(part.get("text", "") for part in content)
    return str(content)


def _bytes(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _error(message: str, kind: str) -> bytes:
    return _bytes({"error": {"message": message, "type": kind, "param": None, "code": None}})


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--forever", type=float, default=60.0, help="seconds that what never ends takes")
    options = parser.parse_args()
    with Upstream(forever_s=options.forever, port=options.port) as upstream, suppress(KeyboardInterrupt):
        print(upstream.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
