"""What an operator asks a running gateway for, behind the admin key: keys, and what happened."""

import asyncio
import json
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deferral.gateway.keys import PREFIX, SETTINGS, Issued, Keys, UnknownKey
from deferral.gateway.problems import Problem, number
from deferral.gateway.record import WRITTEN_WITHIN
from deferral.gateway.state import Gateway
from deferral.gateway.status import status
from deferral.gateway.wire import header_map, read_body

__all__ = ["hours_of", "routes", "shown"]

_MOST_BYTES = 1 << 16


def routes(gateway: Gateway) -> list[Route]:
    """POST, GET /keys; PATCH, DELETE /keys/ID; POST /keys/ID/token; DELETE /keys/ID/record, /responses/ID; GET /status."""

    async def keys(request: Request) -> Response:
        if request.method == "GET":
            issued = await gateway.query(gateway.keys.list)
            return JSONResponse({"object": "list", "data": [shown(one) for one in issued]})
        body = await read_body(request.receive, header_map(request.scope), _MOST_BYTES)
        return JSONResponse(await gateway.query(_create_key, gateway.keys, body), 201)

    async def key(request: Request) -> Response:
        identity = request.path_params["id"]
        if request.method == "PATCH":
            body = await read_body(request.receive, header_map(request.scope), _MOST_BYTES)
            return JSONResponse(await gateway.query(_change_key, gateway.keys, identity, body))
        if not await gateway.query(gateway.keys.revoke, identity):
            raise Problem(404, "key_not_found", f"{identity[:100]!r} is no valid key")
        return JSONResponse({"id": identity, "object": "key", "revoked": True})

    async def token(request: Request) -> Response:
        body = await read_body(request.receive, header_map(request.scope), _MOST_BYTES)
        return JSONResponse(await gateway.query(_rotate_key, gateway.keys, request.path_params["id"], body), 201)

    async def forget_key(request: Request) -> Response:
        return await deleted(key=request.path_params["id"].removeprefix(PREFIX))

    async def forget_response(request: Request) -> Response:
        return await deleted(response=request.path_params["id"])

    async def deleted(*, key: str | None = None, response: str | None = None) -> Response:
        if not (key or response):
            raise Problem(400, "no_id", "expected the id of a key or of a response, got an empty one")
        try:
            gone = await gateway.forget(key=key, response=response)
            if not gone.decisions:
                # A row is written a moment after its reply.
                await asyncio.sleep(WRITTEN_WITHIN)
                gone = await gateway.forget(key=key, response=response)
        except ValueError as error:
            raise Problem(409, "ambiguous_id", str(error)) from None
        if not gone.decisions:
            what = f"the key {key[:100]!r}" if key is not None else f"the response {(response or '')[:100]!r}"
            raise Problem(404, "nothing_on_record", f"nothing is on record of {what}")
        return JSONResponse({"deleted": asdict(gone)})

    async def happened(request: Request) -> Response:
        now = time.time()
        since = now - 3600 * hours_of(request.query_params.get("hours", "24"))
        found = await gateway.query(status, gateway.record.patient, list(gateway.keys), since=since, now=now)
        return JSONResponse(asdict(found))

    return [
        Route("/keys", keys, methods=["GET", "POST"]),
        Route("/keys/{id}", key, methods=["PATCH", "DELETE"]),
        Route("/keys/{id}/token", token, methods=["POST"]),
        Route("/keys/{id}/record", forget_key, methods=["DELETE"]),
        Route("/responses/{id:path}", forget_response, methods=["DELETE"]),
        Route("/status", happened),
    ]


def _create_key(keys: Keys, body: bytes) -> dict[str, Any]:
    """A key from the JSON of its settings.  -> it, and its token, which is shown this once"""
    wanted = _wanted(body, (*SETTINGS, "admin"))
    if "name" not in wanted:
        raise Problem(400, "invalid_key", "expected at least a name", param="name")
    with _problems():
        token, key = keys.create(**wanted)
    return {**key.as_json(), "object": "key", "token": token}


def _change_key(keys: Keys, id: str, body: bytes) -> dict[str, Any]:
    """Other settings for a key, from their JSON; null lifts a restriction.  -> the key as it is now"""
    wanted = _wanted(body, SETTINGS)
    with _problems():
        _, key = keys.change(id, **wanted)
    return {**key.as_json(), "object": "key"}


def _rotate_key(keys: Keys, id: str, body: bytes) -> dict[str, Any]:
    """A new token for a key; {"grace_hours": 24} is how long the one of before stays valid.  -> it, shown this once"""
    wanted = _wanted(body or b"{}", ("grace_hours",))
    with _problems():
        token, issued = keys.rotate(id, **wanted)
    return {**shown(issued), "token": token}


def _wanted(body: bytes, names: Collection[str]) -> dict[str, Any]:
    try:
        wanted = json.loads(body)
    except (ValueError, RecursionError):
        wanted = None
    if not isinstance(wanted, dict):
        raise Problem(400, "invalid_json", f"the body: expected an object with {', '.join(names)}")
    if strange := [name for name in wanted if name not in names]:
        raise Problem(400, "invalid_key", f"expected only {', '.join(names)}, got {strange[0][:100]!r}", param=strange[0][:100])
    if not isinstance(wanted.get("experts"), list | None) or not isinstance(wanted.get("admin", False), bool):
        raise Problem(400, "invalid_key", "expected a list of names as experts, and true or false as admin")
    return wanted


@contextmanager
def _problems() -> Iterator[None]:
    """What the keys refuse, for the client."""
    try:
        yield
    except UnknownKey as error:
        raise Problem(404, "key_not_found", str(error)) from None
    except (ValueError, TypeError) as error:
        raise Problem(400, "invalid_key", str(error)) from None


def shown(issued: Issued) -> dict[str, Any]:
    """A key as it is listed: never its token."""
    return {
        **issued.key.as_json(),
        "object": "key",
        "prefix": issued.prefix,
        "created": issued.created,
        "revoked": issued.revoked,
        "former_until": issued.former_until,
    }


def hours_of(text: str) -> float:
    """The number of hours in a query; Problem 400 where it is none."""
    hours = number(text)
    if not 0 < hours <= 1e6:
        raise Problem(400, "invalid_hours", f"hours: expected a number above 0, got {text[:100]!r}", param="hours")
    return hours
