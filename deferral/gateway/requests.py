"""A request as far as the gateway has to understand it: who is meant, what is asked, what it needs."""

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from deferral.gateway.experts_file import AUTO
from deferral.gateway.problems import Problem, number
from deferral.gateway.turns import BYTES_PER_TOKEN, MOST, TooMany, Turn, bytes_in, conversation, messages_of, text_of

__all__ = [
    "NO_HINTS",
    "PREVIOUS",
    "SETTING",
    "TRADE_OFFS",
    "Asked",
    "Hints",
    "Kind",
    "Setting",
    "hints",
    "parse",
    "refuse_repeated",
    "with_model",
    "with_stream_usage",
]

Kind = Literal["chat", "completions", "embeddings", "responses"]
Setting = tuple[float | None, float | None, float | None, float | None]

_MOST_FIELDS = 1000
# What a picture, a sound or a file is taken for.
_DATA_TOKENS = 1000
# Of the Responses API: what an expert keeps between requests.
_ELSEWHERE = ("conversation", "prompt")
# A letter, or a line below, of a name that is spelled with an escape.
_ESCAPED = re.compile(rb"\\u00[567]")
_MODEL = re.compile(rb'"model"\s*:\s*("[^"\\]*(?:\\.[^"\\]*)*")', re.DOTALL)
_SPACE, _COLON, _COMMA = (re.compile(rf"[ \t\n\r]*{sign}[ \t\n\r]*") for sign in ("", ":", ",?"))
_DECODER = json.JSONDecoder()
# Of these one alone makes sense: each says where on the curve of cost and quality to be.
TRADE_OFFS = ("price_of_error", "budget", "min_quality")
SETTING = (*TRADE_OFFS, "max_latency")
PREVIOUS = "previous_response_id"
# Fields that every expert must read as the gateway does.
_MEANT = frozenset({"model", "stream", "stream_options", PREVIOUS, "background"})


class Asked(NamedTuple):
    """`tokens` is estimated, `output_tokens` what the client allows (0: not said) to each of `answers`.  `longest` has the tokens
    of the longest of several inputs or prompts, each of which has an expert's window to itself (0: there is one).

    `query` is what is scored: the last of the `turns`, which are the user's requests, oldest first.  With `follows` it is not the
    newest, which only follows it up.  `responses` is a request of the Responses API, `previous` the id of the response that it
    goes on from.  `stream_options`: the client says something of them; `wants_usage`: that a stream report its usage.
    """

    model: str
    query: str
    tokens: int
    output_tokens: int
    tools: bool
    images: bool
    stream: bool
    turns: tuple[Turn, ...] = ()
    follows: bool = False
    responses: bool = False
    previous: str = ""
    longest: int = 0
    answers: int = 1
    stream_options: bool = False
    wants_usage: bool = False


@dataclass(frozen=True, slots=True)
class Hints:
    """Settings of the trade-off for one request, where it may be answered, and the name of its conversation, if it has one."""

    price_of_error: float | None = None
    budget: float | None = None
    max_latency: float | None = None
    min_quality: float | None = None
    regions: frozenset[str] | None = None
    conversation: bytes = b""
    experts: frozenset[str] | None = None  # by an alias, and no header

    @property
    def setting(self) -> Setting:
        """The values of `SETTING`."""
        return (self.price_of_error, self.budget, self.min_quality, self.max_latency)

    @property
    def bounded(self) -> bool:
        """Whether more is set than the price of an error."""
        return (self.budget, self.min_quality, self.max_latency) != (None, None, None)

    @property
    def setting_by_name(self) -> dict[str, Any]:
        """As `Router.plan` takes it."""
        return dict(zip(SETTING, self.setting, strict=True))


NO_HINTS = Hints()
_HINTS = {
    b"x-deferral-price-of-error": "price_of_error",
    b"x-deferral-budget": "budget",
    b"x-deferral-max-latency": "max_latency",
    b"x-deferral-min-quality": "min_quality",
}
_REGIONS, _CONVERSATION = b"x-deferral-regions", b"x-deferral-conversation"
_KNOWN = frozenset((*_HINTS, _REGIONS, _CONVERSATION))
_ONCE = frozenset({b"authorization", b"transfer-encoding", b"content-encoding"})


