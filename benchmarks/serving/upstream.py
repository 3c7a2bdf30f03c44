"""An upstream that costs next to nothing: python -m benchmarks.serving.upstream [--chunk-delay S]

Answers every POST with the same bytes: JSON, or 40 server-sent events where the body asks for a stream, one write each.
GET /streams tells how many streams are open, and how many were at most.
"""

import argparse
import asyncio
import json

import uvloop

CHUNKS = 40
_ANSWER = {
    "id": "chatcmpl-benchmark",
    "object": "chat.completion",
    "created": 1,
    "model": "upstream",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * CHUNKS}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 20, "completion_tokens": CHUNKS, "total_tokens": 20 + CHUNKS},
}


def _event(value: object) -> bytes:
    data = b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


def _chunk(delta: dict[str, str], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return _event(
        {"id": "chatcmpl-benchmark", "object": "chat.completion.chunk", "created": 1, "model": "upstream", "choices": [choice]}
    )


_BODY = json.dumps(_ANSWER).encode()
_JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_EVENTS = [_chunk({"content": "word "}, None) for _ in range(CHUNKS - 1)] + [_chunk({}, "stop")]
_END = _event(b"[DONE]") + b"0\r\n\r\n"


class _Connection(asyncio.Protocol):
    delay = 0.0
    open = most = 0

    def __init__(self) -> None:
        self.data = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, end, rest = self.data.partition(b"\r\n\r\n")
        if not end:
            return
        if head.startswith(b"GET"):
            body = json.dumps({"open": _Connection.open, "most": _Connection.most}).encode()
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            self.data = b""
            return
        place = head.lower().index(b"content-length:") + 15
        length = int(head[place:].split(b"\r\n", 1)[0])
        if len(rest) < length:
            return
        self.data = rest[length:]
        if b'"stream": true' in rest or b'"stream":true' in rest:
            self.transport.write(_HEAD)
            _Connection.open += 1
            _Connection.most = max(_Connection.most, _Connection.open)
            self._stream(0)
        else:
            self.transport.write(_JSON)

    def _stream(self, number: int) -> None:
        if self.transport.is_closing() or number == CHUNKS:
            _Connection.open -= 1
            if number == CHUNKS:
                self.transport.write(_END)
            return
        self.transport.write(_EVENTS[number])
        loop = asyncio.get_running_loop()
        if self.delay:
            loop.call_later(self.delay, self._stream, number + 1)
        else:
            loop.call_soon(self._stream, number + 1)


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Connection, "127.0.0.1", port, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    """Serve until ended; the first line printed is the port."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--chunk-delay", type=float, default=0.0, help="seconds between two events")
    options = parser.parse_args()
    _Connection.delay = options.chunk_delay
    uvloop.run(_serve(options.port))


if __name__ == "__main__":
    main()
