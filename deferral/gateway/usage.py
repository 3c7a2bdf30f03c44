"""How many tokens a reply took: what the upstream reports, else an estimate from the characters.  The bytes are only read."""

import json
import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any, NamedTuple, TypeGuard

__all__ = ["TEXT", "USAGE", "Usage", "characters_of", "error_of", "id_in", "last_usage", "usage_of", "usage_reported"]

_CHARACTERS_PER_TOKEN = 4
_READ_WHOLE = 1 << 17
_TAIL = 4096
TEXT = re.compile(
    rb'"(?:content|reasoning_content|reasoning|thinking|refusal|text|arguments|input|transcript)"'
    rb'\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"'
)
_ESCAPE = re.compile(rb"\\(?:u[0-9a-fA-F]{4}|.)")
_LONGEST_ID = 1000
_ID = re.compile(rb'"id"\s*:\s*"([^"\\]{1,%d})"' % _LONGEST_ID)
USAGE = re.compile(rb'"usage"\s*:\s*(?=\{)')
_LONGEST_USAGE = 2048
# So many of what is called a usage are read to find one: a client may have sent thousands, each with others inside.
_MOST_USAGES = 8
_ERROR = re.compile(rb'"error"(?!\s*:\s*null)')
_EVENT = re.compile(rb"(?:^|[\r\n])data: ?(\{[^\r\n]*)")
_ANSWERS = ("choices", "data", "output")
# Of the Responses API: what fails a request after it was taken has a name, and one of these is the client's own doing.
_NAMED = ("error", "response.failed")
_CLIENTS = re.compile("invalid|image|policy")
_DECODER = json.JSONDecoder()


class Usage(NamedTuple):
    """Tokens of a reply, and its own id ("" where it has none); `cached_tokens` of the input came out of the prompt cache."""

    input_tokens: int
    output_tokens: int
    estimated: bool
    reply_id: str
    cached_tokens: int = 0


def usage_of(body: bytes, input_tokens: int, *, echoes: bool = False) -> Usage | None:
    """The usage of a whole JSON reply, `input_tokens` being the estimate; None where it is no JSON object.

    One that `echoes` what its client has sent is read whole, however long: the client may have sent a usage of its own.
    """
    if len(body) > _READ_WHOLE and not echoes:
        # Vectors by the thousand: reading them would hold everybody up for the sake of three numbers.
        stripped = body.strip()
        if not (stripped.startswith(b"{") and stripped.endswith(b"}")):
            return None
        last = body.rfind(b'"usage"')
        usage = last_usage(body[last : last + _TAIL]) or last_usage(body[:_TAIL])
        reply_id = id_in(body[:_TAIL])
    else:
        try:
            reply = json.loads(body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(reply, dict):
            return None
        usage, own = reply.get("usage"), reply.get("id")
        reply_id = own if isinstance(own, str) and len(own) <= _LONGEST_ID else ""
    tokens = _tokens(usage)
    characters = characters_of(TEXT, body) if tokens is None or tokens[1] is None else 0
    return usage_reported(usage, reply_id, input_tokens, characters)


def characters_of(texts: re.Pattern[bytes], part: bytes) -> int:
    """How many characters a model wrote in a part of a reply, an escape being one.

    What it thinks is sent under two names by some, one beside the other.
    """
    found: Iterable[bytes] = texts.findall(part)
    if b'"reasoning' in part:
        found = (text for text, _ in groupby(found))
    return sum(
        len(text) if text.isascii() and b"\\" not in text else len(_ESCAPE.sub(b".", text).decode("utf-8", "ignore"))
        for text in found
    )


def error_of(beginning: bytes) -> int | None:
    """The status that an error names which came in place of an answer, as a reply of status 200 or the first event of a stream.

    502 where it names none; None where there is no error, or an answer beside it.
    """
    if b'"error"' not in beginning or not _ERROR.search(beginning):
        return None
    event = _EVENT.search(beginning)
    try:
        reply = json.loads(event[1] if event else beginning)
    except (ValueError, RecursionError):
        return None
    if not isinstance(reply, dict):
        return None
    named, response = reply.get("type") in _NAMED, reply.get("response")
    said = response if named and isinstance(response, dict) else reply
    error = said.get("error") or (named and reply)
    if not error or any(said.get(name) for name in _ANSWERS):
        return None
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, str) and (named or reply.get("object") == "response") and _CLIENTS.search(code):
        return 400
    return code if _is_count(code) and 400 <= code < 600 else 502


def last_usage(text: bytes) -> dict[str, Any] | None:
    """The last usage that a part of a reply reports: a request may bring others, in its tools say, that a reply repeats."""
    for found in reversed(list(USAGE.finditer(text))[-_MOST_USAGES:]):
        try:
            usage, _ = _DECODER.raw_decode(text[found.end() : found.end() + _LONGEST_USAGE].decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            continue
        if _tokens(usage) is not None:
            return usage
    return None


def id_in(head: bytes) -> str:
    """The id of a reply that begins like this; "" where it is not there.

    Of a stream, that of the first event that has one: where keys come sorted, an answer's tool calls with their ids come before.
    """
    events = _EVENT.findall(head)
    for event in events:
        try:
            said = json.loads(event)
        except (ValueError, RecursionError):
            break
        for one in (said, said.get("response")):
            if isinstance(one, dict) and isinstance(own := one.get("id"), str) and 0 < len(own) <= _LONGEST_ID:
                return own
    else:
        if events:
            return ""
    # What is cut off, or too long to be read, has the id of the whole before its first list.
    found = _ID.search(head.partition(b"[")[0])
    return found.group(1).decode("utf-8", "replace") if found else ""


def usage_reported(reported: Any, reply_id: str, input_tokens: int, characters: int) -> Usage:
    """What is `reported`, else the estimate of the input and `characters` of the output."""
    tokens, written = _tokens(reported), -(-characters // _CHARACTERS_PER_TOKEN)
    if tokens is None:
        return Usage(input_tokens, written, True, reply_id)
    into, out = tokens
    details = reported.get("prompt_tokens_details", reported.get("input_tokens_details"))
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    cached = min(cached, into) if _is_count(cached) else 0
    return Usage(into, written, written > 0, reply_id, cached) if out is None else Usage(into, out, False, reply_id, cached)


def _tokens(usage: Any) -> tuple[int, int | None] | None:
    """Of input and output, by the names of either API; None where they are not reported, as those of the output of vectors."""
    if not isinstance(usage, dict):
        return None
    into = usage.get("prompt_tokens", usage.get("input_tokens"))
    out, total = usage.get("completion_tokens", usage.get("output_tokens")), usage.get("total_tokens")
    if _is_count(into) and _is_count(total) and (out is None or (_is_count(out) and into + out < total)):
        # Thoughts that are not shown are paid for like the rest; some count them in the total alone.
        out = total - into
    return (into, out) if _is_count(into) and (out is None or _is_count(out)) else None


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
