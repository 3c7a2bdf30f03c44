"""API keys: who may ask, whom, how often and for how much."""

import base64
import hmac
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from deferral.gateway.database import LOCK_S, STATEMENT_S, connect, file_of, reason_of, still_there, wait_for
from deferral.gateway.dialects import clock, writing
from deferral.gateway.numbers import is_number, is_whole
from deferral.gateway.preparing import prepare
from deferral.gateway.rows import plain
from deferral.gateway.schema import keys as table
from deferral.gateway.windows import WINDOWS, WindowName, time_zone

__all__ = ["ANYONE", "PREFIX", "SETTINGS", "Issued", "Key", "Keys", "UnknownKey", "key_of"]

_log = logging.getLogger("deferral.gateway.keys")

_REFRESH = 2.0
_LONGEST_END = 5.0
_MARK = "dk"
PREFIX = f"{_MARK}-"
# What may be changed of a key.
SETTINGS = ("name", "experts", "requests_per_minute", "budget", "window", "zone", "ends")
_HOUR = 3600.0
_LONGEST_GRACE = 8760.0
_YEAR_9999 = 253_370_764_800.0


@dataclass(frozen=True)
class Key:
    """What the holder of a key may do; None is no restriction.

    `budget` in dollars for each calendar `window` in the time zone `zone`.  A key with `admin` is for the admin endpoints.  It is
    valid before `ends`, in seconds since 1970.
    """

    id: str
    name: str
    experts: frozenset[str] | None = None
    requests_per_minute: int | None = None
    budget: float | None = None
    window: WindowName = "month"
    zone: str = "UTC"
    admin: bool = False
    ends: float | None = None

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.ends is not None and time.time() >= self.ends

    def as_json(self) -> dict[str, Any]:
        """What the endpoints say of it."""
        return {
            "id": self.id,
            "name": self.name,
            "experts": None if self.experts is None else sorted(self.experts),
            "requests_per_minute": self.requests_per_minute,
            "budget": self.budget,
            "window": self.window,
            "zone": self.zone,
            "ends": self.ends,
            "admin": self.admin,
        }


ANYONE = Key("", "anyone")


@dataclass(frozen=True)
class Issued:
    """A key on the list: when it was made and revoked, until when the token before its last is valid, in seconds since 1970."""

    key: Key
    created: float
    revoked: float | None
    former_until: float | None = None

    @property
    def prefix(self) -> str:
        """The part of the token that is no secret."""
        return f"{PREFIX}{self.key.id}"


class UnknownKey(ValueError):
    """No key that is valid is meant, or more than one."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What a token must hash to; `former` is that of the token before, until a time in seconds since 1970."""

    hash: bytes
    key: Key | None
    former: bytes = b""
    former_until: float = 0.0


_NOBODY = _Known(b"", None)


