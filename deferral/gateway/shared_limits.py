"""Rate limits and budgets that hold over several workers: parts of them are taken from the ledger, and counted here."""

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from sqlalchemy.exc import SQLAlchemyError

from deferral.gateway.accounts import Account, Hold, Refused, too_often, unreadable
from deferral.gateway.database import shared, wait_for
from deferral.gateway.keys import Key
from deferral.gateway.ledger import LIFE, SILENT, Ledger
from deferral.gateway.limits import Limits
from deferral.gateway.record import Record
from deferral.gateway.settings import Settings
from deferral.gateway.windows import Span

__all__ = ["SharedLimits", "limits_of"]

_log = logging.getLogger("deferral.gateway.limits")

_TELL = 1.0
# A refusal holds for a moment: who asks again and again must not reach the database each time.
_NO_BETTER = 0.25
_THREADS = 4
# A database that does not answer at all is one that fails.
_LONGEST = 10.0
_LONGEST_END = 5.0
# Sums of floats leave dust; and a request that is expected to cost nothing still wants a budget that is not spent.
_CRUMB = 1e-9
# A worker that is asked often takes as much of a rate as comes in so many minutes.
_MOST_AT_ONCE = 1 / 240


class _Part(Account):
    """An account of which this worker holds a part."""

    __slots__ = ("elsewhere", "good_until", "heard", "joins", "no_better_until", "refused", "since", "told", "used")

    def __init__(self, span: Span, free: float) -> None:
        super().__init__(span, 0.0, 0.0)
        self.free = free
        # Granted and spent as the ledger has them; what was spent before it took this worker for dead is left out there.
        self.told: tuple[float, float] | None = None
        self.since = 0.0
        # Others may have spent in this window what they told nobody: see Ledger.exchange.
        self.joins = False
        self.used, self.elsewhere, self.refused = False, 0.0, 0.0
        self.heard, self.good_until, self.no_better_until = -math.inf, 0.0, 0.0

    @property
    def left(self) -> float:
        """With what other workers have and have not spent."""
        return super().left + self.elsewhere

    def covers(self, dollars: float) -> bool:
        """Whether they can be set aside here and now."""
        return 0 < self.unspent >= dollars - _CRUMB and time.monotonic() < self.good_until


class _Rate:
    """What this worker may let through of a key's rate."""

    __slots__ = ("batch", "closed_for", "closed_until", "count", "id", "left", "until", "waiting")

    def __init__(self) -> None:
        self.id, self.count, self.left, self.until = "", 0, 0, 0.0
        self.waiting, self.batch, self.closed_for, self.closed_until = 0, 1, 0, 0.0


