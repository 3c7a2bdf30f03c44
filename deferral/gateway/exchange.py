"""One request and its reply: what is known of it so far, and what of that its client and the record are told."""

import asyncio
import math
import os
import random
from time import perf_counter, time
from typing import TYPE_CHECKING

from starlette.types import Receive, Send

from deferral.gateway.answering import Call
from deferral.gateway.cascading import AskingFirst
from deferral.gateway.choice import Choice
from deferral.gateway.experts_file import AUTO, Expert
from deferral.gateway.keys import ANYONE, Key
from deferral.gateway.requests import Asked, Kind
from deferral.gateway.rows import ROUTED, DecisionRow
from deferral.gateway.state import Gateway
from deferral.gateway.usage import Usage

if TYPE_CHECKING:
    from deferral.gateway.tracing import Exchanged

__all__ = ["Exchange"]

# Of the name that a client gives a model, so much is kept: more would fill the memory while rows wait to be written.
_LONGEST_NAME = 200
_LONGEST_REASON = 1000
# Ids must differ, and need not be secret: a key may judge its own responses only.
_ids = random.Random(os.urandom(32))
if hasattr(os, "register_at_fork"):
    # Workers are copies of one process, and must not draw the same ids.
    os.register_at_fork(after_in_child=lambda: _ids.seed(os.urandom(32)))
_PRINTABLE = bytes(byte if 32 <= byte < 127 else 32 for byte in range(256))


class Exchange:
    """One request and its reply."""

    __slots__ = (
        "arrived", "asked", "asking", "began", "best", "choice", "first", "gateway", "gone", "id", "kept", "key", "kind", "named",
        "over", "receive", "send", "started", "status", "traced", "tries", "watcher",
    )  # fmt: skip

    def __init__(self, gateway: Gateway, kind: Kind, receive: Receive, send: Send) -> None:
        self.gateway, self.kind = gateway, kind
        self.receive, self.send = receive, send
        self.arrived, self.began = time(), perf_counter()
        # Rising with time, so that the record's index is appended to and not scattered.
        self.id = f"dfr-{int(1000 * self.arrived):012x}{_ids.getrandbits(48):012x}"
        self.key: Key = ANYONE
        self.asked: Asked | None = None
        self.named = ""
        self.choice: Choice | None = None
        self.first: AskingFirst | None = None
        self.best: Expert | None = None
        self.asking: Expert | None = None
        self.tries = 0
        # started: the client has the first bytes; over: it needs no watching any more; gone: it left.
        self.started = self.over = self.gone = self.kept = False
        self.status = 500
        self.watcher: asyncio.Task | None = None
        self.traced: Exchanged | None = None

    def asks(self, expert: Expert | None) -> None:
        """Who has the request now, and has not begun to answer it."""
        self.asking = expert
        self.tries += expert is not None

    @property
    def sent(self) -> float:
        """Dollars for what an expert has read of a request that its client did not wait for."""
        return self.asking.price(self.asked.tokens, 0) if self.asking and self.asked else 0.0

    def attempts(self, call: Call) -> int:
        """With those at a first answer that is not given."""
        return call.attempts + (self.first.attempts if self.first else 0)

    @property
    def extra(self) -> float:
        """Dollars for a first answer that is not given."""
        return self.first.row.extra if self.first and self.first.row else 0.0

    def headers(self, call: Call, choice: Choice) -> list[tuple[bytes, bytes]]:
        """What the client is told of the choice, and of who answered."""
        name = call.expert.name
        reason = choice.reason
        if name != choice.ranking[0]:
            reason = f"{name} in place of {choice.ranking[0]}, which failed; {reason}"
        headers = [
            (b"x-deferral-id", self.id.encode()),
            (b"x-deferral-expert", name.encode()),
            (b"x-deferral-expected-price", b"%.6g" % choice.price.get(name, math.nan)),
            (b"x-deferral-propensity", b"%.6g" % choice.propensity),
            (b"x-deferral-attempts", b"%d" % self.attempts(call)),
            # Headers are ASCII, and a line of them ends where the line ends.
            (b"x-deferral-reason", reason.replace("±", "+-").encode("ascii", "replace").translate(_PRINTABLE)),
        ]
        if name in choice.cost:
            headers.append((b"x-deferral-expected-cost", b"%.6g" % choice.cost[name]))
        if self.first and (row := self.first.row):
            headers += [(b"x-deferral-first", row.first.encode()), (b"x-deferral-cascade", row.ending.encode())]
        return headers

    def keep(
        self,
        expert: str,
        usage: Usage,
        outcome: str,
        *,
        price: float = 0.0,
        first_byte_s: float = math.nan,
        attempts: int = 0,
        refused: str = "",
    ) -> None:
        """Put it on record, once; a request that was refused before it was understood has nothing to keep."""
        asked, choice, gateway, cascade = self.asked, self.choice, self.gateway, self.first.row if self.first else None
        if asked is None or self.kept:
            return
        self.kept = True
        latency = perf_counter() - self.began
        # The same tokens at the best expert's price: what it would have written instead, nobody knows.
        best = self.best if expert and outcome == "ok" and self.status < 300 else None
        best_price = math.nan if best is None else best.price(usage.input_tokens, usage.output_tokens, usage.cached_tokens)
        row = DecisionRow(
            id=self.id,
            time=self.arrived,
            key=self.key.id,
            requested=ROUTED if asked.model in AUTO else asked.model[:_LONGEST_NAME],
            expert=expert,
            chosen=choice.ranking[0] if choice else "",
            reason="; ".join(filter(None, (choice.reason if choice else "", refused)))[:_LONGEST_REASON],
            propensity=choice.propensity if choice else math.nan,
            expected_quality=choice.quality if choice else {},
            expected_price=choice.price if choice else {},
            expected_cost=choice.cost if choice else {},
            price_of_error=choice.price_of_error if choice else math.nan,
            price=price + self.extra,
            estimated=usage.estimated,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            first_byte_s=first_byte_s,
            latency_s=latency,
            status=self.status,
            outcome=outcome,
            attempts=attempts,
            streamed=asked.stream,
            fast_path=choice.fast_path if choice else False,
            query=asked.query if gateway.settings.store_text else None,
            reply_id=usage.reply_id,
            best_price=best_price,
            cascade=cascade,
            kind=choice.kind if choice else "",
            draw=choice.draw if choice else math.nan,
        )
        if self.traced is None:
            gateway.record.add(row)
        else:
            self.traced.record(row, gateway.record.add)
        if cascade:
            compared = bool(expert) and not math.isnan(best_price)
            gateway.metrics.asked_first(cascade.first, cascade.ending, cascade.extra, compared=compared)
        if expert:
            gateway.metrics.answered(
                expert,
                outcome,
                price=price,
                best_price=best_price,
                input_tokens=usage.input_tokens,
                output_tokens=usage.output_tokens,
                first_byte_s=first_byte_s,
                latency_s=latency,
            )

    def watch(self, task: asyncio.Task) -> None:
        """Give the request up as soon as its client leaves."""
        self.watcher = asyncio.get_running_loop().create_task(self._left(task))

    async def _left(self, task: asyncio.Task) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        if not self.over:
            self.give_up(task)

    def give_up(self, task: asyncio.Task) -> None:
        """Nobody waits for it any more."""
        self.gone = True
        task.cancel()
