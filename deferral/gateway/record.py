"""The record: every decision and what became of it, and the feedback on it.

One thread writes, in batches.  `add` only appends to a queue; a row is in the database at most some 50 ms later.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy.exc import DataError as ValueRefused
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from deferral.gateway.batch import Feedback, write_batch
from deferral.gateway.database import (
    LOCK_S,
    STATEMENT_S,
    Replaced,
    connect,
    file_of,
    hang_up,
    reason_of,
    shared,
    still_there,
    wait_for,
)
from deferral.gateway.ledger import recorded, recorded_by_key
from deferral.gateway.numbers import is_number
from deferral.gateway.preparing import prepare
from deferral.gateway.retention import Retention
from deferral.gateway.rows import DecisionRow, plain

__all__ = ["WRITTEN_WITHIN", "Record"]

_log = logging.getLogger("deferral.gateway.record")

_BATCH = 200
_LONGEST_WAIT = 0.05
_MOST_WAITING = 10_000
_MOST_CHARACTERS = 32_000_000
_FIRST_RETRY, _LAST_RETRY = 0.05, 1.0
# Seconds after a reply, its row is there.
WRITTEN_WITHIN = 0.2
_FEEDBACK_TIMEOUT = 10.0
# Once a database that failed is back here, other processes have written what waited there by then.
_BACK_EVERYWHERE = 2.0
# A writer that is at one thing for so long has no answer from its database.
_LONGEST_SILENCE = 5.0


@dataclass(slots=True)
class _Passed:
    """What entered and what left, each counted by one thread."""

    entered: int = 0
    left: int = 0

    @property
    def inside(self) -> int:
        return self.entered - self.left


@dataclass(slots=True)
class _Trouble:
    """Why one kind of work fails at present; "" if it does not.  The log hears of it at most every half minute."""

    why: str = ""
    ended_at: float = -math.inf
    _told_at: float = -math.inf

    def begins(self, why: str, waiting: int) -> None:
        self.why = why
        if time.monotonic() - self._told_at > 30:
            self._told_at = time.monotonic()
            _log.error("the database fails and is tried again: %s; %d rows are waiting", why, waiting)

    def ends(self, message: str) -> None:
        if self.why:
            _log.warning("%s", message)
            self.why, self._told_at, self.ended_at = "", -math.inf, time.monotonic()


class Record:
    """Decisions and feedback in a database.  Between `start` and `close` a thread of its own writes them.

    `url` is an SQLAlchemy URL or the path of an SQLite file.  Queries are kept only with `store_text`, and then for
    `retention_days`; decisions and feedback for `record_days` (None: without an end).  Both hold for those of earlier runs too.
    """

    def __init__(
        self,
        url: str,
        *,
        store_text: bool = False,
        retention_days: float | None = None,
        record_days: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        for name, days in (("retention_days", retention_days), ("record_days", record_days)):
            if days is not None and not 0 < days < math.inf:
                raise ValueError(f"{name}: expected days above 0, got {days}")
        if store_text and retention_days is None:
            raise ValueError("store_text: expected retention_days (--retention-days) as well; text is not kept without an end")
        self.store_text, self.retention_days, self._clock = store_text, retention_days, clock
        self.engine = connect(url, lock_s=LOCK_S, statement_s=STATEMENT_S)
        # For what reads or deletes much.
        self.patient = connect(url, lock_s=LOCK_S) if shared(self.engine) else self.engine
        self._file: tuple[int, int] | None = None
        self._retention = Retention(self.patient, text_days=retention_days, record_days=record_days, clock=clock)
        self._waiting: deque[DecisionRow | Feedback] = deque()
        self._characters = _Passed()
        self._something, self._urgent = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._give_up_at = math.inf
        # Apart: neither hides the other, and each ends with its own success.
        self._writing, self._deleting, self._looking = _Trouble(), _Trouble(), _Trouble()
        # Since when the writer is at one thing; None: at nothing.
        self._since: float | None = None
        # Rows that could not be written, once it is closed.
        self.lost = 0
        self._clean_at = 0.0
        self._ended = False

    def start(self) -> None:
        """Open the database, create its tables and begin to write; DataError where that cannot be done."""
        prepare(self.engine)
        self._file = file_of(self.engine)
        self._thread = threading.Thread(target=self._guarded, name="record", daemon=True)
        self._thread.start()

    async def close(self, timeout: float = 10.0) -> None:
        """Write what is waiting, then end.  A database that fails for `timeout` seconds more is given up, and the log says so."""
        await asyncio.to_thread(self.stop, timeout)

    def stop(self, timeout: float = 10.0) -> None:
        """What `close` does, for callers without an event loop."""
        if self._thread is not None:
            self._give_up_at = time.monotonic() + timeout
            self._closing = True
            self._something.set()
            self._urgent.set()
            if not wait_for(self._thread, self.engine, timeout + LOCK_S + 1):
                _log.error("%d rows are lost: the database does not answer", len(self._waiting))
            self._thread, self.lost = None, len(self._waiting)
        for engine in (self.engine, self.patient):
            engine.dispose()
            # Nobody waits any more for what has no answer by now, but the process would not end before it.
            hang_up(engine)

    @property
    def trouble(self) -> str:
        """Why the database takes no rows at present, or gives none up whose time is over; "" if it does both."""
        return "the writer has ended" if self._ended else self._writing.why or self._looking.why or self._deleting.why

    def look(self) -> None:
        """Be troubled where the file is gone, or the database has not answered for some seconds; to be called now and then."""
        since, why = self._since, ""
        try:
            still_there(self.engine, self._file)
        except Replaced as error:
            why = str(error)
        if self._waiting and since is not None and (silent := time.monotonic() - since) > _LONGEST_SILENCE:
            why = why or f"it has not answered for {silent:.0f} s"
        if why:
            self._looking.begins(why, len(self._waiting))
        else:
            self._looking.ends("the database is there, and answers again")

    @property
    def waiting(self) -> int:
        """Rows that are not in the database yet."""
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """The database has failed for so long that no more rows can be kept in memory: take no request."""
        return self._ended or len(self._waiting) >= _MOST_WAITING or self._characters.inside >= _MOST_CHARACTERS

    def add(self, row: DecisionRow) -> None:
        """Keep a row.  Never blocks, and never drops one: callers look at `full` before they take a request."""
        self._append(row)

    async def feedback(self, response_id: str, quality: float, *, source_key: str) -> bool:
        """Keep how good a response was, in [0, 1]; later feedback of the same key replaces it.

        True when it is committed, also against power failure; False where the key (or anybody, if it is "") has no such
        response, by the gateway's id or by the reply's own.  TimeoutError where the database fails.
        """
        if not is_number(quality) or not 0 <= quality <= 1:
            raise ValueError(f"quality: expected a number in [0, 1], got {quality!r}")
        response_id = plain(response_id)
        if await self._ask(response_id, float(quality), source_key):
            return True
        # A reply can be faster than its row, which another process may be writing.
        await asyncio.sleep(WRITTEN_WITHIN)
        if await self._ask(response_id, float(quality), source_key):
            return True
        if time.monotonic() - self._writing.ended_at < _BACK_EVERYWHERE:
            raise TimeoutError("the database has only just come back, and not all rows may be there yet; send the feedback again")
        return False

    def spent(self, key: str, since: float) -> float:
        """Dollars that the requests of a key have cost that arrived at `since` or later, as far as they are written."""
        with self.engine.connect() as connection:
            return recorded(connection, key, since)

    def spent_by_key(self, keys: Sequence[str], since: float) -> dict[str, float]:
        """`spent` of many keys at once."""
        with self.engine.connect() as connection:
            return recorded_by_key(connection, keys, since)

    async def _ask(self, response_id: str, quality: float, key: str) -> bool:
        if self.full:
            raise TimeoutError("the feedback was not kept: the database fails, and too much is waiting for it")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()

        def resolve(known: bool) -> None:
            if not future.done():
                future.set_result(known)

        def answer(known: bool) -> None:
            with suppress(RuntimeError):  # The loop may be closed by now.
                loop.call_soon_threadsafe(resolve, known)

        self._append(Feedback(response_id, quality, key, self._clock(), answer))
        self._urgent.set()
        try:
            return await asyncio.wait_for(future, _FEEDBACK_TIMEOUT)
        except TimeoutError:
            raise TimeoutError(f"the feedback was not confirmed within {_FEEDBACK_TIMEOUT:.0f} s; send it again") from None

    def _append(self, item: DecisionRow | Feedback) -> None:
        if self._closing:
            _log.error("a row came after the record was closed, and is lost")
        self._characters.entered += _characters(item)
        self._waiting.append(item)
        if not self._something.is_set():
            self._something.set()
        if len(self._waiting) >= _BATCH and not self._urgent.is_set():
            self._urgent.set()

    def _guarded(self) -> None:
        try:
            self._run()
        except BaseException:
            _log.exception("the writer of the record has failed; no more requests are taken")
            self._ended = True

    def _run(self) -> None:
        while not (self._closing and not self._waiting):
            if self._something.wait(max(0.0, self._clean_at - time.monotonic())):
                self._urgent.wait(_LONGEST_WAIT)
            # Cleared before the queue is read: whatever comes later sets them again.
            self._something.clear()
            self._urgent.clear()
            if not self._write_some():
                _log.error("%d rows are lost: the database still fails at the end, %s", len(self._waiting), self._writing.why)
                return
            if self._waiting:
                self._something.set()
            if time.monotonic() >= self._clean_at:
                self._clean_at = time.monotonic() + self._clean()

    def _write_some(self) -> bool:
        """Write full batches and the first that is not; more will come to what is left.  False if that is given up."""
        while True:
            batch = [self._waiting[place] for place in range(min(_BATCH, len(self._waiting)))]
            if batch and not self._write(batch):
                return False
            # Only now: what is being written counts as waiting.
            for item in batch:
                self._waiting.popleft()
                self._characters.left += _characters(item)
            if len(self._waiting) < _BATCH:
                return True

    def _write(self, batch: Sequence[DecisionRow | Feedback]) -> bool:
        """Commit a batch, however long that takes; a row that cannot be written is left out, alone."""
        wait = _FIRST_RETRY
        while True:
            self._since = time.monotonic()
            try:
                answers = self._transaction(batch)
                self._since = None
                break
            except (SQLAlchemyError, MemoryError) as error:
                if not isinstance(error, IntegrityError | ValueRefused):
                    self._since = None
                    self._writing.begins(reason_of(error), len(self._waiting))
                    if time.monotonic() > self._give_up_at:
                        return False
                    time.sleep(wait)
                    wait = min(2 * wait, _LAST_RETRY)
                    continue
                fault: Exception = error
            except Exception as error:
                fault = error
            self._since = None
            if len(batch) > 1:
                half = len(batch) // 2
                return self._write(batch[:half]) and self._write(batch[half:])
            _log.error("a row is left out, it cannot be written (or is there already): %s", reason_of(fault))
            answers = [(item, False) for item in batch if isinstance(item, Feedback)]
            break
        self._writing.ends(f"the database takes rows again; {len(self._waiting)} are waiting")
        for item, known in answers:
            item.answer(known)
        return True

    def _transaction(self, batch: Sequence[DecisionRow | Feedback]) -> list[tuple[Feedback, bool]]:
        still_there(self.engine, self._file)
        return write_batch(self.engine, batch, text_days=self.retention_days if self.store_text else None)

    def _clean(self) -> float:
        """Delete some of what is over its time.  -> seconds until there is more to do"""
        self._since = time.monotonic()
        try:
            wait = self._retention.step()
        except SQLAlchemyError as error:
            self._deleting.begins(f"what is over its time cannot be deleted, {reason_of(error)}", len(self._waiting))
            return _LAST_RETRY
        finally:
            self._since = None
        self._deleting.ends("what is over its time can be deleted again")
        return wait


def _characters(item: DecisionRow | Feedback) -> int:
    return len(item.query) if isinstance(item, DecisionRow) and item.query is not None else 0
