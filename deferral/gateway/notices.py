"""What is to be told of alarms to a URL, until its receiver has it.

A notice is written with the alarm, in one transaction, so that neither the end of a process nor a receiver that is away loses
it.  Any gateway on the database sends it: whoever takes a notice has it for a minute alone, and deletes it once it has arrived.
One that dies just then leaves it to another, and the receiver gets it twice, with one id.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
from sqlalchemy import Connection, Engine, Row, delete, insert, select, update
from yarl import URL

from deferral.gateway.connecting import proxy_of
from deferral.gateway.database import durable
from deferral.gateway.dialects import alone, clock
from deferral.gateway.retries import backoff
from deferral.gateway.schema import notices

__all__ = ["Notices", "keep_notices"]

_log = logging.getLogger("deferral.gateway.alarms")

_ATTEMPTS, _TIMEOUT = 3, 10.0
# Longer than all attempts of a turn.
_TURN = 60.0
_FIRST_WAIT, _LONGEST_WAIT = 30.0, 600.0
_KEPT = 7 * 86400.0


def keep_notices(connection: Connection, told: Sequence[Mapping[str, Any]]) -> None:
    """Write what is to be told, in the transaction of the connection; each gets an id, by which receivers may know it again."""
    for one in told:
        identity, now = secrets.token_hex(8), clock(connection)
        body = json.dumps({"id": identity, **one}, allow_nan=False)
        connection.execute(insert(notices).values(id=identity, time=now, body=body, attempts=0, due=now))


class Notices:
    """The way to a URL, with a token or without.  Neither is ever logged: such a URL is often a secret itself."""

    def __init__(self, engine: Engine, url: str, token: str | None = None) -> None:
        self._engine, self._url = engine, url
        self._headers = {"content-type": "application/json"}
        if token is not None:
            self._headers["authorization"] = f"Bearer {token}"

    async def send(self) -> None:
        """Send what is due, the oldest first, until one cannot be sent."""
        while (notice := await asyncio.to_thread(self._taken)) is not None:
            trouble = await self._posted(notice.body)
            await asyncio.to_thread(self._done, notice, trouble)
            if trouble:
                _log.warning("an alarm could not be told, and will be again: %s", trouble)
                return

    async def _posted(self, body: str) -> str:
        """-> what was wrong; "" where the receiver has it"""
        trouble = ""
        async with aiohttp.ClientSession(headers=self._headers, timeout=aiohttp.ClientTimeout(total=_TIMEOUT)) as session:
            for attempt in range(_ATTEMPTS):
                if attempt:
                    await asyncio.sleep(backoff(attempt))
                try:
                    # A redirect would take the token to another place.
                    async with session.post(
                        self._url, data=body.encode(), allow_redirects=False, proxy=proxy_of(URL(self._url))
                    ) as reply:
                        if reply.status < 300:
                            return ""
                        trouble = f"the receiver answered with status {reply.status}"
                except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                    # Its message may hold the URL.
                    trouble = f"the receiver cannot be reached, {type(error).__name__}"
        return trouble

    def _taken(self) -> Row | None:
        """The oldest notice, if it is due; nobody else gets it for a minute."""
        with self._engine.connect() as connection:
            durable(connection, False)
            if connection.execute(select(notices.c.id).limit(1)).first() is None:
                return None
            connection.rollback()
            with alone(connection, "notices"):
                now = clock(connection)
                late = connection.execute(delete(notices).where(notices.c.time < now - _KEPT)).rowcount
                oldest = connection.execute(select(notices).order_by(notices.c.time, notices.c.id).limit(1)).first()
                # A clock that was set back must not end it for good.
                mine = oldest is not None and not now < oldest.due <= now + _LONGEST_WAIT
                if oldest is not None and mine:
                    connection.execute(update(notices).where(notices.c.id == oldest.id).values(due=now + _TURN))
        if late:
            _log.error("%d alarms of a week ago are given up: their receiver never took them", late)
        return oldest if mine else None

    def _done(self, notice: Row, trouble: str) -> None:
        this = notices.c.id == notice.id
        with self._engine.connect() as connection:
            durable(connection, False)
            with alone(connection, "notices"):
                if not trouble:
                    connection.execute(delete(notices).where(this))
                    return
                wait = min(_FIRST_WAIT * 2 ** min(notice.attempts, 10), _LONGEST_WAIT)
                due = clock(connection) + wait
                connection.execute(update(notices).where(this).values(attempts=notice.attempts + 1, due=due))
