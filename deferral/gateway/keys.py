"""API keys: who may ask, whom, how often and for how much."""

import base64
import hmac
import json
import logging
import math
import secrets
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from hashlib import sha256

from sqlalchemy import Row, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from deferral.gateway.database import connect, prepare
from deferral.gateway.database import keys as table
from deferral.gateway.windows import WINDOWS, WindowName, time_zone

__all__ = ["ANYONE", "PREFIX", "Issued", "Key", "Keys"]

_log = logging.getLogger("deferral.gateway.keys")

_REFRESH = 2.0
_MARK = "dk"
PREFIX = f"{_MARK}-"


@dataclass(frozen=True)
class Key:
    """What the holder of a key may do; None is no restriction.

    `budget` in dollars for each calendar `window` in the time zone `zone`.  A key with `admin` is for the admin endpoints.
    """

    id: str
    name: str
    experts: frozenset[str] | None = None
    requests_per_minute: int | None = None
    budget: float | None = None
    window: WindowName = "month"
    zone: str = "UTC"
    admin: bool = False


ANYONE = Key("", "anyone")


@dataclass(frozen=True)
class Issued:
    """A key on the list: when it was made and revoked, in seconds since 1970."""

    key: Key
    created: float
    revoked: float | None

    @property
    def prefix(self) -> str:
        """The part of the token that is no secret."""
        return f"{PREFIX}{self.key.id}"


class Keys:
    """The keys of a database, looked up in memory; a thread between `start` and `close` refreshes them every two seconds.

    A token is dk-ID-SECRET with a secret of 256 random bits; its SHA-256 is all that is stored.  Against guessing that many
    bits a slow hash adds nothing.
    """

    def __init__(self, url: str) -> None:
        self.engine = connect(url)
        self._found: dict[str, tuple[bytes, Key]] = {}
        self._reading = threading.Lock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Open the database, read the keys and keep reading them; DataError where that cannot be done."""
        prepare(self.engine)
        self.refresh()
        self._end.clear()
        self._thread = threading.Thread(target=self._run, name="keys", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop refreshing."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.engine.dispose()

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[Key]:
        return iter([key for _, key in self._found.values()])

    def find(self, token: str) -> Key | None:
        """The key of a token, None if there is none or it is revoked."""
        digest = _digest(token)
        parts = token.split("-", 2)
        known, key = self._found.get(parts[1] if len(parts) == 3 else "", (b"", None))
        return key if hmac.compare_digest(digest, known) else None

    def create(
        self,
        name: str,
        *,
        experts: Collection[str] | None = None,
        requests_per_minute: int | None = None,
        budget: float | None = None,
        window: WindowName = "month",
        zone: str = "UTC",
        admin: bool = False,
    ) -> tuple[str, Key]:
        """A new key and its token, which is shown this once and stored nowhere."""
        _check(name, experts, requests_per_minute, budget, window, zone)
        # Base32 has no sign that splits a token or a double click.
        identity = base64.b32encode(secrets.token_bytes(5)).decode().lower()
        token = f"{_MARK}-{identity}-{secrets.token_urlsafe(32)}"
        allowed = None if experts is None else frozenset(experts)
        key = Key(identity, name, allowed, requests_per_minute, None if budget is None else float(budget), window, zone, admin)
        row = {
            "id": identity,
            "name": name,
            "hash": _digest(token).hex(),
            "experts": None if allowed is None else json.dumps(sorted(allowed)),
            "requests_per_minute": requests_per_minute,
            "budget": key.budget,
            "window": window,
            "zone": zone,
            "admin": bool(admin),
            "created": time.time(),
        }
        with self.engine.begin() as connection:
            connection.execute(insert(table).values(**row))
        self.refresh()
        return token, key

    def revoke(self, id: str) -> bool:
        """End a key, by its id or the prefix that is shown; False where there is none that is valid."""
        identity = id.removeprefix(PREFIX)
        valid = (table.c.id == identity) & table.c.revoked.is_(None)
        with self.engine.begin() as connection:
            changed = connection.execute(update(table).where(valid).values(revoked=time.time())).rowcount
        self.refresh()
        return changed > 0

    def list(self) -> "list[Issued]":
        """All keys that ever were, oldest first."""
        with self.engine.connect() as connection:
            rows = connection.execute(select(table).order_by(table.c.created, table.c.id)).all()
        return [Issued(_key(row), row.created, row.revoked) for row in rows]

    def refresh(self) -> None:
        """Read the keys again."""
        # One at a time: what was read earlier must not replace what was read later.
        with self._reading, self.engine.connect() as connection:
            rows = connection.execute(select(table).where(table.c.revoked.is_(None))).all()
            self._found = {row.id: (bytes.fromhex(row.hash), _key(row)) for row in rows}

    def _run(self) -> None:
        failing = False
        while not self._end.wait(_REFRESH):
            try:
                self.refresh()
                failing = False
            except (SQLAlchemyError, ValueError) as error:
                # The keys of before stay valid: a database that is away for a moment must not lock everybody out.
                if not failing:
                    _log.error("the keys cannot be read again: %s", error)
                failing = True


def _digest(token: str) -> bytes:
    return sha256(token.encode("utf-8", "surrogatepass")).digest()


def _key(row: Row) -> Key:
    experts = None if row.experts is None else frozenset(json.loads(row.experts))
    return Key(row.id, row.name, experts, row.requests_per_minute, row.budget, row.window, row.zone, row.admin)


def _check(name: str, experts: Collection[str] | None, rate: int | None, budget: float | None, window: str, zone: str) -> None:
    if not isinstance(name, str) or not 0 < len(name.strip()) <= 200 or not name.isprintable():
        raise ValueError(f"name: expected up to 200 printable characters, got {name!r}")
    if isinstance(experts, str) or not all(isinstance(expert, str) and expert for expert in experts or ()):
        raise ValueError(f"experts: expected names of experts, got {experts!r}")
    if experts is not None and len(experts) == 0:
        raise ValueError("experts: expected at least one name, or None for all; a key for nobody is revoked instead")
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int) or not 1 <= rate <= 1_000_000):
        raise ValueError(f"requests_per_minute: expected a whole number from 1 to 1,000,000, got {rate!r}")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < math.inf):
        raise ValueError(f"budget: expected dollars above 0, got {budget!r}")
    if window not in WINDOWS:
        raise ValueError(f"window: expected one of {', '.join(WINDOWS)}, got {window!r}")
    time_zone(zone)
