"""The page of an operator: its files, which hold no data, and behind the admin key what it shows."""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deferral.gateway.admin import hours_of
from deferral.gateway.agreement import agreement
from deferral.gateway.first_answers import first_answers
from deferral.gateway.history import history, recent
from deferral.gateway.keys import PREFIX
from deferral.gateway.state import Gateway
from deferral.gateway.what_if import what_if

__all__ = ["FILES", "pages", "routes"]

FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    **{name: (name, "text/javascript; charset=utf-8") for name in ("page.js", "drawing.js", "texts.js")},
    "uPlot.min.css": ("uPlot.min.css", "text/css; charset=utf-8"),
    "uPlot.iife.min.js": ("uPlot.iife.min.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    # Nothing from elsewhere, nothing written into the page, nobody's frame.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


def pages() -> list[Route]:
    """GET /dashboard and its files, one route each: the same for everybody, so without a key."""

    def route(name: str) -> Route:
        file, kind = FILES[name]

        async def page(request: Request) -> Response:
            return Response(_content(file), headers={"content-type": kind, **_HEADERS})

        return Route(f"/dashboard/{name}" if name else "/dashboard", page)

    return [route(name) for name in FILES]


def routes(gateway: Gateway) -> list[Route]:
    """GET /history, /what-if, /first-answers and /shadow, each with ?hours=24, /experts and /alarms.

    And /decisions: the newest 50, of key=ID, expert=NAME, outcome=ok, response=ID, hours=24 alone where these are said.
    """

    async def read(request: Request, reader: Callable[..., Any]) -> Response:
        now = time.time()
        since = now - 3600 * hours_of(request.query_params.get("hours", "24"))
        found = await gateway.query(reader, gateway.record.patient, since=since, until=now)
        return JSONResponse(asdict(found))

    async def over_time(request: Request) -> Response:
        return await read(request, history)

    async def other_settings(request: Request) -> Response:
        return await read(request, partial(what_if, present=gateway.current.router.price_of_error))

    async def before(request: Request) -> Response:
        return await read(request, first_answers)

    async def candidate(request: Request) -> Response:
        return await read(request, agreement)

    async def newest(request: Request) -> Response:
        asked = request.query_params
        wanted: dict[str, Any] = {name: asked[name] for name in ("expert", "outcome", "response") if name in asked}
        if "key" in asked:
            wanted["key"] = asked["key"].removeprefix(PREFIX)
        if "hours" in asked:
            wanted["since"] = time.time() - 3600 * hours_of(asked["hours"])
        return JSONResponse({"data": await gateway.query(recent, gateway.record.patient, **wanted)})

    async def experts(request: Request) -> Response:
        servers = gateway.answerers.servers
        found = [
            {
                "name": name,
                "routed": expert.route,
                "breaker": servers[name].state,
                "queued": servers[name].queued,
                "addresses": len(servers[name].each),
                "away": servers[name].away,
            }
            for name, expert in gateway.current.experts.items()
        ]
        return JSONResponse({"data": found, "trouble": gateway.trouble, "record": gateway.record.trouble})

    async def drift(request: Request) -> Response:
        return JSONResponse({"data": [alarm.as_json() for alarm in gateway.alarms.now]})

    return [
        Route("/alarms", drift),
        Route("/shadow", candidate),
        Route("/history", over_time),
        Route("/what-if", other_settings),
        Route("/first-answers", before),
        Route("/decisions", newest),
        Route("/experts", experts),
    ]


@cache
def _content(name: str) -> bytes:
    return (files("deferral.gateway") / "page" / name).read_bytes()
