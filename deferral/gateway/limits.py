"""How often and for how much a key may ask: rate limits, and budgets over calendar windows."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Set
from contextlib import suppress
from datetime import UTC, datetime

from sqlalchemy.exc import SQLAlchemyError

from deferral.gateway.accounts import MINUTE, Account, Hold, LastMinute, Refused, too_often, unreadable
from deferral.gateway.keys import Key
from deferral.gateway.record import WRITTEN_WITHIN, Record
from deferral.gateway.windows import Span, span, time_zone, with_article

__all__ = ["Limits"]

_log = logging.getLogger("deferral.gateway.limits")

_PLENTY = 0.5
_LEAST_THRIFT = 1e-6
_NO_ZONE = "unknown_time_zone"


class Limits:
    """Rate limits and budgets of keys, for one process.  What was spent in a window is read from the record once, then counted.

    In every window spending stays within the budget but for what requests in flight cost beyond what was expected of them.
    """

    def __init__(self, record: Record, clock: Callable[[], float] = time.time) -> None:
        self._record, self._clock = record, clock
        self._lock, self._opening = threading.Lock(), threading.Lock()
        self._minutes: dict[str, LastMinute] = {}
        self._accounts: dict[str, Account] = {}
        # The latest window of each key: a clock that is set back, and then right again, comes to it a second time.
        self._furthest: dict[str, float] = {}
        # As they were read last: a request may still hold an earlier one.
        self._keys: dict[str, Key] = {}
        self._said: dict[str, str] = {}

    def load(self, keys: Iterable[Key]) -> None:
        """Read what these keys have spent, all of them at once; else that waits for their first request."""
        windows: dict[Span, list[Key]] = {}
        for key, window in self._noted(keys):
            windows.setdefault(window, []).append(key)
        try:
            for window, some in windows.items():
                spent = self._record.spent_by_key([key.id for key in some], window.start)
                for key in some:
                    assert key.budget is not None
                    self._opened(key, Account(window, spent[key.id], key.budget))
        except SQLAlchemyError as error:
            _log.warning("what keys have spent is read with their first requests, the database fails: %s", type(error).__name__)

    def _noted(self, keys: Iterable[Key]) -> list[tuple[Key, Span]]:
        """From now on these are the keys.  -> those with a budget, and its present window"""
        now, found = self._clock(), []
        for key in keys:
            self._keys[key.id] = key
            try:
                if key.budget is not None:
                    found.append((key, _window(key, now)))
            except Refused as refused:
                # Its requests are refused; those of the other keys are not.
                _log.error("the key %s (%s): %s", key.id, key.name, refused)
        return found

    def follow(self, keys: Iterable[Key]) -> None:
        """Take over what has changed in these keys, which are all that there are; to be called in one thread at a time.

        Another budget holds for what was spent already.  What was spent in another window is read from the record.
        """
        keys = list(keys)
        self._forget_all_but({key.id for key in keys})
        changed = [(self._keys.setdefault(key.id, key), key) for key in keys]
        changed = [(before, key) for before, key in changed if before != key]
        moving = {key.id: account for before, key in changed if (account := self._to_move(before, key)) is not None}
        counted = {name: account.spent for name, account in moving.items()}
        if moving:
            # What was spent until now is on record when that is read.
            time.sleep(WRITTEN_WITHIN)
        for before, key in changed:
            account, self._keys[key.id] = self._accounts.get(key.id), key
            try:
                if key.id not in moving:
                    self._take_over(before, key, account)
                elif self._record.trouble:
                    raise unreadable()
                elif account is moving[key.id]:
                    self._move(key, account, _window(key, self._clock()), counted[key.id])
                else:
                    # Its window has ended in the meantime, and another has begun: that one is moved the next time.
                    self._keys[key.id] = before
                self._said.pop(key.id, None)
            except Refused as error:
                self._keys[key.id] = before
                if self._said.get(key.id) != str(error):
                    _log.error("the key %s keeps its earlier limits for the moment: %s", key.id, error)
                self._said[key.id] = str(error)

    def _forget_all_but(self, ids: Set[str]) -> None:
        """Of keys that are revoked nothing is kept, but for those with a request under way."""
        with self._lock:
            for name in (self._keys.keys() | self._minutes.keys() | self._accounts.keys()) - ids:
                account = self._accounts.get(name)
                if account is None or not account.flying:
                    for kept in (self._keys, self._minutes, self._accounts, self._furthest, self._said):
                        kept.pop(name, None)

    def close(self) -> None:
        """No request comes any more."""

    async def admitted(self, key: Key) -> None:
        """`admit`, for callers in an event loop."""
        self.admit(key)

    async def held(self, key: Key, dollars: float) -> Hold:
        """`hold`, for callers in an event loop."""
        return self.hold(key, dollars)

    def admit(self, key: Key) -> None:
        """Count a request.  Refused: the key asks too often, or the record cannot take another row.

        In any 60 seconds at most `requests_per_minute` are admitted.
        """
        self._check_record()
        if key.requests_per_minute is None:
            return
        now = self._clock()
        with self._lock:
            minute = self._minutes.get(key.id)
            if minute is None:
                minute = self._minutes[key.id] = LastMinute()
            minute.move_to(now)
            if len(minute) >= key.requests_per_minute:
                raise too_often(key, minute.nth_last(key.requests_per_minute) + MINUTE - now)
            minute.append(now)

    def left(self, key: Key) -> float | None:
        """Dollars that are neither spent, nor set aside, nor held by another worker; None without a budget."""
        if key.budget is None:
            return None
        account = self._account(key)
        return max(account.unspent + account.free, 0.0)

    async def left_now(self, key: Key) -> float | None:
        """Dollars that are neither spent nor set aside, but for the last second or so of other workers."""
        return self.left(key)

    def known(self, keys: Iterable[Key]) -> list[tuple[Key, float]]:
        """Of those with a budget, what is spent or set aside in the present window, without a look at the database.

        A key that was not asked for in this window is left out.
        """
        now = self._clock()
        with self._lock:
            found = [(key, key.budget, self._accounts.get(key.id)) for key in keys if key.budget is not None]
            return [(key, budget - account.left) for key, budget, account in found if account is not None and now in account.span]

    def thrift(self, key: Key) -> float:
        """A factor in (0, 1] on the price of an error, so that a budget that runs low is stretched before it ends.

        With f the share of the budget that is left and g the share of the window: 1 where f >= min(g, 1/2), else
        f / min(g, 1/2).  Whoever spends slower than the clock, or has half left, is routed as usual.
        """
        left = self.left(key)
        if left is None or key.budget is None:
            return 1.0
        account = self._account(key)
        ahead = (account.span.end - self._clock()) / (account.span.end - account.span.start)
        wanted = min(max(ahead, 0.0), _PLENTY)
        share = left / key.budget
        return 1.0 if share >= wanted else max(share / wanted, _LEAST_THRIFT)

    def hold(self, key: Key, dollars: float) -> Hold:
        """Set aside what a request is expected to cost.  Refused where that is more than is left."""
        if not 0 <= dollars < math.inf:
            raise ValueError(f"dollars: expected a price, not negative, got {dollars}")
        if key.budget is None:
            return Hold(None, dollars, self._lock, lambda: self._accounts.get(key.id))
        account = self._account(key)
        with self._lock:
            if account.unspent <= 0 or dollars > account.unspent:
                raise self._spent(key, account)
            return self._set_aside(account, dollars)

    def _to_move(self, before: Key, key: Key) -> Account | None:
        """The account of a key whose window is another now, or that had no budget, so that nothing was counted."""
        if key.budget is None:
            return None
        if before.budget is None:
            # From here on it counts, and what came before is read once it is written.
            with suppress(Refused):
                self._account(key)
        elif (before.window, before.zone) == (key.window, key.zone):
            return None
        return self._accounts.get(key.id)

    def _take_over(self, before: Key, key: Key, account: Account | None) -> None:
        """What has changed where the window is the same."""
        # The account of a key without a budget stays: what is in flight is settled there, should it get one again.
        if account is not None and key.budget is not None and before.budget != key.budget:
            self._grant(key, account)

    def _move(self, key: Key, account: Account, window: Span, counted: float) -> None:
        """To another window; requests in flight stay set aside."""
        assert key.budget is not None
        spent = self._spent_since(key, window.start)
        with self._lock:
            account.span, account.granted = window, key.budget
            account.spent += spent - counted

    def _grant(self, key: Key, account: Account) -> None:
        """What it may spend by a budget that has changed."""
        assert key.budget is not None
        with self._lock:
            account.granted = key.budget

    def _set_aside(self, account: Account, dollars: float) -> Hold:
        """Under the lock."""
        account.held += dollars
        account.flying += 1
        return Hold(account, dollars, self._lock)

    def _check_record(self) -> None:
        if self._record.full:
            raise Refused(503, "record_unavailable", "requests are not taken while their record cannot be written", 1.0)

    def _spent_since(self, key: Key, start: float) -> float:
        try:
            return self._record.spent(key.id, start)
        except SQLAlchemyError as error:
            raise unreadable() from error

    def _spent(self, key: Key, account: Account) -> Refused:
        window = account.span
        again = datetime.fromtimestamp(window.end, UTC).strftime("%Y-%m-%d %H:%M UTC")
        budget = f"${key.budget:g} {with_article(key.window)}"
        message = f"the budget of {budget} does not cover this request; the next {key.window} begins {again}"
        return Refused(429, "insufficient_quota", message, max(window.end - self._clock(), 0.0))

    def _account(self, key: Key) -> Account:
        """The account of the present window."""
        now = self._clock()
        account = self._accounts.get(key.id)
        if account is not None and now in account.span:
            return account
        # Two that open it would each count from nothing.
        with self._opening:
            account = self._accounts.get(key.id)
            if account is None or now not in account.span:
                key = self._latest(key)
                window = _window(key, now)
                # A window that has begun while this process was counting holds nothing yet.
                new = window.start > self._furthest.get(key.id, -math.inf)
                account = self._open(key, window, fresh=new and account is not None and account.span.end == window.start)
                self._opened(key, account)
            return account

    def _opened(self, key: Key, account: Account) -> None:
        with self._lock:
            self._accounts[key.id] = account
            self._furthest[key.id] = max(account.span.start, self._furthest.get(key.id, -math.inf))

    def _latest(self, key: Key) -> Key:
        """The key as it is now, where it still has a budget; a request may have begun before it was changed."""
        latest = self._keys.get(key.id, key)
        return key if latest.budget is None else latest

    def _open(self, key: Key, window: Span, *, fresh: bool) -> Account:
        assert key.budget is not None
        return Account(window, 0.0 if fresh else self._spent_since(key, window.start), key.budget)


def _window(key: Key, now: float) -> Span:
    try:
        return span(key.window, now, time_zone(key.zone))
    except ValueError as error:
        raise Refused(503, _NO_ZONE, f"the budget of this key cannot be kept: {error}") from None
