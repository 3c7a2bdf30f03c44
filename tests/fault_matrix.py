"""What the gateway owes a client when an expert fails, fault by fault: written down before it was tried.

Two experts: `small` is chosen, and fails; `large` would answer.  The columns are a whole reply and a stream, asked of "auto"
and of "small" by its name; and all of it again by the Responses API.
"""

import http.client
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deferral.gateway.experts_file import Expert
from deferral.gateway.generation import generation
from deferral.gateway.settings import Settings
from tests.faulty_upstream import Upstream, closed_port
from tests.running_gateway import EASY, RunningGateway, small_router

__all__ = ["CASES", "CHAT_PATH", "MATRIX", "Bench", "Cell", "bench", "seen_by_the_client"]


@dataclass(frozen=True)
class Cell:
    """status and ending are what the client sees, the others what is on record; attempts at all experts together."""

    status: int
    expert: str  # who answered, "" if nobody did
    attempts: int
    outcome: str
    ending: str = "whole"  # "whole", "as it came" (bytes of the upstream, fault included), "error" (OpenAI-shaped, body or event)


_LARGE_AT_ONCE, _LARGE_AFTER_A_RETRY = Cell(200, "large", 2, "ok"), Cell(200, "large", 3, "ok")
_BROKEN_STREAM = Cell(200, "small", 1, "truncated", "error")
_CUT_STREAM = Cell(200, "small", 1, "truncated", "as it came")


def _nobody(status: int, attempts: int = 1) -> Cell:
    return Cell(status, "", attempts, "error", "error")


def _before_the_first_byte(status: int, *, retried: bool) -> tuple[Cell, Cell, Cell, Cell]:
    auto = _LARGE_AFTER_A_RETRY if retried else _LARGE_AT_ONCE
    named = _nobody(status, 2 if retried else 1)
    return auto, auto, named, named


_REFUSED_REQUEST = Cell(400, "small", 1, "error", "as it came")

# fault: auto, whole | auto, stream | by name, whole | by name, stream
MATRIX: dict[str, tuple[Cell, Cell, Cell, Cell]] = {
    # Tried again, then the next best.
    "status-500": _before_the_first_byte(502, retried=True),
    "status-503": _before_the_first_byte(502, retried=True),
    "refused": _before_the_first_byte(502, retried=True),
    "reset-first": _before_the_first_byte(502, retried=True),
    "empty": _before_the_first_byte(502, retried=True),
    # Not tried again: it would not help, or it would harm.
    "status-429": _before_the_first_byte(429, retried=False),
    "status-401": _before_the_first_byte(502, retried=False),
    "slow-first-byte": _before_the_first_byte(504, retried=False),
    "tls": _before_the_first_byte(502, retried=False),
    "not-http": _before_the_first_byte(502, retried=False),
    "wrong-content-type": _before_the_first_byte(502, retried=False),
    # The client's own fault.
    "status-400": (_REFUSED_REQUEST, _REFUSED_REQUEST, _REFUSED_REQUEST, _REFUSED_REQUEST),
    # The expert's own limit, which others need not have.
    "not-able": (_LARGE_AT_ONCE, _LARGE_AT_ONCE, _REFUSED_REQUEST, _REFUSED_REQUEST),
    # In the middle: a whole reply was not begun yet, a stream was.
    "stall": (_LARGE_AT_ONCE, _BROKEN_STREAM, _nobody(504), _BROKEN_STREAM),
    "reset": (_LARGE_AT_ONCE, _BROKEN_STREAM, _nobody(502), _BROKEN_STREAM),
    "cut-sse": (_LARGE_AT_ONCE, _BROKEN_STREAM, _nobody(502), _BROKEN_STREAM),
    # The bytes of a stream are the upstream's: what they say is not judged, only whether they end.
    "truncated-sse": (_LARGE_AT_ONCE, _CUT_STREAM, _nobody(502), _CUT_STREAM),
    "oversized": (_LARGE_AT_ONCE, _CUT_STREAM, _nobody(502), _CUT_STREAM),
    "malformed-json": (_LARGE_AT_ONCE, replace(_CUT_STREAM, outcome="ok"), _nobody(502), replace(_CUT_STREAM, outcome="ok")),
}
# A stream of responses has an end of its own, and whoever sends no JSON never comes to it.
RESPONSES = MATRIX | {"malformed-json": (_LARGE_AT_ONCE, _CUT_STREAM, _nobody(502), _CUT_STREAM)}
CHAT_PATH, RESPONSES_PATH = "/v1/chat/completions", "/v1/responses"
CASES = [
    (path, fault, model, stream, cells[2 * (model != "auto") + stream])
    for path, matrix in ((CHAT_PATH, MATRIX), (RESPONSES_PATH, RESPONSES))
    for fault, cells in matrix.items()
    for model in ("auto", "small")
    for stream in (False, True)
]