def parse(kind: Kind, body: bytes, routed: Collection[str] = AUTO) -> Asked:
    """Problem 400 where the body is no request.  `routed` are the names of models that ask the router."""
    try:
        request = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else _short(error)
        raise Problem(400, "invalid_json", f"the body: expected a JSON object in UTF-8; {reason}") from None
    if not isinstance(request, dict):
        raise Problem(400, "invalid_json", f"the body: expected a JSON object, got {_kind(request)}")
    if len(request) > _MOST_FIELDS:
        raise Problem(400, "too_many_fields", f"the body: expected at most {_MOST_FIELDS:,} fields, got {len(request):,}")
    # Servers that match names of fields without regard to case would take these for the others.
    if twin := next((name for name in request if name not in _MEANT and name.casefold() in _MEANT), None):
        message = f"{twin[:20]!r}: there is no such field; expected {twin.casefold()!r}"
        raise Problem(400, "unknown_field", message, param=twin[:20])
    model = request.get("model")
    if not isinstance(model, str) or not model:
        raise Problem(400, "invalid_model", f"model: expected auto or the name of an expert, got {_kind(model)}", param="model")
    stream = request.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise Problem(400, "invalid_type", f"stream: expected true or false, got {_kind(stream)}", param="stream")
    previous, longest = "", 0
    if kind == "chat" or kind == "responses":
        if kind == "responses":
            _refuse_two_previous(body)
            previous = _previous(request, routed)
        try:
            turns, tools, images, data, data_bytes = conversation(_messages(kind, request))
        except TooMany:
            raise _too_many("messages" if kind == "chat" else "input", "parts of messages") from None
        tools = tools or bool(request.get("tools")) or bool(request.get("functions"))
    else:
        name = "prompt" if kind == "completions" else "input"
        _check_length(name, request.get(name))
        turns, tools, images, data, data_bytes = (Turn(text_of(request.get(name)), 0),), False, False, 0, 0
        longest = _longest(request.get(name))
    answers = max(_count(request.get("n")), _count(request.get("best_of")))
    if kind == "completions":
        answers *= _prompts(request.get("prompt"))
    tokens = (len(body) - data_bytes) // BYTES_PER_TOKEN + data * _DATA_TOKENS
    allowed = request.get("max_completion_tokens") or request.get("max_tokens") or request.get("max_output_tokens")
    output = _count(allowed, 0)
    responses = kind == "responses"
    return Asked(
        model, turns[-1].query, tokens, output, tools, images, stream is True, turns, responses=responses, previous=previous,
        longest=longest, answers=answers, stream_options="stream_options" in request,
        wants_usage=_wants_usage(request.get("stream_options")),
    )  # fmt: skip


def with_model(body: bytes, model: str) -> bytes:
    """The body of a parsed request with another value of the top-level "model"; every other byte as it was."""
    value = _quoted(model)
    found = _MODEL.finditer(body)
    first = next(found, None)
    # A key may be spelled with \u escapes, and objects inside may have a model as well: then the body is read once more.
    if first is not None and next(found, None) is None and b"\\u006" not in body:
        start, end = first.span(1)
        return b"".join((body[:start], value, body[end:]))
    return _with_top_level(body.decode(), "model", value.decode()).encode()


def with_stream_usage(body: bytes, *, options_there: bool) -> bytes:
    """The body of a parsed request, asking that its stream report usage; every other byte as it was.

    One whose `stream_options` are there, and no object, stays as it is, for the expert to refuse.
    """
    if not options_there:
        start = body.index(b"{") + 1
        return b"".join((body[:start], b'"stream_options":{"include_usage":true},', body[start:]))
    options = json.loads(body)["stream_options"]
    if options is not None and not isinstance(options, dict):
        return body
    return _with_top_level(body.decode(), "stream_options", json.dumps({**(options or {}), "include_usage": True})).encode()


@lru_cache(1024)
def _quoted(model: str) -> bytes:
    return json.dumps(model).encode()


