"""Whether the experts answer, before anybody depends on it: each is asked for its models, and if wanted for one token."""

import asyncio
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from deferral.gateway.experts_file import Expert
from deferral.gateway.failures import Failure
from deferral.gateway.requests import Kind, parse
from deferral.gateway.shaping import shaped
from deferral.gateway.upstream import Reply, Upstream

__all__ = ["Reached", "reach"]

_LOOK_S = 10.0
_MOST_BYTES = 1 << 23
_SHOWN = 5
_REFUSED = frozenset({401, 403})
_Answer = Literal["yes", "no", "?", ""]


@dataclass
class Reached:
    """What is known of an expert at one of its addresses: "yes", "no", or "?" where it did not say.

    `shown` names it, and `seconds` is how long its completion took.  `faults` would make requests fail, `notes` would not; both
    say what to do.
    """

    expert: Expert
    shown: str
    reachable: _Answer = "no"
    key: _Answer = "?"
    model: _Answer = "?"
    seconds: float | None = None
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


async def reach(experts: Iterable[Expert], *, ask: bool) -> list[Reached]:
    """Every address of all of them, at once: GET /models, and with `ask` a completion of one token."""
    upstream = Upstream(max_reply_bytes=_MOST_BYTES)
    try:
        return await asyncio.gather(
            *(_reach(upstream, server, expert.shown(server), ask) for expert in experts for server in expert.servers)
        )
    finally:
        await upstream.close()


async def _reach(upstream: Upstream, expert: Expert, shown: str, ask: bool) -> Reached:
    found = Reached(expert, shown, key="" if expert.key is None else "?")
    await _look(upstream, found)
    if ask and found.reachable == "yes":
        await _ask(upstream, found)
    return found


async def _look(upstream: Upstream, found: Reached) -> None:
    expert = found.expert
    try:
        status, body = await upstream.look(expert, "/models", _LOOK_S)
    except Failure as failure:
        found.faults.append(f"{failure.message} ({expert.base_url}/models); is its server running, and base_url right?")
        return
    found.reachable = "yes"
    listed = _listed(body) if status == 200 else None
    if status in _REFUSED:
        found.key = "no"
        found.faults.append(_key_refused(expert, status))
    elif 300 <= status < 400:
        found.faults.append(f"sends on to another address (status {status}), where the gateway does not follow; correct base_url")
    elif status >= 500:
        found.faults.append(f"failed with status {status} when it was asked for its models; its own log has the reason")
    elif status == 404 and not urlsplit(expert.base_url).path:
        found.faults.append(f"has no {expert.base_url}/models (status 404): does base_url lack /v1?")
    elif listed is None:
        found.notes.append(
            f"does not list its models (status {status} for {expert.base_url}/models): whether base_url (with its /v1?), key and "
            "model are right is shown by --ask"
        )
    else:
        # Some list their models to anybody: then only a completion shows whether the key is right.
        found.key = "" if expert.key is None else "yes"
        found.model = "yes" if expert.model in listed else "no"
        if found.model == "no":
            found.faults.append(
                f"does not list the model {expert.model!r} but {_names(listed)}; correct model, or see with --ask"
            )


async def _ask(upstream: Upstream, found: Reached) -> None:
    began = time.monotonic()
    try:
        reply = await _completion(upstream, found.expert)
    except Failure as failure:
        if failure.came in _REFUSED:
            found.key = "no"
        found.faults.append(f"{failure.message} (a completion of one token)")
        return
    if reply.status >= 300:
        found.faults.append(
            f"refused a completion of one token with status {reply.status}; is model {found.expert.model!r} right?"
        )
        return
    # What was asked for is the proof, whatever the list of models said.
    found.seconds, found.faults = time.monotonic() - began, []
    found.key, found.model = "" if found.expert.key is None else "yes", "yes"
    if reply.usage.estimated:
        found.notes.append("reports no usage: tokens, and so what answers cost, are estimated from their length")
    if found.expert.logprobs and not _log_probabilities(reply.body):
        found.notes.append("came without log-probabilities, so that it cannot be asked first; take logprobs = true out")


async def _completion(upstream: Upstream, expert: Expert) -> Reply:
    try:
        reply = await _chat(upstream, expert)
    except Failure:
        if expert.route:
            raise
    else:
        if expert.route or reply.status < 300:
            return reply
    # Who is reached by name only may be there for embeddings.
    return await _post(upstream, expert, "embeddings", "/embeddings", {"model": expert.model, "input": "Hi"})


async def _chat(upstream: Upstream, expert: Expert) -> Reply:
    chat: dict[str, Any] = {"model": expert.model, "messages": [{"role": "user", "content": "Hi"}]}
    if expert.logprobs:
        chat["logprobs"] = True
    reply = await _post(upstream, expert, "chat", "/chat/completions", chat | {"max_tokens": 1})
    if reply.status == 400 and b"max_completion_tokens" in reply.body:
        reply = await _post(upstream, expert, "chat", "/chat/completions", chat | {"max_completion_tokens": 1})
    return reply


async def _post(upstream: Upstream, expert: Expert, kind: Kind, path: str, request: Mapping[str, Any]) -> Reply:
    body = shaped(json.dumps(request).encode(), expert, kind)
    return await upstream.ask(expert, path, body, {}, parse(kind, body), fresh=True)


def _listed(body: bytes) -> list[str] | None:
    """The ids of a list of models; None where it is none."""
    try:
        models = json.loads(body)["data"]
        return [model["id"] for model in models if isinstance(model["id"], str)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _log_probabilities(body: bytes) -> bool:
    try:
        return bool(json.loads(body)["choices"][0]["logprobs"]["content"])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return False


def _key_refused(expert: Expert, status: int) -> str:
    if expert.key is None:
        return f"wants a key (status {status}); put it in an environment variable, and name that in key_env"
    return f"refuses the key (status {status}); is the variable that key_env names the right one, and the key still valid?"


def _names(listed: list[str]) -> str:
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(name[:100] for name in listed[:_SHOWN]) + more if listed else "none"
