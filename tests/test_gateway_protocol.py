"""Requests are bounded, and never upgraded; a client that reads nothing of its reply is let go."""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("uvicorn")

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from deferral.gateway.protocol import Protocol
from deferral.gateway.wire import header_map, read_body, send_whole


async def tell(scope: Any, receive: Any, send: Any) -> None:
    """An app that repeats what it was sent."""
    headers = header_map(scope)
    body = await read_body(receive, headers, 1 << 20)
    await send_whole(send, 200, [], json.dumps({"body": body.decode(), "headers": sorted(map(bytes.decode, headers))}).encode())


def said_to(app: Any, *packets: bytes, patience: float = 75) -> bytes:
    """What a server with this app says until it closes the connection."""

    async def run() -> bytes:
        loop, config = asyncio.get_running_loop(), Config(app, http=Protocol, ws="none", timeout_keep_alive=patience)  # type: ignore[arg-type]
        config.load()
        server = await loop.create_server(lambda: Protocol(config, ServerState(), {}, loop), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        said = b""
        try:
            for packet in packets:
                writer.write(packet)
                await asyncio.sleep(0.001)
            while part := await asyncio.wait_for(reader.read(1 << 16), 10):
                said += part
        except ConnectionError:
            # Whoever is refused is sent away before all is read.
            pass
        writer.close()
        server.close()
        return said

    return asyncio.run(run())


def replies_to(*packets: bytes, app: Any = tell, patience: float = 75) -> list[Any]:
    """What a server answers until it closes the connection: bodies, read where they are JSON."""
    said = said_to(app, *packets, patience=patience)
    bodies = [part.partition(b"\r\n\r\n")[2] for part in said.split(b"HTTP/1.1 ")[1:]]
    return [json.loads(body) if body.startswith(b"{") else body.decode() for body in bodies]


HEAD = b"POST / HTTP/1.1\r\nhost: x\r\n"
END = HEAD + b"connection: close\r\ncontent-length: 3\r\n\r\nend"
WISH = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEA\r\n"


@pytest.mark.parametrize(
    "packets",
    [
        [HEAD + WISH + b"content-length: 4\r\n\r\nbody" + END],
        [HEAD, WISH + b"content-length: 4\r\n", b"\r\n", b"bo", b"dy", END],
        [HEAD + WISH + b"transfer-encoding: chunked\r\n\r\n", b"4\r\nbody\r\n", b"0\r\n\r\n" + END],
    ],
)
def test_a_wish_to_be_upgraded_is_not_granted_and_its_request_answered(packets: list[bytes]) -> None:
    first, last = replies_to(*packets)
    assert first["body"] == "body"
    assert "http2-settings" in first["headers"]
    assert last["body"] == "end"


def test_chunks_that_come_together_are_one_part_of_a_body(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[bytes] = []
    monkeypatch.setattr(HttpToolsProtocol, "on_body", lambda self, body: parts.append(body))
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in b"a body of chunks") + b"0\r\n\r\n"
    replies_to(HEAD + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n" + chunks)
    assert parts == [b"a body of chunks"]


def test_what_cannot_be_served_is_refused_once() -> None:
    for data in (b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\n" + WISH + b"\r\n"):
        assert replies_to(data) == ["CONNECT is not served"]
    assert replies_to(b"no HTTP\r\n\r\n") == ["this is no HTTP/1.1"]


def test_trailers_are_no_headers() -> None:
    chunks = b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\nauthorization: Bearer x\r\n\r\n"
    [reply] = replies_to(HEAD + chunks)
    assert (reply["body"], "authorization" in reply["headers"]) == ("body", False)


@pytest.mark.parametrize("line", [b"a" * 20_000, b"x-a: b\r\n" * 2_000])
def test_a_head_without_an_end_is_sent_away(line: bytes) -> None:
    replies = replies_to(HEAD + b"x-long: ", *[line] * 20)
    assert replies in (["expected a head of at most 65536 bytes"], []), "a reset may overtake the reply"
    # Trailers come within a request, and get no answer of their own.
    replies = replies_to(HEAD + b"transfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\nx-long: ", *[line] * 20)
    assert replies == []


@pytest.mark.parametrize(("length", "refused"), [(1 << 16, False), ((1 << 16) + 1, True)])
def test_a_head_is_as_long_as_allowed_whatever_came_with_its_end(length: int, refused: bool) -> None:
    start, end = HEAD + b"x-long: ", b"\r\nconnection: close\r\ncontent-length: 3\r\n\r\n"
    head = start + b"a" * (length - len(start) - len(end)) + end
    for packets in (
        [head + b"end"],
        [head[:60_000], head[60_000:] + b"end"],
        [END.replace(b"close", b"keep-alive") + head + b"end"],
    ):
        replies = replies_to(*packets)
        long = [reply for reply in replies if isinstance(reply, str) or "x-long" in reply["headers"]]
        if refused:
            assert long in (["expected a head of at most 65536 bytes"], []), "a reset may overtake the reply"
        else:
            assert [reply["body"] for reply in long] == ["end"]


def test_who_says_nothing_is_sent_away() -> None:
    assert replies_to(patience=0) == []


def test_a_client_that_leaves_is_gone_for_the_request_under_way_though_more_had_been_sent() -> None:
    async def run() -> None:
        told, begun = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            begun.set()
            if (await receive())["type"] == "http.disconnect":
                told.set()

        loop, config = asyncio.get_running_loop(), Config(app, http=Protocol, ws="none")
        config.load()
        server = await loop.create_server(lambda: Protocol(config, ServerState(), {}, loop), "127.0.0.1", 0)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(2 * (HEAD + b"content-length: 0\r\n\r\n"))
        await begun.wait()
        writer.close()
        await asyncio.wait_for(told.wait(), 10)
        server.close()

    asyncio.run(run())


async def stream(scope: Any, receive: Any, send: Any) -> None:
    """An app that does not say how long its reply is."""
    await read_body(receive, header_map(scope), 1 << 20)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for part in (b"data: 1\n\n", b"", b"data: 2\n\n"):
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def test_a_stream_to_http_1_0_has_no_chunks_and_ends_with_the_connection() -> None:
    request = b"POST / HTTP/1.%d\r\nhost: x\r\nconnection: %b\r\ncontent-length: 0\r\n\r\n"
    for wish in (b"keep-alive", b"close"):
        head, _, body = said_to(stream, request % (0, wish)).partition(b"\r\n\r\n")
        assert (b"transfer-encoding" in head, b"content-length" in head, b"connection: close" in head) == (False, False, True)
        assert body == b"data: 1\n\ndata: 2\n\n"
    head, _, body = said_to(stream, request % (1, b"close")).partition(b"\r\n\r\n")
    assert (b"transfer-encoding: chunked" in head, body[:3]) == (True, b"9\r\n")
    # What has a length keeps it.
    head, _, body = said_to(tell, request % (0, b"close")).partition(b"\r\n\r\n")
    assert b"content-length: %d" % len(body) in head


def ending(app: Any, packet: bytes, later: bytes = b"") -> bytes:
    """What a server says that is to end once this packet is there."""

    async def run() -> bytes:
        loop, config = asyncio.get_running_loop(), Config(app, http=Protocol, ws="none")
        config.load()
        state = ServerState()
        server = await loop.create_server(lambda: Protocol(config, state, {}, loop), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(packet)
        while not any(connection._running or connection._partial for connection in state.connections):  # type: ignore[union-attr]
            await asyncio.sleep(0.001)
        for connection in list(state.connections):
            connection.shutdown()
        writer.write(later)
        said = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        server.close()
        return said

    return asyncio.run(run())


HALF = HEAD + b"content-length: 4\r\n\r\nha"


@pytest.mark.parametrize("before", [[], [END.replace(b"connection: close\r\n", b"")]])
def test_half_a_request_is_waited_for_a_while_and_not_as_long_once_the_server_is_to_end(
    monkeypatch: pytest.MonkeyPatch, before: list[bytes]
) -> None:
    both = b"".join([*before, HALF])
    for name, says, status, code in (
        ("_LONGEST_UPLOAD_S", lambda: said_to(tell, both), b"408 ", "request_timeout"),
        ("_LAST_UPLOAD_S", lambda: ending(tell, both), b"503 ", "server_ends"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"deferral.gateway.protocol.{name}", 0.02)
            *first, last = says().split(b"HTTP/1.1 ")[1:]
        assert [b'"end"' in reply for reply in first] == [True] * len(before)
        assert last.startswith(status)
        head, _, body = last.partition(b"\r\n\r\n")
        assert b"connection: close" in head
        assert b"content-length: %d" % len(body) in head
        assert json.loads(body)["error"]["code"] == code


def test_what_comes_in_time_is_answered_and_nothing_waits_for_it_any_more() -> None:
    assert b'"half"' in ending(tell, HALF, later=b"lf")
    timers: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await tell(scope, receive, send)
        timers.append(sum("_too_late" in repr(timer) for timer in asyncio.get_running_loop()._scheduled))  # type: ignore[attr-defined]

    rest = b"lf"
    assert said_to(app, HALF, rest, END).count(b"200 OK") == 2
    assert timers == [0, 0]


@pytest.mark.parametrize("cut", [1, 20])
def test_half_a_head_has_its_time_too_once_the_server_is_to_end(monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    answer = ending(tell, WHOLE[:cut], later=WHOLE[cut:])
    assert answer.count(b"200 OK") == 1
    assert b"connection: close" in answer
    monkeypatch.setattr("deferral.gateway.protocol._LAST_UPLOAD_S", 0.02)
    assert b"server_ends" in ending(tell, WHOLE[:cut])


WHOLE = END.replace(b"connection: close\r\n", b"")


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    """An app that does not wait for the body."""
    await send_whole(send, 401, [], json.dumps({"body": "refused"}).encode())


@pytest.mark.parametrize(
    ("app", "packets", "statuses"),
    [
        (tell, [HEAD], [b"408"]),
        (tell, [b"P"], [b"408"]),
        (tell, [WHOLE, b"P"], [b"200", b"408"]),
        (tell, [WHOLE + HEAD], [b"200", b"408"]),
        (refuse, [HALF], [b"401"]),
        (refuse, [HALF, b"l"], [b"401"]),
        (refuse, [HALF, b"lf", b"P"], [b"401", b"408"]),
    ],
)
def test_half_a_request_is_not_waited_for_without_an_end_whether_or_not_it_is_being_read(
    monkeypatch: pytest.MonkeyPatch, app: Any, packets: list[bytes], statuses: list[bytes]
) -> None:
    monkeypatch.setattr("deferral.gateway.protocol._LONGEST_UPLOAD_S", 0.05)
    assert [reply[:3] for reply in said_to(app, *packets).split(b"HTTP/1.1 ")[1:]] == statuses


def test_a_connection_is_idle_after_what_was_refused_is_whole_and_not_while_a_request_is_answered() -> None:
    assert [reply["body"] for reply in replies_to(HALF, b"lf", app=refuse, patience=0.05)] == ["refused"]
    assert [reply["body"] for reply in replies_to(HALF, b"lf" + END, app=refuse)] == ["refused"] * 2
    assert replies_to(b"\r\n", b"\r\n", patience=0.05) == [], "empty lines are no request"

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            await asyncio.sleep(0.2)
        await tell(scope, receive, send)

    late = HEAD.replace(b"/ ", b"/slow ", 1) + b"connection: close\r\ncontent-length: 3\r\n\r\nend"
    assert len(replies_to(WHOLE + late[:20], late[20:], app=slow, patience=0.05)) == 2


def test_requests_may_be_sent_ahead_of_their_replies_but_not_thousands() -> None:
    """One read may bring thousands, each of which would be a request in memory until its turn comes."""
    one = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    assert said_to(tell, 99 * one + END).count(b"HTTP/1.1 200") == 100
    assert said_to(tell, 5000 * one).count(b"HTTP/1.1 200") <= 101


async def much(scope: Any, receive: Any, send: Any) -> None:
    """An app whose reply is longer than any buffer takes."""
    await read_body(receive, header_map(scope), 1 << 20)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % MUCH)]})
    await send({"type": "http.response.body", "body": bytes(MUCH)})


async def much_by_parts(scope: Any, receive: Any, send: Any) -> None:
    """The same as a stream."""
    await read_body(receive, header_map(scope), 1 << 20)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(MUCH >> 16):
        await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


MUCH = 8 << 20


def taken(loop: Any, app: Any, packet: bytes, take: Callable[[socket.socket], Any], patience: float = 75) -> Any:
    """What a client makes of a reply, in a thread of its own, once the server has let go of it."""

    async def run() -> Any:
        loop, config = asyncio.get_running_loop(), Config(app, http=Protocol, ws="none", timeout_keep_alive=patience)  # type: ignore[arg-type]
        config.load()
        state = ServerState()
        server = await loop.create_server(lambda: Protocol(config, state, {}, loop), "127.0.0.1", 0)
        with socket.socket() as client:
            client.settimeout(10)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await loop.run_in_executor(None, client.connect, server.sockets[0].getsockname())
            client.sendall(packet)
            found = await loop.run_in_executor(None, take, client)
            async with asyncio.timeout(10):
                while state.connections or state.tasks:
                    await asyncio.sleep(0.01)
            server.close()
            return found

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(run())


def of_uvloop() -> asyncio.AbstractEventLoop:
    return pytest.importorskip("uvloop", reason="uvloop is not for this platform").new_event_loop()


LOOPS = [asyncio.new_event_loop, of_uvloop]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("app", "packet"), [(much, WHOLE), (much, END), (much_by_parts, WHOLE), (much_by_parts, END)])
def test_who_reads_nothing_of_a_reply_is_let_go(monkeypatch: pytest.MonkeyPatch, loop: Any, app: Any, packet: bytes) -> None:
    monkeypatch.setattr("deferral.gateway.gathering._LONGEST_PAUSE_S", 0.05)
    taken(loop, app, packet, lambda client: client.recv(1))


@pytest.mark.parametrize("loop", LOOPS)
def test_who_reads_slowly_gets_all_of_it_and_stays_no_longer(monkeypatch: pytest.MonkeyPatch, loop: Any) -> None:
    monkeypatch.setattr("deferral.gateway.gathering._LONGEST_PAUSE_S", 0.5)

    def slowly(client: socket.socket) -> int:
        size, pauses = 0, 0
        while part := client.recv(1 << 16):
            size += len(part)
            if size >> 20 > pauses:
                pauses += 1
                time.sleep(0.15)
        return size

    assert taken(loop, much, WHOLE, slowly, patience=0.1) > MUCH
