"""What the user asked for, turn by turn: the messages of a conversation without the plumbing of tools.

Agents send a model's calls of tools and their results back as messages, and repeat the whole conversation each time.  A request
of the user is a message with the role user that says something, its tool results left out: content parts of the type
tool_result, and texts in the tags that frameworks wrap around what they put into the user's mouth, at the beginning and the end
of a message.  What the user sends twice without an answer in between is one turn, and the last message of it counts.
"""

import re
from typing import Any, NamedTuple

__all__ = ["BYTES_PER_TOKEN", "MOST", "Conversation", "TooMany", "Turn", "bytes_in", "conversation", "messages_of", "text_of"]

# A rule of thumb of English text in today's tokenizers; in other scripts a character has more bytes and more tokens.
BYTES_PER_TOKEN = 4

_WRAPPED = (
    "tool_response", "tool_result", "tool_results", "tool_output", "function_result", "function_results", "function_response",
    "observation", "system-reminder", "environment_details", "environment_context",
)  # fmt: skip
_OPENING = re.compile(rf"<({'|'.join(_WRAPPED)})(?:\s[^<>]*)?>")
_CLOSING = re.compile(rf"</({'|'.join(_WRAPPED)})>")
_LONGEST_CLOSING = max(map(len, _WRAPPED)) + 3
# ReAct has no tags.
_OBSERVED = "Observation:"
# More of them in one message are taken for text: reading a request takes a bounded time.
_MOST_WRAPPED = 32
_PARTS_OF_TOOLS = frozenset({"tool_result", "tool_use", "tool_call"})
_SOUNDS_AND_FILES = frozenset({"input_audio", "file", "input_file"})
# Of messages and of their parts: far beyond what clients send, and read in a tenth of a second.
MOST = 100_000
# Where a part has its data, by either API, and where they are in it.
_DATA = ("image_url", "image", "input_audio", "file", "file_data")
_DATA_IN_IT = ("url", "data", "file_data")


class TooMany(ValueError):
    """More parts of messages than are read."""


class Turn(NamedTuple):
    """A request of the user, and about how many tokens of text come before it: the same, whatever comes after it."""

    query: str
    before: int


class Conversation(NamedTuple):
    """The requests of the user, oldest first, at least one: without any, the last text that there is stands for it.

    `data` counts pictures, sounds and files, `data_bytes` what is sent of them.
    """

    turns: tuple[Turn, ...]
    tools: bool
    images: bool
    data: int
    data_bytes: int


def conversation(messages: list[Any]) -> Conversation:
    """What is said in a list of messages; whatever is no message is skipped.  TooMany where they have more than MOST parts."""
    turns: list[tuple[str, int]] = []
    rest = parts = 0
    users_text, other_text = "", ""
    tools, images, data, data_bytes, answered = False, False, 0, 0, True
    for message in reversed(messages):
        if not isinstance(message, dict):
            continue
        role, content = message.get("role"), message.get("content")
        if isinstance(content, str):
            text = content
        else:
            if isinstance(content, list) and (parts := parts + len(content)) > MOST:
                raise TooMany
            text = text_of(content)
            for part in content if isinstance(content, list) else ():
                kind = str(part.get("type")) if isinstance(part, dict) else ""
                picture = "image" in kind or kind == "computer_screenshot"
                if picture or kind in _SOUNDS_AND_FILES:
                    images = images or picture
                    data += 1
                    data_bytes += _length(part)
                elif kind in _PARTS_OF_TOOLS:
                    tools = True
        rest += bytes_in(text)
        if role == "user":
            users_text = users_text or text
            if answered and (asked := _asked(text)):
                turns.append((asked, rest))
                answered = False
        elif role == "tool" or role == "function":
            tools = True
        else:
            # Sent back as it came, a message has these fields, empty, also where no tool was called.
            tools = tools or bool(message.get("tool_calls")) or message.get("function_call") is not None
            answered = answered or role == "assistant"
            other_text = other_text or text
    if not turns:
        turns.append((users_text if users_text or _has_user(messages) else other_text, rest))
    found = tuple(Turn(query, (rest - after) // BYTES_PER_TOKEN) for query, after in reversed(turns))
    return Conversation(found, tools, images, data, data_bytes)


def messages_of(instructions: Any, items: str | list[Any]) -> list[dict[str, Any]]:
    """Instructions and input of the Responses API, as the messages of a chat; whatever is no message and no tool's is skipped."""
    messages: list[dict[str, Any]] = []
    if isinstance(instructions, str):
        messages.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    for item in items:
        if not isinstance(item, dict):
            continue
        kind, output = str(item.get("type", "message")), item.get("output")
        if "role" in item:
            messages.append(item)
        elif kind.endswith("_output"):
            messages.append({"role": "tool", "content": output if isinstance(output, str | list) else [output]})
        elif kind.endswith("_call"):
            messages.append({"role": "assistant", "content": item.get("arguments"), "tool_calls": [item]})
    return messages


def text_of(content: Any) -> str:
    """Of a content, a prompt or an input: a text, or a list of texts and parts.  Results of tools are left out."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = (
        part if isinstance(part, str) else part.get("text") if isinstance(part, dict) and not _of_tools(part) else None
        for part in content
    )
    return "\n".join(text for text in texts if isinstance(text, str))


def bytes_in(text: str) -> int:
    """The length of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def _has_user(messages: list[Any]) -> bool:
    return any(isinstance(message, dict) and message.get("role") == "user" for message in messages)


def _of_tools(part: dict[str, Any]) -> bool:
    kind = part.get("type")
    return isinstance(kind, str) and kind in _PARTS_OF_TOOLS


def _asked(text: str) -> str:
    """A message of the user without what was wrapped into it; "" where nothing is left, as it was where nothing is wrapped."""
    bare = text.strip()
    if bare.startswith(_OBSERVED):
        return ""
    if not bare.startswith("<") and not bare.endswith(">"):
        return text if bare else ""
    for _ in range(_MOST_WRAPPED):
        if (opening := _OPENING.match(bare)) is None:
            break
        closing = f"</{opening[1]}>"
        if (end := bare.find(closing, opening.end())) < 0:
            break
        bare = bare[end + len(closing) :].lstrip()
    for _ in range(_MOST_WRAPPED):
        place = bare.rfind("</", -_LONGEST_CLOSING)
        if place < 0 or (found := _CLOSING.fullmatch(bare, place)) is None:
            break
        if (begin := bare.rfind(f"<{found[1]}>", 0, place)) < 0:
            break
        bare = bare[:begin].rstrip()
    return bare


def _length(part: dict[str, Any]) -> int:
    held = next((part[name] for name in _DATA if name in part), None)
    data = next((held[name] for name in _DATA_IN_IT if name in held), None) if isinstance(held, dict) else held
    return len(data) if isinstance(data, str) else 0
