"""Streams of events as they pass by: whether they end as they should, what they cost, and how one that breaks off ends."""

import json
import re
from collections.abc import Mapping
from typing import Any

from deferral.gateway.requests import Kind
from deferral.gateway.usage import TEXT, USAGE, Usage, characters_of, id_in, last_usage, usage_reported

__all__ = ["METERS", "ResponseMeter", "StreamMeter", "WithoutUsage", "error_event"]

_TAIL = 4096
_KEY = len(b'"usage" : {') + 8
_LAST = 32
# Texts of a model are quoted, and have no line ends of their own: it cannot write any of these.
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
_DONE = re.compile(rb"(?:^|[\r\n])data: ?\[DONE\]")
_FAILED = re.compile(rb'(?:^|[\r\n])data: ?\{\s*"error"\s*:\s*[{"]|"finish_reason"\s*:\s*"error"')
_DELTA = re.compile(rb'"delta"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"')
_ENDINGS = (b"response.completed", b"response.incomplete", b"response.failed", b"error")
# A type is the first field or the last: those in between are of what is in the response, and clients choose their tools.
_ENDING = re.compile(
    rb'(?:[\r\n]event: ?|[\r\n]data: ?\{\s*"type"\s*:\s*"|"type"\s*:\s*"(?=response\.[a-z]+"\s*\}[\r\n]))'
    rb"(response\.completed|response\.incomplete|response\.failed|error)(?=[\"\r\n])"
)
# Codes of errors that a client can bring about with any expert, and of limits, which are no failures.
_BLAMELESS = re.compile(rb'"code"\s*:\s*(?:4\d\d\b|"[a-z_]*(?:invalid|image|policy|rate_limit)[a-z_]*")')
_LONGEST_ENDING = 64
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_EVENTS = re.compile(rb"(?<=\n\n)|(?<=\r\n\r\n)")
_DATA = re.compile(rb"(?:^|[\r\n])data: ?(\{[^\r\n]*)")
_LONGEST_EVENT = 1 << 17
# Of the Responses API: it repeats the instructions, and may be as long as these.
_LONGEST_LAST_EVENT = 1 << 26
# Of any event, since its type may come last and be that of the end; what a longer one cost is estimated.
_LONGEST_HELD_EVENT = 1 << 22
_LINE_ENDS = (b"\n", b"\r")
# Of a line that is not over, as much waits to be counted.
_LONGEST_LINE = 1 << 16
_UNENDED = re.compile(rb'("[a-z_]+"\s*:\s*")[^"\\]*(?:\\.[^"\\]*)*(\\?)\Z')


class StreamMeter:
    """What passes by of a stream of events."""

    _text = TEXT

    def __init__(self) -> None:
        self._characters = 0
        self._line = b""
        self._head, self._tail, self._id = b"", b"", ""
        self._usage: dict[str, Any] | None = None

    def feed(self, chunk: bytes) -> None:
        """The next bytes."""
        if not self._id and len(self._head) < _TAIL:
            self._head += chunk[:_TAIL]
            self._id = id_in(self._head)
        read = self._tail + chunk
        leaving = len(read) - _TAIL
        # Some say what it cost, and then what they have read on the way.
        if leaving > 0 and b'"usage"' in read[: leaving + _KEY] and USAGE.search(read, 0, leaving + _KEY):
            self._usage = last_usage(read) or self._usage
        self._tail = read[-_TAIL:]
        if self._line or not chunk.endswith(_LINE_ENDS):
            self._join(chunk)
        else:
            self._characters += characters_of(self._text, chunk)

    def _join(self, chunk: bytes) -> None:
        """Count what chunks share: a text that is cut wherever a packet ends is a text all the same."""
        lines = self._line + chunk
        end = 1 + max(lines.rfind(line_end) for line_end in _LINE_ENDS)
        if len(lines) - end <= _LONGEST_LINE:
            self._characters += characters_of(self._text, lines[:end])
            self._line = lines[end:]
            return
        # The rest of a long text is counted as another one that begins here, with the half of an escape that it may begin with.
        opening, half = unended.groups() if (unended := _UNENDED.search(lines)) else (b"", b"")
        self._characters += characters_of(self._text, lines[: len(lines) - len(half)] + b'"')
        self._line = opening + half

    @property
    def finished(self) -> bool:
        """Whether the end of the answer has been seen, and not only of the bytes."""
        tail = self._tail
        # Expressions that begin with a choice are tried at every byte; in all of the tail that takes as long as all the rest.
        finished = _DONE.search(tail, max(len(tail) - _LAST, 0)) or _FINISHED.search(tail)
        failed = b'"error"' in tail and _FAILED.search(tail)
        return bool(finished) and not failed

    @property
    def blameless(self) -> bool:
        """Whether an error that the stream tells of is none of the expert's."""
        return b'"error"' in self._tail and _BLAMELESS.search(self._tail) is not None

    def usage(self, input_tokens: int) -> Usage:
        """Tokens so far, `input_tokens` being the estimate."""
        return usage_reported(last_usage(self._tail) or self._usage, self._id, input_tokens, self._written)

    @property
    def _written(self) -> int:
        """Characters so far, with those of a text that is not over."""
        half = unended[2] if (unended := _UNENDED.search(self._line)) else b""
        return self._characters + characters_of(self._text, self._line[: len(self._line) - len(half)] + b'"')