@dataclass
class Bench:
    """A gateway, its faulty upstream, and a port on which nobody listens."""

    gateway: RunningGateway
    upstream: Upstream
    closed: int
    database: Path

    def prepare(self, fault: str) -> None:
        """From now on `small` fails like this, and nothing is left of earlier failures."""
        base = {"refused": f"http://127.0.0.1:{self.closed}/v1", "tls": f"https://127.0.0.1:{self.upstream.port}/v1"}
        times = {"connect_s": 2.0, "first_byte_s": 0.8, "total_s": 20.0}
        experts = {
            "small": Expert("small", base.get(fault, self.upstream.url), model="small", **times),
            "large": Expert("large", self.upstream.url, model="large", **times),
        }
        self.upstream.behave("small", "good" if fault in base else fault)
        state = self.gateway.state
        state.answerers.servers.clear()
        state.answerers.update(experts)
        state.current = generation(state.current.router, experts, state.settings)

    def ask(self, path: str, model: str, stream: bool) -> tuple[int, dict[str, str], bytes, bool]:
        """One question.  -> status, headers, body, and whether the reply ended as HTTP says"""
        asked = {"input": EASY} if path == RESPONSES_PATH else {"messages": [{"role": "user", "content": EASY}]}
        request = {"model": model, **asked, "stream": stream}
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway.port, timeout=20)
        with closing(connection):
            connection.request("POST", path, json.dumps(request))
            reply = connection.getresponse()
            headers = {name.lower(): value for name, value in reply.getheaders()}
            try:
                return reply.status, headers, reply.read(), True
            except http.client.IncompleteRead as cut:
                return reply.status, headers, cut.partial, False

    def rows(self, decision: str) -> list[dict[str, Any]]:
        """What is on record under an id, once it is written."""
        until = time.monotonic() + 5
        while True:
            with closing(sqlite3.connect(self.database)) as connection:
                connection.row_factory = sqlite3.Row
                found = [dict(row) for row in connection.execute("select * from decisions where id = ?", [decision])]
            if found or time.monotonic() > until:
                return found
            time.sleep(0.02)

    def asked(self, model: str) -> int:
        """How often the upstream has been asked for a model."""
        return len(self.upstream.asked(model))


@contextmanager
def bench(folder: Path) -> Iterator[Bench]:
    """Everything that the matrix needs, running."""
    settings = Settings(database=str(folder / "gateway.db"), max_reply_bytes=1 << 20, retry_share=1.0)
    with Upstream(forever_s=2.5) as upstream, closed_port() as closed:
        experts = {name: Expert(name, upstream.url) for name in ("small", "large")}
        with RunningGateway(small_router(), experts, settings) as gateway:
            yield Bench(gateway, upstream, closed, folder / "gateway.db")


def seen_by_the_client(bench: Bench, path: str, fault: str, model: str, stream: bool) -> tuple[Cell, dict[str, Any]]:
    """Let it happen.  -> what happened, as a cell; details"""
    bench.prepare(fault)
    before = bench.asked("small")
    status, headers, body, ended = bench.ask(path, model, stream)
    rows = bench.rows(headers["x-deferral-id"])
    row = rows[0] if rows else {"expert": "no row", "attempts": -1, "outcome": "", "status": 0, "chosen": ""}
    cell = Cell(status, row["expert"], row["attempts"], row["outcome"], _ending(path, body, stream))
    details = {"rows": len(rows), "row": row, "headers": headers, "body": body, "ended": ended}
    return cell, details | {"asked_small": bench.asked("small") - before}


def _ending(path: str, body: bytes, stream: bool) -> str:
    if stream and path == RESPONSES_PATH and body.startswith((b"event: ", b"data: ")):
        last = body.rstrip().rpartition(b"\n\n")[2]
        if last.startswith(b"event: response.completed"):
            return "whole"
        return "error" if last.startswith(b"event: error") else "as it came"
    if stream and body.startswith(b"data: "):
        last = body.rstrip().rpartition(b"\n\n")[2].removeprefix(b"data: ")
        if last == b"[DONE]" and b'{"choices": [\n' not in body:
            return "whole"
        return "error" if last.startswith(b'{"error"') else "as it came"
    try:
        found = json.loads(body)
    except ValueError:
        return "as it came"
    if not found.get("error"):
        return "whole"
    return "as it came" if found["error"]["message"].endswith(", as asked") else "error"
