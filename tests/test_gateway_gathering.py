"""Replies leave in as few system calls as they can, whole and in order."""

import asyncio

import pytest

pytest.importorskip("uvicorn")

from deferral.gateway.gathering import Gathering


class _Wire:
    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.sent.append(data)

    def writelines(self, parts: list[bytes]) -> None:
        self.write(b"".join(parts))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str) -> str:
        return name


@pytest.fixture
def wire() -> _Wire:
    return _Wire()


def test_head_and_body_are_one_write(wire):
    async def replies() -> None:
        transport = Gathering(wire, asyncio.get_running_loop())
        transport.write(b"head ")
        transport.write(b"body")
        assert wire.sent == []
        await asyncio.sleep(0)
        assert wire.sent == [b"head body"]
        transport.write(b"next")
        await asyncio.sleep(0)
        assert wire.sent == [b"head body", b"next"]

    asyncio.run(replies())


def test_what_was_written_leaves_before_the_end(wire):
    async def ends() -> None:
        transport = Gathering(wire, asyncio.get_running_loop())
        transport.write(b"last words")
        transport.close()
        assert (wire.sent, wire.closed) == ([b"last words"], True)
        transport.write(b"too late")
        await asyncio.sleep(0)
        assert wire.sent == [b"last words"]

    asyncio.run(ends())


def test_much_is_not_kept_back(wire):
    async def floods() -> None:
        transport = Gathering(wire, asyncio.get_running_loop())
        for _ in range(3):
            transport.write(bytes(40_000))
        # What the socket cannot take must be seen, so that whoever writes is held up.
        assert [len(part) for part in wire.sent] == [80_000]
        await asyncio.sleep(0)
        assert [len(part) for part in wire.sent] == [80_000, 40_000]

    asyncio.run(floods())


def test_the_rest_is_the_transports_own(wire):
    async def asks() -> None:
        assert Gathering(wire, asyncio.get_running_loop()).get_extra_info("peername") == "peername"

    asyncio.run(asks())
