"""Where the turns of a conversation begin, and what comes before each."""

import json

import pytest

from deferral.gateway.turns import conversation
from tests.talks import RESULT, asked, said, talk, user


@pytest.mark.parametrize(
    ("messages", "queries"),
    [
        ([user("first"), said(), user("second")], ["first", "second"]),
        ([user("first"), user("second")], ["second"]),
        (
            [user("first"), said(), user("second"), said(None, tool_calls=[]), {"role": "tool", "content": "42"}],
            ["first", "second"],
        ),
        ([user("first"), said(None, function_call={}), {"role": "function", "content": "42"}], ["first"]),
        ([user("first"), said([{"type": "tool_use"}]), user([RESULT])], ["first"]),
        ([user("first"), said(), user([{"type": "tool_result", "text": "42"}])], ["first"]),
        ([user("first"), said(), user([RESULT, {"type": "text", "text": "and now?"}])], ["first", "and now?"]),
        ([user("first"), said(), user("<tool_response>\n42\n</tool_response>")], ["first"]),
        ([user("first"), said(), user('<tool_result id="1">42</tool_result> <tool_result>43</tool_result>')], ["first"]),
        ([user("first"), said(), user("Observation: 42")], ["first"]),
        ([user("<system-reminder>be brief</system-reminder>\nfirst")], ["first"]),
        ([user("first\n<environment_details>\n/home</environment_details>\n")], ["first"]),
        ([user([{"type": "text", "text": text} for text in ("<system-reminder>x</system-reminder>", "first")])], ["first"]),
        ([user("<task>first</task>")], ["<task>first</task>"]),
        ([user("<tool_response>never closed")], ["<tool_response>never closed"]),
        ([user("is 1 <2 and 3> 2?")], ["is 1 <2 and 3> 2?"]),
        ([user("first"), said(), user("")], ["first"]),
        ([user("first"), said(), user([{"type": "image_url", "image_url": {"url": "x"}}])], ["first"]),
        ([user("first"), said(), user("  \n")], ["first"]),
        ([user("first"), said(), {"role": "system", "content": "be brief"}], ["first"]),
        ([user("first"), said(), {"role": "developer", "content": "x"}, user("second")], ["first", "second"]),
        ([{"role": "system", "content": "be brief"}], ["be brief"]),
        ([{"role": "system", "content": "be brief"}, user("")], [""]),
        ([user("<tool_response>42</tool_response>")], ["<tool_response>42</tool_response>"]),
        ([], [""]),
        ([None, 3, {"role": ["user"], "content": {}}, user({"text": "x"}), user([None, 3, {"type": {}, "text": 3}])], [""]),
    ],
)
def test_the_turns_are_what_the_user_asked_for(messages: list, queries: list[str]) -> None:
    assert [turn.query for turn in conversation(messages).turns] == queries


def test_results_of_tools_say_that_tools_are_in_use() -> None:
    called = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert conversation([user("first"), said(None, tool_calls=[called])]).tools
    # As clients send back the messages of servers that write every field.
    for empty in (None, []):
        assert not conversation([user("first"), said(tool_calls=empty, function_call=None), user("second")]).tools
    for message in (user([RESULT]), said([{"type": "tool_use"}]), said(None, function_call={}), {"role": "tool"}):
        assert conversation([user("first"), message]).tools
    assert not conversation([user("first"), said()]).tools


def test_what_comes_before_a_turn_is_counted_in_tokens() -> None:
    request = asked([{"role": "system", "content": "x" * 4000}, user("y" * 400), said("z" * 4000), user("w" * 400)])
    assert [turn.before for turn in request.turns] == [1000, 2100]
    grown = conversation(
        [*json.loads(json.dumps(talk("first", "second"))), said("", tool_calls=[]), {"role": "tool", "content": "4"}]
    )
    assert grown.turns == conversation(talk("first", "second")).turns, "what comes later changes nothing that was decided"


def test_wrapped_texts_are_looked_through_a_bounded_number_of_times() -> None:
    many = "<observation></observation>" * 10_000
    for text in (many, f"{many}first", "<observation>" * 10_000, "</observation>" * 10_000):
        assert len(conversation([user(text)]).turns) == 1
