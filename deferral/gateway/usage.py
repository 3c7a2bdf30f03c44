"""How many tokens a reply took: what the upstream reports, else an estimate from the characters.  The bytes are only read."""

import json
import re
from typing import Any, NamedTuple, TypeGuard

__all__ = ["StreamMeter", "Usage", "error_of", "usage_of"]

_CHARACTERS_PER_TOKEN = 4
_READ_WHOLE = 1 << 17
_TAIL = 4096
_LAST = 32
_TEXT = re.compile(rb'"(?:content|reasoning_content|text|arguments)"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"')
_ID = re.compile(rb'"id"\s*:\s*"([^"\\]{1,200})"')
_USAGE = re.compile(rb'"usage"\s*:\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
# Texts of a model are quoted, and have no line ends of their own: it cannot write any of these.
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
_DONE = re.compile(rb"(?:^|[\r\n])data: ?\[DONE\]")
_FAILED = re.compile(rb'(?:^|[\r\n])data: ?\{\s*"error"\s*:\s*[{"]|"finish_reason"\s*:\s*"error"')
_EVENT = re.compile(rb"(?:^|[\r\n])data: ?(\{[^\r\n]*)")
_ANSWERS = ("choices", "data")


class Usage(NamedTuple):
    """Tokens of a reply, and its own id ("" where it has none); `cached_tokens` of the input came out of the prompt cache."""

    input_tokens: int
    output_tokens: int
    estimated: bool
    reply_id: str
    cached_tokens: int = 0


def usage_of(body: bytes, input_tokens: int) -> Usage | None:
    """The usage of a whole JSON reply, `input_tokens` being the estimate; None where it is no JSON object."""
    if len(body) > _READ_WHOLE:
        # Vectors by the thousand: reading them would hold everybody up for the sake of three numbers.
        stripped = body.strip()
        if not (stripped.startswith(b"{") and stripped.endswith(b"}")):
            return None
        return _usage(_last_usage(body[:_TAIL]) or _last_usage(body[-_TAIL:]), body[:_TAIL], input_tokens, 0)
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(reply, dict):
        return None
    usage = reply.get("usage")
    characters = 0 if isinstance(usage, dict) else sum(map(len, _TEXT.findall(body)))
    return _usage(usage, body[:_TAIL], input_tokens, characters)


def error_of(beginning: bytes) -> int | None:
    """The status that an error names which came in place of an answer, as a reply of status 200 or the first event of a stream.

    502 where it names none; None where there is no error, or an answer beside it.
    """
    if b'"error"' not in beginning:
        return None
    event = _EVENT.search(beginning)
    try:
        reply = json.loads(event[1] if event else beginning)
    except (ValueError, RecursionError):
        return None
    if not isinstance(reply, dict) or not reply.get("error") or any(reply.get(name) for name in _ANSWERS):
        return None
    code = reply["error"].get("code") if isinstance(reply["error"], dict) else None
    return code if _is_count(code) and 400 <= code < 600 else 502


class StreamMeter:
    """What passes by of a stream of events."""

    __slots__ = ("_characters", "_head", "_tail")

    def __init__(self) -> None:
        self._characters = 0
        self._head = b""
        self._tail = b""

    def feed(self, chunk: bytes) -> None:
        """The next bytes.  A text that two chunks share counts for nothing: this is an estimate."""
        if not self._head:
            self._head = chunk[:_TAIL]
        self._tail = (self._tail + chunk)[-_TAIL:]
        for text in _TEXT.findall(chunk):
            self._characters += len(text)

    @property
    def finished(self) -> bool:
        """Whether the end of the answer has been seen, and not only of the bytes."""
        tail = self._tail
        # Expressions that begin with a choice are tried at every byte; in all of the tail that takes as long as all the rest.
        finished = _DONE.search(tail, max(len(tail) - _LAST, 0)) or _FINISHED.search(tail)
        failed = b'"error"' in tail and _FAILED.search(tail)
        return bool(finished) and not failed

    def usage(self, input_tokens: int) -> Usage:
        """Tokens so far, `input_tokens` being the estimate."""
        return _usage(_last_usage(self._tail), self._head, input_tokens, self._characters)


def _last_usage(text: bytes) -> Any:
    found = _USAGE.findall(text)
    try:
        return json.loads(found[-1]) if found else None
    except ValueError:
        return None


def _usage(reported: Any, head: bytes, input_tokens: int, characters: int) -> Usage:
    found = _ID.search(head)
    reply_id = found.group(1).decode("utf-8", "replace") if found else ""
    if isinstance(reported, dict):
        into, out = reported.get("prompt_tokens"), reported.get("completion_tokens", 0)
        if _is_count(into) and _is_count(out):
            details = reported.get("prompt_tokens_details")
            cached = details.get("cached_tokens") if isinstance(details, dict) else 0
            return Usage(into, out, False, reply_id, min(cached, into) if _is_count(cached) else 0)
    return Usage(input_tokens, -(-characters // _CHARACTERS_PER_TOKEN), True, reply_id)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
