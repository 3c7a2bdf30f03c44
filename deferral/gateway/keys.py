"""API keys: who may ask, whom, how often and for how much."""

from collections.abc import Collection
from dataclasses import dataclass

from deferral.gateway.windows import WindowName

__all__ = ["Key", "Keys"]


@dataclass(frozen=True)
class Key:
    """What the holder of a key may do; None is no restriction."""

    id: str
    name: str
    experts: frozenset[str] | None = None
    requests_per_minute: int | None = None
    budget: float | None = None
    window: WindowName = "month"
    zone: str = "UTC"
    admin: bool = False


class Keys:
    """The keys of a database, in memory; refreshed every two seconds by a thread between start and close."""

    def __init__(self, url: str) -> None: ...

    def start(self) -> None: ...

    def close(self) -> None: ...

    def find(self, token: str) -> Key | None: ...

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
    ) -> tuple[str, Key]: ...

    def revoke(self, id: str) -> bool: ...
