"""Whose a reply was, by the id that its expert gave it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sqlalchemy import Engine, select

from deferral.gateway.record import WRITTEN_WITHIN
from deferral.gateway.rows import id_kept
from deferral.gateway.schema import decisions

__all__ = ["Replies"]

_T = TypeVar("_T")

_READ_TIMEOUT = 5.0
_READERS = 2
_SAME_ID = 100


class Replies:
    """What the record says of replies, read by threads of its own: others may have to wait for the database."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._readers = engine, ThreadPoolExecutor(_READERS, "replies")

    async def answered_by(self, reply_id: str, *, key: str) -> str | None:
        """The expert whose reply to this key (or anybody, if it is "") had this id; None where there is none, or more than one.

        SQLAlchemyError or TimeoutError where the database fails.
        """
        async with asyncio.timeout(_READ_TIMEOUT):
            found = await self._read(self._answered_by, reply_id, key)
            if found is None:
                # A reply can be faster than its row.
                await asyncio.sleep(WRITTEN_WITHIN)
                found = await self._read(self._answered_by, reply_id, key)
        return found

    async def answered_others(self, reply_id: str, *, key: str) -> bool:
        """Whether replies of this id went to other keys, and none to this one.

        SQLAlchemyError or TimeoutError where the database fails.
        """
        async with asyncio.timeout(_READ_TIMEOUT):
            return await self._read(self._answered_others, reply_id, key)

    def close(self) -> None:
        """Who waits has no answer; before the record ends, which hangs up on what is being read."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    async def _read(self, read: Callable[[str, str], _T], reply_id: str, key: str) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, read, reply_id, key)

    def _answered_by(self, reply_id: str, key: str) -> str | None:
        same = decisions.c.reply_id == id_kept(reply_id)
        if key:
            same &= decisions.c.key == key
        with self._engine.connect() as connection:
            # An upstream may give one id to all its replies.
            found = set(connection.execute(select(decisions.c.expert).where(same).limit(_SAME_ID)).scalars())
        return found.pop() if len(found) == 1 else None

    def _answered_others(self, reply_id: str, key: str) -> bool:
        same = decisions.c.reply_id == id_kept(reply_id)
        with self._engine.connect() as connection:
            own, any_at_all = (
                connection.execute(select(decisions.c.id).where(of).limit(1)).first() is not None
                for of in (same & (decisions.c.key == key), same)
            )
        return any_at_all and not own
