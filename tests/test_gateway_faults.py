"""An expert that fails: every cell of the matrix, as it was written down."""

import json
from collections.abc import Iterator

import pytest

from tests.fault_matrix import CASES, CHAT_PATH, MATRIX, Bench, Cell, bench, seen_by_the_client
from tests.faulty_upstream import FAULTS

pytestmark = pytest.mark.ci_slow
# Of the Responses API what its own events have a part in; `python -m benchmarks gateway --part faults` asks the rest too.
OF_RESPONSES = ("reset", "malformed-json")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("faults")) as found:
        yield found


def test_no_fault_of_the_upstream_is_left_out() -> None:
    assert set(FAULTS) | {"refused", "tls"} == set(MATRIX)


def test_what_nobody_is_able_to_take_is_refused_in_the_words_of_the_chosen_one(running: Bench) -> None:
    running.prepare("not-able")
    running.upstream.behave("large", "not-able")
    try:
        status, headers, body, _ = running.ask(CHAT_PATH, "auto", False)
    finally:
        running.upstream.behave("large", "good")
    assert (status, json.loads(body)["error"]["code"]) == (400, "context_length_exceeded")
    assert (headers["x-deferral-expert"], headers["x-deferral-attempts"]) == ("small", "2")


@pytest.mark.parametrize(
    ("path", "fault", "model", "stream", "expected"),
    [case for case in CASES if case[0] == CHAT_PATH or (case[1] in OF_RESPONSES and case[2] == "auto")],
    ids=lambda value: {True: "stream", False: "whole"}.get(value, str(value)) if not isinstance(value, Cell) else "",
)
def test_cell(running: Bench, path: str, fault: str, model: str, stream: bool, expected: Cell) -> None:
    found, details = seen_by_the_client(running, path, fault, model, stream)
    assert found == expected
    assert details["rows"] == 1
    assert details["row"]["status"] == found.status
    assert details["row"]["chosen"] == "small"
    if fault not in ("refused", "tls"):
        assert details["asked_small"] == expected.attempts - (expected.expert == "large")
    headers = details["headers"]
    assert headers["x-deferral-attempts"] == str(expected.attempts)
    assert headers.get("x-deferral-expert", "") == expected.expert
    if expected.ending == "error" and not stream:
        assert set(json.loads(details["body"])["error"]) == {"message", "type", "param", "code"}
    if found.status == 429:
        assert headers["retry-after"] == "1"
    if fault in ("status-401", "status-500"):
        assert b"as asked" not in details["body"], "an upstream's own words may repeat a key"
