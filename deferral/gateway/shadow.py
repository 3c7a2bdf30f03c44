"""A candidate router beside the live one: it decides what has been answered, on a thread of its own, and nobody acts on it."""

import logging
import queue
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from deferral.gateway.choice import Choice
from deferral.gateway.database import durable, wait_for
from deferral.gateway.dialects import insert_rows, writing
from deferral.gateway.rows import expected_json
from deferral.gateway.schema import shadows
from deferral.routing import Needs, Router

__all__ = ["Shadow", "load_candidate", "load_shadow"]

_log = logging.getLogger("deferral.gateway.shadow")

_MOST_WAITING = 256
# Longer queries are not kept waiting: texts of megabytes would add up.
_MOST_CHARACTERS = 32_768
_AT_ONCE = 16
_LOOK = 1.0
_LONGEST_END = 5.0
# A pause of so many times what a batch took: requests want the interpreter.
_PAUSE = 1.0


@dataclass(frozen=True, slots=True)
class _Item:
    id: str
    time: float
    query: str
    allowed: frozenset[str]
    price_of_error: float


class Shadow:
    """Decides beside the live router, and keeps that.  What finds the queue full, or is very long, is dropped and counted."""

    def __init__(self, router: Router, mark: str, engine: Engine) -> None:
        self.router, self.mark, self._engine = router, mark, engine
        # What would have been drawn at random says nothing of the router.
        router.explore = 0.0
        self.scored = 0
        # Each is counted by one thread: by that of the requests, and by its own.
        self._turned_away = self._undecided = 0
        self._queue: queue.Queue[_Item | None] = queue.Queue(_MOST_WAITING)
        self._closing = False
        self._warned = False
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Requests that the candidate has not decided and will not."""
        return self._turned_away + self._undecided

    def offer(self, identity: str, time: float, query: str, choice: Choice) -> None:
        """A request that the live router has decided.  Never blocks, never fails."""
        if len(query) > _MOST_CHARACTERS:
            self._turned_away += 1
            return
        try:
            self._queue.put_nowait(_Item(identity, time, query, frozenset(choice.cost), choice.price_of_error))
        except queue.Full:
            self._turned_away += 1

    def close(self) -> None:
        """What is waiting is given up."""
        self._closing = True
        with suppress(queue.Full):
            self._queue.put_nowait(None)
        wait_for(self._thread, self._engine, _LONGEST_END)

    def _run(self) -> None:
        while not self._closing:
            batch = self._some()
            if not batch:
                continue
            began = time.monotonic()
            try:
                rows = [row for item in batch if (row := self._decided(item)) is not None]
                with self._engine.connect() as connection:
                    _write(connection, rows)
                self.scored += len(rows)
                self._undecided += len(batch) - len(rows)
            except Exception as error:
                # A candidate that cannot decide, or a database that is away, is nothing to those who ask.
                self._undecided += len(batch)
                if not self._warned:
                    self._warned = True
                    kind = type(error).__name__
                    # A database's message may quote what was to be written.
                    why = kind if isinstance(error, SQLAlchemyError) else f"{kind}: {error}"
                    _log.error("the candidate cannot be scored, and that is told this once: %s", why)
            time.sleep(_PAUSE * min(time.monotonic() - began, _LOOK))

    def _some(self) -> list[_Item]:
        batch: list[_Item | None] = []
        with suppress(queue.Empty):
            batch.append(self._queue.get(timeout=_LOOK))
            while len(batch) < _AT_ONCE:
                batch.append(self._queue.get_nowait())
        return [item for item in batch if item is not None]

    def _decided(self, item: _Item) -> tuple | None:
        """None where the candidate has none of the experts that were allowed."""
        allowed = item.allowed & set(self.router.experts)
        if not allowed:
            return None
        decision = self.router.route(item.query, price_of_error=item.price_of_error, needs=Needs.of(allow=allowed))
        expected = expected_json(decision.quality, decision.price, decision.cost)
        return item.id, item.time, self.mark, decision.expert, expected


def load_shadow(folder: Path, encoder: Path | None, engine: Engine) -> Shadow | None:
    """The candidate in a folder; None, and a line in the log, where there is none that can be read."""
    try:
        mark = blake2b((folder / "router.json").read_bytes(), digest_size=8).hexdigest()
        return Shadow(load_candidate(folder, encoder), mark, engine)
    except Exception as error:
        _log.error("no candidate is scored, %s cannot be read: %s", folder, error)
        return None


def load_candidate(folder: Path, encoder: Path | None) -> Router:
    """The candidate in a folder, which may have been fitted without the live one's encoder."""
    try:
        return Router.load(folder, encoder=encoder)
    except ValueError:
        if encoder is None:
            raise
        return Router.load(folder)


def _write(connection: Connection, rows: Sequence[tuple]) -> None:
    durable(connection, False)
    with writing(connection):
        insert_rows(connection, shadows, rows)
