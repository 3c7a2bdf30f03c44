"""Files of questions, and of what was answered to them, a line of JSON an answer."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from deferral.errors import DataError
from deferral.gateway.experts_file import Expert
from deferral.gateway.problems import Problem
from deferral.gateway.requests import parse
from deferral.routing.log_files import JSON_LINES

__all__ = ["Question", "answers_held", "check_same", "is_answered", "line_of", "read_answers", "read_questions", "up_to_date"]

_KNOWN = ("query", "messages", "reference", "tags")
# How every line of answers begins.
_BEGINNING = b'{"row": '


@dataclass(frozen=True, slots=True)
class Question:
    """A line of the file, counted from 1: what is sent, what the router will take for the query, what is known of the answer."""

    row: int
    query: str
    messages: list[Any]
    given: dict[str, Any]  # repeated in every answer: reference, tags, and messages where there is more than the query


def read_questions(path: Path) -> list[Question]:
    """Of .jsonl or .ndjson, an object a line with "query" or "messages", or of a text file, a question a line.

    Beside it "reference", the right answer or a list of them, and "tags", a text or a list of them.  DataError names the row.
    """
    as_objects = path.suffix.lower() in JSON_LINES
    if path.suffix.lower() in (".json", ".csv", ".tsv", ".parquet", ".xlsx"):
        raise DataError(f"{path}: expected .jsonl, an object with a query a line, or a text file, a question a line")
    questions = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for row, line in enumerate(file, start=1):
                if "\0" in line:
                    raise DataError(f"{path}: row {row}: expected text in UTF-8, got {line[:20]!r}; write it as that first")
                if line.strip():
                    questions.append(_question(path, row, _object(path, row, line) if as_objects else {"query": line.strip()}))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: it cannot be read, {error}") from error
    if not questions:
        raise DataError(f"{path}: expected at least one question, got none")
    return questions


def _object(path: Path, row: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: row {row}: expected a JSON object, {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: row {row}: expected a JSON object, got {line[:60]!r}")
    return found


def _question(path: Path, row: int, given: dict[str, Any]) -> Question:
    def wrong(name: str, expected: str) -> DataError:
        return DataError(f"{path}: row {row}, {name}: expected {expected}, got {str(given.get(name))[:60]!r}")

    if unknown := sorted(set(given) - set(_KNOWN)):
        raise DataError(f"{path}: row {row}: unknown field {unknown[0]!r}; expected {', '.join(_KNOWN)}")
    if ("query" in given) == ("messages" in given):
        raise DataError(f"{path}: row {row}: expected either a query or messages")
    if "query" in given and (not isinstance(given["query"], str) or not given["query"].strip()):
        raise wrong("query", "a text")
    reference = given.get("reference", [])
    references = reference if isinstance(reference, list) else [reference]
    if any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in references):
        raise wrong("reference", "a text or a list of texts")
    tags = given.get("tags", [])
    tags = [tags] if isinstance(tags, str) else tags
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise wrong("tags", "a text or a list of texts")
    messages = given.get("messages", [{"role": "user", "content": given.get("query")}])
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise wrong("messages", "a list of objects, one at least")
    repeated = {"messages": messages} if "messages" in given else {}
    if tags:
        repeated["tags"] = tags
    if references:
        repeated["reference"] = [str(one) for one in references]
    try:
        query = parse("chat", json.dumps({"model": "any", "messages": messages}).encode()).query
    except (Problem, RecursionError) as error:
        raise DataError(f"{path}: row {row}: {error}") from None
    return Question(row, query, messages, repeated)


def read_answers(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The answers of a file, numbered by its lines.  DataError names the row; a last line that was cut off is one, too."""
    return ((row, line) for row, line in _lines(path) if is_answered(line))