class Keys:
    """The keys of a database, looked up in memory; a thread between `start` and `close` refreshes them every two seconds.

    A token is dk-ID-SECRET with a secret of 256 random bits; its SHA-256 is all that is stored.  Against guessing that many
    bits a slow hash adds nothing.  With `serving` no statement may take long, see `connect`.
    """

    def __init__(self, url: str, *, serving: bool = False) -> None:
        self.engine = connect(url, lock_s=LOCK_S, statement_s=STATEMENT_S) if serving else connect(url)
        self._file: tuple[int, int] | None = None
        self._found: dict[str, _Known] = {}
        self._told: Callable[[Iterable[Key]], None] = lambda keys: None
        self._reading = threading.Lock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Open the database, read the keys and keep reading them; DataError where that cannot be done."""
        prepare(self.engine)
        self._file = file_of(self.engine)
        self.refresh()
        self._end.clear()
        self._thread = threading.Thread(target=self._run, name="keys", daemon=True)
        self._thread.start()

    def tell(self, whom: Callable[[Iterable[Key]], None]) -> None:
        """Call it with all keys whenever they have been read again; in the thread that read them."""
        self._told = whom

    def close(self) -> None:
        """Stop refreshing."""
        self._end.set()
        if self._thread is not None:
            wait_for(self._thread, self.engine, _LONGEST_END)
            self._thread = None
        self.engine.dispose()

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[Key]:
        return iter([known.key for known in self._found.values() if known.key is not None])

    def find(self, token: str) -> Key | None:
        """The key of a token, None if there is none, or it is revoked or has ended."""
        digest = _digest(token)
        parts = token.split("-", 2)
        known = self._found.get(parts[1] if len(parts) == 3 else "", _NOBODY)
        right = hmac.compare_digest(digest, known.hash)
        if not right and known.former:
            right = hmac.compare_digest(digest, known.former) and time.time() < known.former_until
        if not right or known.key is None or known.key.over:
            return None
        return known.key

    def create(
        self,
        name: str,
        *,
        experts: Collection[str] | None = None,
        requests_per_minute: int | None = None,
        budget: float | None = None,
        window: WindowName = "month",
        zone: str = "UTC",
        ends: float | None = None,
        admin: bool = False,
    ) -> tuple[str, Key]:
        """A new key and its token, which is shown this once and stored nowhere."""
        _check(name, experts, requests_per_minute, budget, window, ends=ends)
        time_zone(zone)
        # Base32 has no sign that splits a token or a double click.
        identity = base64.b32encode(secrets.token_bytes(5)).decode().lower()
        token = _token(identity)
        allowed = None if experts is None else frozenset(experts)
        budget = None if budget is None else float(budget)
        key = Key(identity, name, allowed, requests_per_minute, budget, window, zone, admin, ends)
        row = {
            "id": identity,
            "hash": _digest(token).hex(),
            **_columns(key),
            "admin": bool(admin),
            "created": time.time(),
        }
        with self.engine.begin() as connection:
            connection.execute(insert(table).values(**row))
        self._refresh_if_possible()
        return token, key

    def change(self, key: str, **settings: Any) -> tuple[Key, Key]:
        """Give a key other settings, those of `create` but for `admin`; it stays the same key, its spending and its record too.

        `key` is its id, the prefix that is shown, or a name that no other valid key has; UnknownKey where it is none of these.
        None lifts a restriction.  ValueError where a setting makes no sense; then nothing has changed.  -> before, after
        """
        if unknown := [name for name in settings if name not in SETTINGS]:
            raise ValueError(f"{unknown[0]}: not to be changed; expected one of {', '.join(SETTINGS)}")
        if not settings:
            raise ValueError(f"nothing to change; expected one of {', '.join(SETTINGS)}")
        with self.engine.connect() as connection, writing(connection):
            before = key_of(_named(connection, key))
            wanted = {name: getattr(before, name) for name in SETTINGS} | settings
            # That an end is over is no reason to refuse other settings.
            checked = (wanted[name] for name in ("name", "experts", "requests_per_minute", "budget", "window"))
            _check(*checked, ends=settings.get("ends"))
            if "zone" in settings or settings.get("budget") is not None:
                # One that this machine does not know may be lifted here with its budget.
                time_zone(wanted["zone"])
            if wanted["experts"] is not None:
                wanted["experts"] = frozenset(wanted["experts"])
            if wanted["budget"] is not None:
                wanted["budget"] = float(wanted["budget"])
            elif "budget" not in settings and (of_budget := sorted({"window", "zone"} & settings.keys())):
                raise ValueError(f"{of_budget[0]}: this key has no budget to begin anew; give it one as well")
            after = replace(before, **wanted)
            connection.execute(update(table).where(table.c.id == before.id).values(**_columns(after)))
        self.refresh()
        return before, after

    def rotate(self, key: str, *, grace_hours: float = 0.0) -> tuple[str, Issued]:
        """Another token for a key, named as in `change`; it is shown this once.  -> it, and the key

        The token that it had ends now, or after `grace_hours`; one from before that ends now.
        """
        if not is_number(grace_hours) or not 0 <= grace_hours <= _LONGEST_GRACE:
            raise ValueError(f"grace_hours: expected hours from 0 to {_LONGEST_GRACE:.0f}, got {grace_hours!r}")
        with self.engine.connect() as connection, writing(connection):
            row = _named(connection, key)
            token = _token(row.id)
            former, until = (row.hash, clock(connection) + _HOUR * grace_hours) if grace_hours else (None, None)
            values = {"hash": _digest(token).hex(), "former": former, "former_until": until}
            connection.execute(update(table).where(table.c.id == row.id).values(**values))
        self._refresh_if_possible()
        return token, Issued(key_of(row), row.created, None, until)

    def revoke(self, id: str) -> bool:
        """End a key, by its id or the prefix that is shown; False where there is none that is valid."""
        identity = plain(id.removeprefix(PREFIX))
        valid = (table.c.id == identity) & table.c.revoked.is_(None)
        with self.engine.begin() as connection:
            changed = connection.execute(update(table).where(valid).values(revoked=time.time())).rowcount
        self.refresh()
        return changed > 0

    def list(self) -> "list[Issued]":
        """All keys that ever were, oldest first."""
        with self.engine.connect() as connection:
            rows = connection.execute(select(table).order_by(table.c.created, table.c.id)).all()
        return [Issued(key_of(row), row.created, row.revoked, row.former_until) for row in rows]

    def refresh(self) -> None:
        """Read the keys again."""
        # One at a time: what was read earlier must not replace what was read later.
        with self._reading, self.engine.connect() as connection:
            rows = connection.execute(select(table).where(table.c.revoked.is_(None))).all()
            self._found = {row.id: _known(row) for row in rows}
            self._told(list(self))

    def _refresh_if_possible(self) -> None:
        """After a token was made: it is valid already, and an error now would lose the only copy of it."""
        with suppress(SQLAlchemyError):
            self.refresh()

    def _run(self) -> None:
        failing = False
        while not self._end.wait(_REFRESH):
            try:
                still_there(self.engine, self._file)
                self.refresh()
                failing = False
            except (SQLAlchemyError, ValueError) as error:
                # The keys of before stay valid: a database that is away for a moment must not lock everybody out.
                if not failing:
                    _log.error("the keys cannot be read again: %s", reason_of(error))
                failing = True


def _digest(token: str) -> bytes:
    return sha256(token.encode("utf-8", "surrogatepass")).digest()


def _token(id: str) -> str:
    return f"{_MARK}-{id}-{secrets.token_urlsafe(32)}"


def _named(connection: Connection, key: str) -> Row:
    """The row of a key by its id, its prefix or its name, locked; UnknownKey says why there is none."""
    identity = key.removeprefix(PREFIX)
    named = (table.c.id == identity) | (table.c.name == key)
    # A database may refuse to look for a NUL.
    rows = connection.execute(select(table).where(named).with_for_update()).all() if key.isprintable() else []
    left = [row for row in rows if row.revoked is None]
    found = [row for row in rows if row.id == identity] or [row for row in left if not key_of(row).over] or left or rows
    if not found:
        raise UnknownKey(f"{key[:200]!r} is neither the id nor the name of a key")
    if found[0].revoked is not None:
        raise UnknownKey(f"the key {found[0].id} ({found[0].name}) is revoked, which is for good; make another")
    if len(found) > 1:
        raise UnknownKey(f"{key!r} is the name of {len(found)} keys; say which by its id, {' or '.join(row.id for row in found)}")
    return found[0]


def _columns(key: Key) -> dict[str, Any]:
    settings = {name: getattr(key, name) for name in SETTINGS}
    return settings | {"experts": None if key.experts is None else json.dumps(sorted(key.experts))}


def _known(row: Row) -> _Known:
    former = b"" if row.former is None else bytes.fromhex(row.former)
    return _Known(bytes.fromhex(row.hash), key_of(row), former, row.former_until or 0.0)


def key_of(row: Row) -> Key:
    """The key of a row of the table."""
    experts = None if row.experts is None else frozenset(json.loads(row.experts))
    return Key(row.id, row.name, experts, row.requests_per_minute, row.budget, row.window, row.zone, row.admin, row.ends)


def _check(
    name: str, experts: Collection[str] | None, rate: int | None, budget: float | None, window: str, *, ends: float | None
) -> None:
    if not isinstance(name, str) or not 0 < len(name.strip()) <= 200 or not name.isprintable():
        raise ValueError(f"name: expected up to 200 printable characters, got {name!r}")
    if isinstance(experts, str) or not all(isinstance(one, str) and one and one.isprintable() for one in experts or ()):
        raise ValueError(f"experts: expected names of experts, got {experts!r}")
    if experts is not None and len(experts) == 0:
        raise ValueError("experts: expected at least one name, or None for all; a key for nobody is revoked instead")
    if rate is not None and (not is_whole(rate) or not 1 <= rate <= 1_000_000):
        raise ValueError(f"requests_per_minute: expected a whole number from 1 to 1,000,000, got {rate!r}")
    if budget is not None and (not is_number(budget) or budget <= 0):
        raise ValueError(f"budget: expected dollars above 0, got {budget!r}")
    if window not in WINDOWS:
        raise ValueError(f"window: expected one of {', '.join(WINDOWS)}, got {window!r}")
    if ends is not None and (not is_number(ends) or not time.time() < ends < _YEAR_9999):
        raise ValueError(f"ends: expected seconds since 1970, later than now ({time.time():.0f}), got {ends!r}")
