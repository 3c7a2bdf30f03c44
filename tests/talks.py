"""Conversations as clients send them."""

import json
from typing import Any

from deferral.gateway.requests import Asked, parse

__all__ = ["RESULT", "asked", "said", "talk", "user"]

RESULT = {"type": "tool_result", "tool_use_id": "1", "content": "42"}


def user(content: Any) -> dict:
    return {"role": "user", "content": content}


def said(content: Any = "well", **fields: Any) -> dict:
    return {"role": "assistant", "content": content} | fields


def talk(*queries: str) -> list[dict]:
    """A conversation that ends with the last query."""
    return [message for query in queries for message in (user(query), said())][:-1]


def asked(messages: list[dict]) -> Asked:
    return parse("chat", json.dumps({"model": "auto", "messages": messages}).encode())