class ResponseMeter(StreamMeter):
    """The same for the Responses API, whose last event repeats the whole response and then says what it cost."""

    _text = _DELTA

    def __init__(self) -> None:
        super().__init__()
        self._ending, self._last = b"", bytearray()
        # Of the event that is not over: its type may come last.
        self._event = bytearray()

    def feed(self, chunk: bytes) -> None:
        """The next bytes."""
        seen = (self._tail[-_LONGEST_ENDING:] or b"\n") + chunk
        super().feed(chunk)
        if self._ending:
            if len(self._last) <= _LONGEST_LAST_EVENT:
                self._last += chunk
        elif any(name in seen for name in _ENDINGS) and (found := _ENDING.search(seen)):
            self._ending, self._last = found[1], bytearray(seen[found.start() :])
            if found[0].startswith(b'"type"'):
                read = self._event + chunk
                start = _line_begins(read, len(read) - len(seen) + found.end())
                self._last = read[start:]
        elif not chunk.endswith(_LINE_ENDS):
            if start := _line_begins(chunk, len(chunk)):
                self._event = bytearray(chunk[start:])
            elif len(self._event) <= _LONGEST_HELD_EVENT:
                self._event += chunk
        elif self._event:
            self._event = bytearray()

    @property
    def finished(self) -> bool:
        """Whether the last event has come, whole, and was no failure."""
        return self._ending in (b"response.completed", b"response.incomplete") and self._tail.endswith((b"\n", b"\r"))

    @property
    def blameless(self) -> bool:
        """Whether an error that the stream tells of is none of the expert's."""
        failed = self._ending in (b"response.failed", b"error")
        return super().blameless or (failed and _BLAMELESS.search(self._last) is not None)

    def usage(self, input_tokens: int) -> Usage:
        """Tokens so far, `input_tokens` being the estimate: before the last event nothing is reported but what clients sent."""
        return usage_reported(self._reported() if self._ending else None, self._id, input_tokens, self._written)

    def _reported(self) -> Any:
        """The usage of the response in the last event, and none of what that repeats of the request."""
        event = _DATA.search(self._last)
        try:
            response = json.loads(event[1]).get("response") if event else None
        except (ValueError, RecursionError):
            return None
        return response.get("usage") if isinstance(response, dict) else None


def _line_begins(text: bytes | bytearray, end: int) -> int:
    """Where the line begins that goes on to here."""
    return 1 + max(text.rfind(line_end, 0, end) for line_end in _LINE_ENDS)


class WithoutUsage:
    """A stream as it would be had nobody asked for its usage: without the event that holds nothing else, in whole events."""

    def __init__(self) -> None:
        self.held = b""

    def part(self, chunk: bytes) -> bytes:
        """What goes on to the client of the bytes so far; the beginning of an event is `held`."""
        events = self.held + chunk
        end = max(events.rfind(b"\n\n") + 2, events.rfind(b"\r\n\r\n") + 4)
        if end < 4:
            end = len(events) if len(events) > _LONGEST_EVENT else 0
        whole, self.held = events[:end], events[end:]
        if b'"usage"' in whole and _NO_CHOICES.search(whole):
            whole = b"".join(event for event in _EVENTS.split(whole) if not _is_usage(event))
        return whole


def _is_usage(event: bytes) -> bool:
    found = _DATA.search(event)
    try:
        said = json.loads(found[1]) if found else None
    except (ValueError, RecursionError):
        return False
    return isinstance(said, dict) and said.get("choices") == [] and isinstance(said.get("usage"), dict)


METERS: Mapping[Kind, type[StreamMeter]] = {
    "chat": StreamMeter,
    "completions": StreamMeter,
    "embeddings": StreamMeter,
    "responses": ResponseMeter,
}


def error_event(kind: Kind, body: bytes) -> bytes:
    """The event of an error, {"error": ...} in JSON, as clients of a path expect it."""
    if kind == "responses":
        return b'event: error\ndata: {"type": "error", ' + body[1:] + b"\n\n"
    return b"data: " + body + b"\n\n"
