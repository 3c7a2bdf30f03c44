"""The small endpoints: models, feedback, health, metrics, and the door to the admin ones."""

import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import Message, Receive, Scope, Send

from deferral.errors import DataError
from deferral.gateway.access import problem_of
from deferral.gateway.accounts import Refused
from deferral.gateway.database import reason_of
from deferral.gateway.keys import Key
from deferral.gateway.metrics import CONTENT_TYPE
from deferral.gateway.numbers import is_number
from deferral.gateway.problems import Problem
from deferral.gateway.rows import plain
from deferral.gateway.state import Gateway
from deferral.gateway.windows import span, time_zone
from deferral.gateway.wire import Left, header_map, read_body, send_problem

__all__ = ["Admin", "error_handlers", "routes"]

_log = logging.getLogger("deferral.gateway")

_FEEDBACK_BYTES = 1 << 16
_THUMBS = {"up": 1.0, "down": 0.0}
# Browsers and proxies must keep no copy of what only an admin may see.
_UNKEPT = ((b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff"))


def routes(gateway: Gateway) -> list[Route]:
    """All but the paths that are passed through."""

    async def models(request: Request) -> Response:
        names = _visible(gateway, gateway.access.client(request.scope, header_map(request.scope)))
        return JSONResponse({"object": "list", "data": [_model(name) for name in names]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _visible(gateway, gateway.access.client(request.scope, header_map(request.scope))):
            raise Problem(404, "model_not_found", f"{name[:100]!r} is no model that this key may ask", param="model")
        return JSONResponse(_model(name))

    async def own_key(request: Request) -> Response:
        key = gateway.access.client(request.scope, header_map(request.scope))
        await gateway.limits.admitted(key)
        left = await gateway.limits.left_now(key)
        again = None if left is None else span(key.window, time.time(), time_zone(key.zone)).end
        return JSONResponse({"object": "key", **key.as_json(), "left": left, "window_ends": again})

    async def feedback(request: Request) -> Response:
        key = gateway.access.client(request.scope, header_map(request.scope))
        await gateway.limits.admitted(key)
        body = await read_body(request.receive, header_map(request.scope), _FEEDBACK_BYTES)
        identity, quality = _feedback(body)
        try:
            known = await gateway.record.feedback(identity, quality, source_key=key.id)
        except TimeoutError as error:
            raise Problem(503, "record_unavailable", str(error), retry_after=1) from None
        if not known:
            message = (
                f"id: there is no response {identity[:100]!r} of this key, or several have it; expected the header "
                "x-deferral-id, or the reply's id where no other reply has the same"
            )
            raise Problem(404, "response_not_found", message, param="id")
        return JSONResponse({"id": plain(identity), "object": "feedback", "quality": quality})

    async def kept_elsewhere(request: Request) -> Response:
        gateway.access.client(request.scope, header_map(request.scope))
        message = "responses are kept by the expert that gave them, and asked for there; the gateway has POST /v1/responses alone"
        raise Problem(404, "response_not_found", message)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        trouble = gateway.trouble
        said = {"status": trouble or "ready"}
        if gateway.record.trouble:
            said["record"] = "it cannot be written at present; the log has the reason"
        return JSONResponse(said, 503 if trouble else 200)

    async def metrics(request: Request) -> Response:
        headers = header_map(request.scope)
        if gateway.access.open and gateway.settings.admin_key is None:
            # Who may ask without a key may see what it costs.
            gateway.access.client(request.scope, headers)
        else:
            gateway.access.admin(headers)
        shown = await (gateway.metrics if gateway.worker_metrics is None else gateway.worker_metrics).text()
        return Response(shown, headers={"content-type": CONTENT_TYPE, "cache-control": "no-store"})

    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/responses/{rest:path}", kept_elsewhere, methods=["GET", "POST", "DELETE"]),
        Route("/v1/key", own_key),
        Route("/v1/feedback", feedback, methods=["POST"]),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
    ]


class Admin:
    """What is behind the admin key: the given routes, and POST /reload."""

    def __init__(self, gateway: Gateway, own: Sequence[BaseRoute]) -> None:
        async def reload(request: Request) -> Response:
            try:
                return JSONResponse({"reloaded": await gateway.reload_everywhere()})
            except (DataError, ValueError) as error:
                raise Problem(409, "not_reloaded", f"all stays as it was: {error}") from None
            except SQLAlchemyError:
                message = "reloaded here; the database fails, and all others on it reload once it can be written"
                raise Problem(503, "others_not_told", message) from None

        self._gateway = gateway
        self._router = Router([*own, Route("/reload", reload, methods=["POST"])], redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """401 or 403 before anything is looked at."""
        try:
            self._gateway.access.admin(header_map(scope))
        except Problem as problem:
            await send_problem(send, problem)
            return

        async def unkept(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_UNKEPT]}
            await send(message)

        await self._router(scope, receive, unkept)


def error_handlers() -> dict[Any, Callable[[Request, Any], Awaitable[Response]]]:
    """Every error in the shape that OpenAI's clients understand."""

    async def problem(request: Request, error: Problem) -> Response:
        return Response(error.body, error.status, {"content-type": "application/json", **error.headers})

    async def refused(request: Request, error: Refused) -> Response:
        return await problem(request, problem_of(error))

    async def http(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        what, none = f"{request.method} {path[:100]}: {error.detail}", error.status_code == 404
        if none and not path.startswith(("/v1/", "/admin/")):
            what += "; the paths of OpenAI's API begin with /v1, and so ends the base URL that a client is given"
        shown = Problem(error.status_code, "not_found" if none else "invalid_request", what)
        return await problem(request, Problem(shown.status, shown.code, shown.message, headers=error.headers))

    async def unavailable(request: Request, error: SQLAlchemyError) -> Response:
        _log.error("%s %s: the database fails: %s", request.method, request.url.path[:100], reason_of(error))
        return await problem(request, Problem(503, "record_unavailable", "the database fails at present", retry_after=1))

    async def unexpected(request: Request, error: Exception) -> Response:
        # The server logs it.
        return await problem(request, Problem(500, "internal_error", "the gateway failed; its log has the reason"))

    async def left(request: Request, error: Left) -> Response:
        return Response(status_code=400)

    return {
        Problem: problem, Refused: refused, HTTPException: http, Left: left, SQLAlchemyError: unavailable, Exception: unexpected
    }  # fmt: skip


def _visible(gateway: Gateway, key: Key) -> list[str]:
    experts = gateway.current.experts
    mine = [name for name in experts if key.experts is None or name in key.experts]
    routed = [name for name in mine if experts[name].route]
    others = [name for name, alias in gateway.current.aliases.items() if alias.serves(mine, routed)]
    return [*(["auto"] if routed else []), *mine, *others]


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "deferral"}


def _feedback(body: bytes) -> tuple[str, float]:
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise Problem(400, "invalid_json", 'the body: expected {"id": ..., "quality": 0..1} or {"id": ..., "thumbs": "up"}')
    identity, thumbs = said.get("id"), said.get("thumbs")
    quality: Any = said.get("quality")
    if not isinstance(identity, str) or not identity:
        raise Problem(400, "invalid_id", "id: expected the header x-deferral-id of a response, or its own id", param="id")
    if (quality is None) == (thumbs is None):
        raise Problem(400, "invalid_feedback", "expected one of quality and thumbs", param="quality")
    if thumbs is not None:
        if thumbs not in ("up", "down"):
            raise Problem(400, "invalid_feedback", 'thumbs: expected "up" or "down"', param="thumbs")
        return identity, _THUMBS[thumbs]
    if not is_number(quality) or not 0 <= quality <= 1:
        raise Problem(400, "invalid_feedback", "quality: expected a number in [0, 1]", param="quality")
    return identity, float(quality)
