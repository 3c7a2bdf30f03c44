"""How all gateways on one database learn that there is another router or another experts file: a number that rises."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

from sqlalchemy import Engine, func, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from deferral.gateway.dialects import alone
from deferral.gateway.schema import reloads

__all__ = ["Reloads"]

_LOOK = 1.0
_ROW = 1


class Reloads:
    """How often a reload was announced, and how often this gateway has heard of it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._heard = 0
        self._untold = False
        # Held while announcing: once committed, and before it is known to be its own, it would be heard as another's.
        self._lock = threading.Lock()

    def start(self) -> None:
        """From now on announcements are heard; whether files changed before, it is for the gateway to look."""
        self._heard = self.count()

    def count(self) -> int:
        """Announcements so far."""
        with self._engine.connect() as connection:
            return int(connection.execute(select(func.coalesce(func.max(reloads.c.count), 0))).scalar_one())

    def announce(self) -> None:
        """To all but this one, which has read its files.  Where the database fails, `follow` tells them once it can."""
        with self._lock:
            try:
                with self._engine.connect() as connection, alone(connection, "reloads"):
                    if not connection.execute(update(reloads).values(count=reloads.c.count + 1)).rowcount:
                        connection.execute(insert(reloads).values(id=_ROW, count=1))
                    now = int(connection.execute(select(reloads.c.count)).scalar_one())
            except SQLAlchemyError:
                self._untold = True
                raise
            # Another's announcement in between is still to be heard.
            if now == self._heard + 1:
                self._heard = now
            self._untold = False

    def _news(self) -> bool:
        """Whether something was announced that this gateway has not heard of until now."""
        with self._lock:
            before, self._heard = self._heard, self.count()
            return self._heard != before

    async def follow(self, reload: Callable[[], Awaitable[object]]) -> None:
        """Reload whenever that is announced, until cancelled; `reload` does not raise.

        A database that is away for a moment is asked again.
        """
        while True:
            await asyncio.sleep(_LOOK)
            try:
                if self._untold:
                    await asyncio.to_thread(self.announce)
                if not await asyncio.to_thread(self._news):
                    continue
            except SQLAlchemyError:
                continue
            await reload()