def is_answered(line: Mapping[str, Any]) -> bool:
    """Whether a line holds an answer, or only what was paid for a reply that held none."""
    return line["answer"] is not None


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            for row, line in enumerate(file, start=1):
                try:
                    yield row, _answer_in(line)
                except ValueError:
                    if not line.endswith(b"\n") and line.startswith(_BEGINNING):
                        message = "the last line is cut off; the same `deferral gateway ask` mends that"
                        raise DataError(f"{path}: row {row}: {message}") from None
                    message = f"expected an answer as `deferral gateway ask` writes it, got {line[:60]!r}"
                    raise DataError(f"{path}: row {row}: {message}") from None
    except OSError as error:
        raise DataError(f"{path}: it cannot be read, {error}") from error


def line_of(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer).encode() + b"\n"


def _answer_in(line: bytes) -> dict[str, Any]:
    """ValueError where it is none."""
    try:
        answer = json.loads(line)
        whole = all(isinstance(answer[name], str) for name in ("query", "expert"))
        whole = whole and isinstance(answer["answer"], str | None)
        if whole and type(answer["row"]) is int and isinstance(answer["price"], int | float):
            return answer
    except (KeyError, TypeError, RecursionError):
        pass
    raise ValueError


def answers_held(file: BinaryIO, path: Path) -> list[dict[str, Any]]:
    """The lines that are there, of what was paid in vain, too.

    What was cut off is taken away, and a line end that somebody's program left out is added.
    """
    file.seek(0)
    text = file.read()
    whole, _, rest = text.rpartition(b"\n")
    if rest:
        try:
            _answer_in(rest)
            file.write(b"\n")
            file.flush()
        except ValueError:
            if not (rest.startswith(_BEGINNING) or _BEGINNING.startswith(rest)):
                # This is no file of answers, and must not be cut: reading it raises the error that says so.
                list(_lines(path))
            file.truncate(len(whole) + bool(whole))
    return [line for _, line in _lines(path)]


def check_same(
    found: Sequence[dict[str, Any]],
    path: Path,
    questions: Sequence[Question],
    asking: Mapping[str, tuple[str, dict[str, Any]]],
) -> None:
    """DataError where these are answers to other questions, or of experts who were asked otherwise.

    `asking` has the model and the fields of the request, by expert.
    """
    by_row = {question.row: question for question in questions}
    for number, answer in enumerate(found, start=1):
        question, now = by_row.get(answer["row"]), asking.get(answer["expert"])
        messages = None if question is None else question.given.get("messages")
        if question is None or (question.query, messages) != (answer["query"], answer.get("messages")):
            raise DataError(
                f"{path}: row {number} answers another question than row {answer['row']} of this file; name another file for the "
                "answers, or ask the questions of before"
            )
        then = answer.get("model"), answer.get("request")
        if now is not None and then != now:
            raise DataError(
                f"{path}: row {number}: {answer['expert']} was asked as {then[0]} with {json.dumps(then[1])}, and not as "
                f"{now[0]} with {json.dumps(now[1])}; ask as before, or name another file for the answers"
            )


def up_to_date(found: Sequence[dict[str, Any]], questions: Sequence[Question], experts: Sequence[Expert]) -> list[dict[str, Any]]:
    """With the references and tags of the questions and the prices of the experts, which may have been put right since."""
    given, by_name = {question.row: question.given for question in questions}, {expert.name: expert for expert in experts}
    return [
        {name: value for name, value in answer.items() if name not in ("reference", "tags")}
        | {"price": _price(answer, by_name.get(answer["expert"]))}
        | given[answer["row"]]
        for answer in found
    ]


def _price(answer: Mapping[str, Any], expert: Expert | None) -> float:
    """Dollars, as the experts file has them now; what was paid where the expert is not asked any more."""
    tokens = [answer.get(name) for name in ("input_tokens", "output_tokens", "cached_tokens")]
    if expert is None or not all(isinstance(one, int) for one in tokens):
        return answer["price"]
    return expert.price(*tokens)  # type: ignore[arg-type]
