"""Who is asking: the key of a request."""

import hmac
from collections.abc import Mapping

from starlette.types import Scope

from deferral.gateway.accounts import Refused
from deferral.gateway.keys import ANYONE, Key, Keys
from deferral.gateway.problems import Problem
from deferral.gateway.requests import refuse_repeated
from deferral.gateway.settings import Settings, is_loopback

__all__ = ["Access", "must_have_key", "no_key", "problem_of"]

# What a proxy says of whom it asks for.
_FORWARDED = frozenset({b"x-forwarded-for", b"forwarded", b"x-real-ip"})


class Access:
    """A gateway that only this machine can reach, and that never had a key for clients, is open.  Any other wants one.

    Admin endpoints want the admin key of the settings, or a key made for them; where there is neither, they are closed.
    """

    def __init__(self, keys: Keys, settings: Settings) -> None:
        self._keys = keys
        self._open = is_loopback(settings.host)
        self._admin_key = None if settings.admin_key is None else settings.admin_key.encode()

    def started(self) -> None:
        """Call once the keys are loaded: a gateway that ever had a key does not open when the last one is revoked."""
        if self._open and any(not issued.key.admin for issued in self._keys.list()):
            self._open = False

    @property
    def open(self) -> bool:
        """Whether a request needs no key."""
        if self._open and any(not key.admin for key in self._keys):
            self._open = False
        return self._open

    def client(self, scope: Scope, headers: Mapping[bytes, bytes]) -> Key:
        """Problem 401 without a valid key, 403 with a key for the admin endpoints, 400 with headers that say two things."""
        if len(headers) < len(scope["headers"]):
            refuse_repeated(scope["headers"])
        peer = scope.get("client")
        # Under another server than `deferral serve` the app may be bound to more addresses than its settings say.
        if self.open and (peer is None or is_loopback(peer[0])):
            # Any page in a browser may send requests to this machine, but not without saying where it is from.
            if b"origin" in headers:
                raise Problem(403, "pages_need_a_key", "a gateway without keys takes no requests of web pages; make a key")
            # What has come through a proxy may have come from anywhere.
            if not _FORWARDED.isdisjoint(headers):
                message = "a gateway without keys takes no requests that a proxy passes on; make a key"
                raise Problem(403, "proxied_needs_a_key", message)
            # A page may give a name of its own the address of this machine (DNS rebinding); its requests then say no origin.
            if not _is_here(headers.get(b"host", b"")):
                message = "a gateway without keys answers to localhost and the addresses of this machine alone; make a key"
                raise Problem(403, "host_needs_a_key", message)
            return ANYONE
        token = _bearer(headers)
        if not token:
            raise Problem(401, "missing_api_key", "expected a key of this gateway: Authorization: Bearer KEY")
        key = self._keys.find(token)
        if key is None:
            raise Problem(401, "invalid_api_key", "the API key is not one of this gateway, or it was revoked or has ended")
        if key.admin:
            raise Problem(403, "admin_key", "this key is for the admin endpoints; requests want another")
        return key

    def admin(self, headers: Mapping[bytes, bytes]) -> None:
        """Problem 401 or 403 for whoever is no admin."""
        token = _bearer(headers)
        if self._admin_key is not None and hmac.compare_digest(token.encode("utf-8", "surrogatepass"), self._admin_key):
            return
        key = self._keys.find(token) if token else None
        if key is not None and key.admin:
            return
        if not token:
            raise Problem(401, "missing_admin_key", "expected the admin key: Authorization: Bearer KEY")
        raise Problem(403, "invalid_admin_key", "the key is no admin key of this gateway")


def must_have_key(settings: Settings) -> None:
    """ValueError where other machines could reach a gateway that has no key; DataError where its database cannot be opened."""
    keys = Keys(settings.database)
    keys.start()
    try:
        if not is_loopback(settings.host) and all(key.admin or key.over for key in keys):
            raise ValueError(no_key(settings.host))
    finally:
        keys.close()


def no_key(host: str) -> str:
    """Why a gateway without a key is not served at an address that others can reach."""
    return (
        f"{host}: other machines could reach this gateway, and it has no key; make one with `deferral gateway keys create`, or "
        "bind to 127.0.0.1"
    )


def problem_of(refused: Refused) -> Problem:
    """A refusal of the limits, for the client."""
    return Problem(refused.status, refused.code, refused.message, retry_after=refused.retry_after)


def _bearer(headers: Mapping[bytes, bytes]) -> str:
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    return token.strip().decode("latin-1") if scheme.lower() == b"bearer" else ""


def _is_here(host: bytes) -> bool:
    """Whether a Host header, with or without a port, names this machine by itself; there may be none."""
    name = host.decode("latin-1").strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    return not host or is_loopback(name)