class SharedLimits(Limits):
    """Limits of several workers on one database.  A thread tells the ledger every second what was spent.

    Over all workers no window spends more than its budget, but for what requests in flight cost beyond what was expected of
    them; in any 60 seconds no more than `requests_per_minute` are admitted.  While the database fails a worker goes on with
    what it was granted, until the others may take it for dead, then refuses.
    """

    def __init__(self, record: Record, clock: Callable[[], float] = time.time) -> None:
        super().__init__(record, clock)
        self.ledger = Ledger(record.engine)
        self._rates: dict[str, _Rate] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        # One exchange of a key at a time: what was told earlier must not replace what was told later.
        self._exchanging: dict[str, threading.Lock] = {}
        self._pool = ThreadPoolExecutor(_THREADS, "limits")
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def load(self, keys: Iterable[Key]) -> None:
        """Begin to tell.  What a key has spent is asked of the ledger with its first request."""
        self._noted(keys)
        self._thread = threading.Thread(target=self._run, name="limits", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """What is not spent goes back to the other workers, if the database answers."""
        end = threading.Thread(target=self._give_back, name="limits end", daemon=True)
        end.start()
        wait_for(end, self.ledger.engine, _LONGEST_END)

    def _give_back(self) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        self._pool.shutdown()
        for name, account in list(self._accounts.items()):
            assert isinstance(account, _Part)
            if account.told is not None:
                try:
                    self.ledger.retire(name, account.span.start, account.spent - account.since)
                except SQLAlchemyError as error:
                    _log.warning("what this worker did not spend comes back later, the database fails: %s", type(error).__name__)
                    return

    async def admitted(self, key: Key) -> None:
        """`admit`; the event loop does not wait for the database."""
        self._check_record()
        account = self._accounts.get(key.id)
        if key.budget is not None and (account is None or self._clock() not in account.span):
            async with _in_time():
                await asyncio.get_running_loop().run_in_executor(self._pool, self._account, key)
        if key.requests_per_minute is None:
            return
        rate = self._rates.setdefault(key.id, _Rate())
        if self._pass(key, rate):
            return
        rate.waiting += 1
        try:
            async with _in_time(), self._turns.setdefault(f"rate {key.id}", asyncio.Lock()):
                while not self._pass(key, rate):
                    await asyncio.get_running_loop().run_in_executor(self._pool, self._refill, key, rate)
        finally:
            rate.waiting -= 1

    def admit(self, key: Key) -> None:
        """Count a request, and wait for the database where that must be."""
        self._check_record()
        if key.requests_per_minute is not None:
            rate = self._rates.setdefault(key.id, _Rate())
            while not self._pass(key, rate):
                self._refill(key, rate)

    async def held(self, key: Key, dollars: float) -> Hold:
        """`hold`; the event loop does not wait for the database."""
        account = self._accounts.get(key.id)
        here = isinstance(account, _Part) and self._clock() in account.span and account.covers(dollars)
        if key.budget is None or here:
            return self.hold(key, dollars)
        async with _in_time(), self._turns.setdefault(f"budget {key.id}", asyncio.Lock()):
            made = asyncio.get_running_loop().run_in_executor(self._pool, self.hold, key, dollars)
            try:
                return await asyncio.shield(made)
            except asyncio.CancelledError:
                # Its client left, or it took too long; the thread sets the dollars aside nevertheless.
                made.add_done_callback(_let_go)
                raise

    def hold(self, key: Key, dollars: float) -> Hold:
        """Set aside what a request is expected to cost, and wait for the database where another part must be taken."""
        if key.budget is None or not dollars >= 0:
            return super().hold(key, dollars)
        account = self._account(key)
        assert isinstance(account, _Part)
        with self._lock:
            if account.covers(dollars):
                account.used = True
                return self._set_aside(account, dollars)
        if dollars < account.refused or time.monotonic() >= account.no_better_until:
            made = self._exchange(key, account, dollars)
            if made is not None:
                account.used = True
                return made
            account.refused, account.no_better_until = dollars, time.monotonic() + _NO_BETTER
        refused = self._spent(key, account)
        if account.left >= max(dollars, _CRUMB):
            # Other workers have it; what they do not spend comes back.
            refused.retry_after = _TELL
        raise refused

    async def left_now(self, key: Key) -> float | None:
        """By the ledger, where nothing was heard of it in the last second; the event loop does not wait for it."""
        if key.budget is None:
            return None
        async with _in_time(), self._turns.setdefault(f"budget {key.id}", asyncio.Lock()):
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._heard, key)

    def tell(self) -> None:
        """Tell the ledger what was spent, and give back what nothing was set aside of since the last time.

        Also where requests came that it could not cover: else each worker would keep less than any of them needs.
        """
        for name, account in list(self._accounts.items()):
            assert isinstance(account, _Part)
            with self._lock:
                if not account.used:
                    account.granted = min(account.granted, account.spent + account.held)
                account.used = False
                now = account.granted - account.since, account.spent - account.since
                news = now != account.told if account.told is not None else now != (0.0, 0.0)
                # Whoever has something to spend, or spends it at present, must not be taken for dead.
                alive = account.flying or account.unspent > 0
            if (news or alive) and self._keys[name].budget is not None:
                self._exchange(self._keys[name], account)

    def _heard(self, key: Key) -> float:
        """What is left over all workers: one that spends nothing of a key has nothing to tell, and would hear nothing."""
        account = self._account(key)
        assert isinstance(account, _Part)
        if time.monotonic() - account.heard >= _TELL:
            self._exchange(key, account)
        return max(account.left, 0.0)

    def _open(self, key: Key, window: Span, *, fresh: bool) -> Account:
        assert key.budget is not None
        self._keys.setdefault(key.id, key)
        account = _Part(window, key.budget)
        if not fresh:
            account.joins = True
            self._exchange(key, account)
        return account

    def _move(self, key: Key, account: Account, window: Span, counted: float) -> None:
        assert isinstance(account, _Part)
        with self._exchanging.setdefault(key.id, threading.Lock()), self._lock:
            # What was spent until then is on record, and in flight is what is granted.
            account.span, account.since, account.told, account.joins = window, counted, None, True
            account.granted, account.no_better_until = account.spent + account.held, 0.0
        self._exchange(key, account)

    def _grant(self, key: Key, account: Account) -> None:
        assert isinstance(account, _Part)
        with self._exchanging.setdefault(key.id, threading.Lock()), self._lock:
            account.granted, account.no_better_until = min(account.granted, account.spent + account.held), 0.0
        self._exchange(key, account)

    def _exchange(self, key: Key, account: _Part, dollars: float | None = None) -> Hold | None:
        """Tell the ledger, and ask it for dollars to be set aside.  -> the hold, where that could be done"""
        key = self._latest(key)
        assert key.budget is not None
        wanted = 0.0 if dollars is None else max(dollars, _CRUMB)
        with self._exchanging.setdefault(key.id, threading.Lock()):
            while True:
                began = time.monotonic()
                with self._lock:
                    # What was spent beyond what was granted is granted by that.
                    account.granted = max(account.granted, account.spent + account.held)
                    granted, spent = account.granted - account.since, account.spent - account.since
                    unspent = account.unspent
                try:
                    part = self.ledger.exchange(
                        key.id,
                        account.span.start,
                        key.budget,
                        granted=granted,
                        spent=spent,
                        unspent=unspent,
                        wanted=wanted,
                        known=account.told is not None,
                        joins=account.joins,
                    )
                except SQLAlchemyError as error:
                    raise unreadable() from error
                with self._lock:
                    if part.lost and account.told is not None:
                        # What it told is kept for it there, and what it had not spent is another's.
                        account.since, account.told = account.since + account.told[1], None
                        account.granted = account.spent + account.held
                        continue
                    account.joins = False
                    account.free, account.elsewhere = part.free, part.elsewhere
                    account.granted += part.added
                    account.heard, account.good_until = began, began + SILENT / 2
                    if account.told is not None or granted or spent or part.added:
                        account.told = granted + part.added, spent
                    if dollars is None:
                        return None
                    if account.covers(dollars):
                        return self._set_aside(account, dollars)
                    if not part.added or time.monotonic() >= account.good_until:
                        return None
                    # Others have used up in the meantime what was added for this one.

    def _pass(self, key: Key, rate: _Rate) -> bool:
        now = time.monotonic()
        with self._lock:
            if now < rate.until and rate.left > 0:
                rate.left -= 1
                return True
        if now < rate.closed_until and rate.closed_for == key.requests_per_minute:
            raise too_often(key, rate.closed_until - now)
        return False

    def _refill(self, key: Key, rate: _Rate) -> None:
        assert key.requests_per_minute is not None
        with self._lock:
            unused, rate.left = rate.left, 0
            # Twice as many where the last were used up, half where they were not.
            batch = 2 * rate.count if not unused else rate.count // 2
            batch = max(1, rate.waiting, min(batch, int(key.requests_per_minute * _MOST_AT_ONCE)))
            earlier = (rate.id, rate.count - unused) if unused else None
        began = time.monotonic()
        try:
            got = self.ledger.admit(key.id, key.requests_per_minute, batch, earlier)
        except SQLAlchemyError as error:
            raise unreadable() from error
        with self._lock:
            rate.id, rate.count, rate.left, rate.until = got.id, got.count, got.count, began + LIFE
        if not got.count:
            rate.closed_for, rate.closed_until = key.requests_per_minute, time.monotonic() + got.wait

    def _run(self) -> None:
        failing = False
        while not self._end.wait(_TELL):
            try:
                self.tell()
                failing = False
            except Refused:
                if not failing:
                    _log.error("what was spent cannot be told to the other workers: the database fails")
                failing = True
            except Exception:
                _log.exception("what was spent cannot be told to the other workers")


@asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(_LONGEST):
            yield
    except TimeoutError:
        raise unreadable() from None


def limits_of(record: Record, settings: Settings) -> Limits:
    """For one process that has its database to itself, or for several that share one."""
    alone = settings.workers == 1 and not shared(record.engine)
    return Limits(record) if alone else SharedLimits(record)


def _let_go(made: "asyncio.Future[Hold]") -> None:
    if not made.cancelled() and made.exception() is None:
        made.result().settle(0.0)
