"""Answerers whose experts are functions of the test: an expert at two addresses, and what became of a request."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from deferral.gateway.answering import Answerers, Outgoing, Unanswered
from deferral.gateway.experts_file import Expert
from deferral.gateway.metrics import Metrics
from deferral.gateway.requests import parse
from deferral.gateway.upstream import Reply
from deferral.gateway.usage import Usage

__all__ = ["BODY", "SMALL", "answerers_of", "outcome", "reply"]

BODY = b'{"model": "small", "messages": [{"role": "user", "content": "hi"}]}'
SMALL = Expert("small", "http://a/v1", other_urls=["http://b/v1"], max_concurrent=2, region="eu")


def answerers_of(ask: Callable[..., Any], *experts: Expert, retry_share: float = 0.2) -> Answerers:
    made = Answerers(SimpleNamespace(forget_all_but=set, ask=ask), Metrics(), retry_share=retry_share)  # type: ignore[arg-type]
    made.update({expert.name: expert for expert in experts})
    return made


async def outcome(answerers: Answerers, *ranking: Expert, key: str = "") -> str:
    try:
        call = await answerers.answer(ranking, Outgoing("/chat/completions", {}, parse("chat", BODY), key), lambda _: BODY)
    except Unanswered as nobody:
        return nobody.code
    call.end(True)
    return "ok"


def reply() -> Reply:
    return Reply(200, [], b"{}", Usage(1, 1, False, ""))