def refuse_repeated(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Problem 400 where a hint, a key or a coding is there twice: one of them would hold, and nobody has said which."""
    seen: set[bytes] = set()
    for name, _ in headers:
        if name in seen and (name in _ONCE or name.startswith(b"x-deferral-")):
            shown = name[:60].decode("ascii", "replace")
            raise Problem(400, "repeated_header", f"{shown}: expected it once, got it twice", param=shown)
        seen.add(name)


def hints(headers: Mapping[bytes, bytes]) -> Hints:
    """Problem 400 where a hint is no number, none of ours, or a second trade-off."""
    values: dict[str, Any] = {}
    for header in headers:
        # Passed over, a misspelt one would lift the constraint it stands for.
        if header.startswith(b"x-deferral-") and header not in _KNOWN:
            shown = header[:60].decode("ascii", "replace")
            known = ", ".join(sorted(name.decode() for name in _KNOWN))
            raise Problem(400, "unknown_hint", f"{shown}: there is no such hint; expected one of {known}", param=shown)
    for header, name in _HINTS.items():
        text = headers.get(header)
        if text is None:
            continue
        values[name] = number(text.decode("latin-1"))
        if not math.isfinite(values[name]) or values[name] < 0 or (values[name] == 0 and name != "min_quality"):
            shown = header.decode()
            raise Problem(400, "invalid_hint", f"{shown}: expected a number above 0, got {_shown(text)}", param=shown)
    if len(values) > 1:
        given = [header.decode() for header, name in _HINTS.items() if name in values and name in TRADE_OFFS]
        if len(given) > 1:
            message = f"{given[1]}: expected one trade-off, got {given[0]} as well"
            raise Problem(400, "invalid_hint", message, param=given[1])
    if (regions := headers.get(_REGIONS)) is not None:
        values["regions"] = frozenset(region.strip() for region in regions.decode("latin-1").split(",")) - {""}
        # Taken for no header, it would lift the constraint.
        if not values["regions"]:
            shown = _REGIONS.decode()
            raise Problem(400, "invalid_hint", f"{shown}: expected names such as eu, us, got {_shown(regions)}", param=shown)
    if conversation_name := headers.get(_CONVERSATION):
        values["conversation"] = conversation_name
    return Hints(**values) if values else NO_HINTS


def _messages(kind: Kind, request: Mapping[str, Any]) -> list[Any]:
    if kind == "chat":
        messages = request.get("messages")
        if not isinstance(messages, list):
            raise Problem(400, "invalid_messages", f"messages: expected a list, got {_kind(messages)}", param="messages")
        _check_length("messages", messages)
        return messages
    items = request.get("input")
    if items is None and any(request.get(name) for name in (PREVIOUS, *_ELSEWHERE)):
        items = ""
    if not isinstance(items, str | list):
        raise Problem(400, "invalid_input", f"input: expected a text or a list, got {_kind(items)}", param="input")
    _check_length("input", items)
    return messages_of(request.get("instructions"), items)


def _check_length(name: str, values: Any) -> None:
    if isinstance(values, list) and len(values) > MOST:
        raise _too_many(name, "entries")


def _too_many(name: str, what: str) -> Problem:
    return Problem(400, "too_many_entries", f"{name}: expected at most {MOST:,} {what}", param=name)


def _count(value: Any, otherwise: int = 1) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31 else otherwise


def _prompts(inputs: Any) -> int:
    """How many there are; a list of ids of tokens is one."""
    return len(inputs) if isinstance(inputs, list) and inputs and not isinstance(inputs[0], int) else 1


def _longest(inputs: Any) -> int:
    """Tokens of the longest of several inputs: texts, or lists of ids of tokens; one such list is an input of its own."""
    if not isinstance(inputs, list) or not inputs:
        return 0
    if isinstance(inputs[0], int):
        return len(inputs)
    sizes = (
        -(-bytes_in(one) // BYTES_PER_TOKEN) if isinstance(one, str) else len(one)
        for one in inputs
        if isinstance(one, str | list)
    )
    return max(sizes, default=0)


def _refuse_two_previous(body: bytes) -> None:
    """Problem 400 where it is said twice from which response to go on: an expert may take another of them than is looked up."""
    if body.count(PREVIOUS.encode()) < 2 and not _ESCAPED.search(body):
        return
    if sum(name == PREVIOUS for name, _, _ in _top_level(body.decode())) > 1:
        raise Problem(400, "repeated_field", f"{PREVIOUS}: expected it once, got it twice", param=PREVIOUS)


def _previous(request: Mapping[str, Any], routed: Collection[str]) -> str:
    """The response that a request goes on from, "" where there is none; Problem 400 where no router may decide."""
    if request.get("background"):
        message = "background: expected false; a response is given while the client waits, and nobody could ask for it later"
        raise Problem(400, "background_not_possible", message, param="background")
    if request["model"] not in routed:
        named = request.get(PREVIOUS)
        return named if isinstance(named, str) else ""
    if name := next((name for name in _ELSEWHERE if request.get(name)), ""):
        message = f"{name}: it is kept by one expert, and the gateway does not know by whom; name that expert as the model"
        raise Problem(400, "auto_not_possible", message, param=name)
    previous = request.get(PREVIOUS)
    if previous is not None and not isinstance(previous, str):
        raise Problem(400, "invalid_type", f"{PREVIOUS}: expected the id of a response, got {_kind(previous)}", param=PREVIOUS)
    return previous or ""


def _wants_usage(options: Any) -> bool:
    return isinstance(options, dict) and options.get("include_usage") is True


def _with_top_level(text: str, name: str, value: str) -> str:
    pieces, copied = [], 0
    for key, start, stop in _top_level(text):
        if key == name:
            pieces += [text[copied:start], value]
            copied = stop
    return "".join([*pieces, text[copied:]])


def _top_level(text: str) -> Iterator[tuple[str, int, int]]:
    """The names in an object, and where the value of each begins and ends."""
    place = _match_end(_SPACE, text, text.index("{") + 1)
    while text[place] == '"':
        key, end = _DECODER.raw_decode(text, place)
        start = _match_end(_COLON, text, end)
        _, stop = _DECODER.raw_decode(text, start)
        yield key, start, stop
        place = _match_end(_COMMA, text, stop)


def _match_end(pattern: re.Pattern[str], text: str, start: int) -> int:
    found = pattern.match(text, start)
    assert found is not None
    return found.end()


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return {dict: "an object", list: "a list", str: "a text", bool: "true or false"}.get(type(value), "a number")


def _short(error: ValueError) -> str:
    # json's messages name the place, and never quote the body; those about UTF-8 quote bytes.
    return str(error)[:100] if isinstance(error, json.JSONDecodeError) else "it is not"


def _shown(text: bytes) -> str:
    return repr(text[:20].decode("ascii", "replace"))
