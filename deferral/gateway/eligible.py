"""Who may answer a request: what experts can do, what its key and its hints allow, and who is up."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from deferral.gateway.experts_file import Expert
from deferral.gateway.problems import Problem
from deferral.gateway.requests import Asked, Hints
from deferral.routing.constraints import Abilities
from deferral.routing.router import Router

__all__ = ["Limited", "eligible", "experts_down", "merged", "refusal", "served", "those_up"]


@dataclass(frozen=True, slots=True)
class Limited:
    """What the key and the state of the experts leave open.  `left` in dollars; `down` has the seconds to wait for each, `busy`
    are those of them that only asked for fewer requests; `key` is the key's id.
    """

    allow: Collection[str] | None = None
    left: float | None = None
    thrift: float = 1.0
    down: Mapping[str, float] = dataclasses.field(default_factory=dict)
    key: str = ""
    busy: frozenset[str] = frozenset()


def served(router: Router, experts: Mapping[str, Expert]) -> list[str]:
    """Those of a router's experts among whom it chooses: an experts file has them, and not with route = false."""
    return [name for name in router.experts if name in experts and experts[name].route]


def eligible(experts: Mapping[str, Expert], asked: Asked, hints: Hints, limited: Limited) -> frozenset[str]:
    """Who may answer this request; Problem 400 where nobody may."""
    reasons = {name: refusal(expert, asked, hints, limited.allow) for name, expert in experts.items()}
    names = [name for name, reason in reasons.items() if not reason]
    if not names:
        shown = [f"{name}: {reason}" for name, reason in reasons.items() if limited.allow is None or name in limited.allow]
        why = "; ".join(shown) or "none is allowed for this key"
        raise Problem(400, "no_expert_left", f"no expert may answer this request: {why}")
    return frozenset(names)


def those_up(experts: Mapping[str, Expert], names: frozenset[str], limited: Limited) -> frozenset[str]:
    """Those of them that are up; Problem 503 where none is, or 429 where all of them are busy."""
    if not limited.down:
        return names
    up = frozenset(name for name in names if name not in limited.down)
    if not up:
        raise experts_down(experts, names, limited, "nobody else may answer")
    return up


def experts_down(experts: Mapping[str, Expert], names: frozenset[str], limited: Limited, why: str) -> Problem:
    """What is told where these are missed: when the first of them may be up again."""
    shown = ", ".join(name for name in experts if name in names)
    wait = min(limited.down[name] for name in names)
    if names <= limited.busy:
        return Problem(429, "experts_busy", f"asking for fewer requests: {shown}; {why}", retry_after=wait)
    return Problem(503, "experts_down", f"down for the moment: {shown}; {why}", retry_after=wait)


def refusal(expert: Expert, asked: Asked, hints: Hints, allow: Collection[str] | None) -> str:
    """Why an expert may not answer; "" if it may."""
    if allow is not None and expert.name not in allow:
        return "not allowed for this key"
    if hints.experts is not None and expert.name not in hints.experts:
        return "not among the experts of this alias"
    tokens = asked.longest or asked.tokens
    if expert.context_tokens is not None and tokens + asked.output_tokens > expert.context_tokens:
        return f"about {tokens} tokens and {asked.output_tokens} for the answer exceed its window of {expert.context_tokens}"
    if asked.responses and not expert.responses:
        return "it has no /responses"
    if asked.tools and not expert.tools:
        return "it takes no tools"
    if asked.images and not expert.images:
        return "it takes no images"
    if hints.regions is not None and expert.region not in hints.regions:
        return "its region is not known" if expert.region is None else f"it is in {expert.region}"
    return ""


def merged(expert: Expert, can: Abilities | None) -> Expert:
    """What both the file and the router say that an expert can do."""
    if can is None:
        return expert
    windows = [window for window in (expert.context_tokens, can.context_tokens) if window is not None]
    return dataclasses.replace(
        expert,
        context_tokens=min(windows, default=None),
        tools=expert.tools and can.tools,
        images=expert.images and can.images,
        region=expert.region or can.region,
    )
