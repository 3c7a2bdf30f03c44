"""What is read of a request and of a reply, and that nothing else of them changes."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deferral.gateway.choice import Choice, set_aside
from deferral.gateway.experts_file import Expert
from deferral.gateway.problems import Problem
from deferral.gateway.requests import Kind, hints, parse, with_model, with_stream_usage
from deferral.gateway.streams import ResponseMeter, StreamMeter, WithoutUsage
from deferral.gateway.turns import MOST
from deferral.gateway.usage import usage_of

TEXT = st.text(max_size=12) | st.sampled_from(["model", '"model": "x"', "\\", '"', "ł", "\n", "auto"])
LEAVES = st.none() | st.integers(-9, 9) | TEXT
VALUES: Any = (
    LEAVES | st.lists(LEAVES, max_size=2) | st.dictionaries(TEXT, LEAVES | st.dictionaries(TEXT, LEAVES, max_size=2), max_size=2)
)


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "auto", "messages": [{"role": "user", "content": "hello"}]} | fields).encode()


@given(
    before=st.dictionaries(TEXT, VALUES, max_size=3), after=st.dictionaries(TEXT, VALUES, max_size=3), ascii_only=st.booleans()
)
def test_only_the_top_level_model_is_replaced(before: dict, after: dict, ascii_only: bool) -> None:
    before.pop("model", None)
    after.pop("model", None)
    request = {**before, "model": "auto", **{name: value for name, value in after.items() if name not in before}}
    text = json.dumps(request, ensure_ascii=ascii_only)
    try:
        body = text.encode()
    except UnicodeEncodeError:
        return
    changed = with_model(body, 'up"stream')
    assert json.loads(changed) == {**request, "model": 'up"stream'}
    # One place differs, and around it all is as it was.
    same_start = next((i for i, (a, b) in enumerate(zip(body, changed, strict=False)) if a != b), 0)
    assert body[:same_start] == changed[:same_start]
    assert len(changed) - len(body) == len(json.dumps('up"stream')) - len('"auto"')


@pytest.mark.parametrize(
    "name", ["Model", "MODEL", "sTREAM", "\u017ftream", "Stream_Options", "Previous_Response_Id", "Background"]
)
def test_a_field_that_some_servers_would_take_for_another_is_refused(name: str) -> None:
    with pytest.raises(Problem, match="there is no such field") as found:
        parse("chat", chat(**{name: "dear"}))
    assert (found.value.status, found.value.code) == (400, "unknown_field")


@pytest.mark.parametrize("field", ['"stream_options"', '"stream\\u005foptions"'])
def test_usage_is_asked_for_whatever_a_client_says_of_it(field: str) -> None:
    rest = '"metadata": {"stream_options": 1}, "a": [1.50, "\\u00e9"]'
    for said, sent in (("null", {}), ("{}", {}), ('{"include_usage": false, "b": 1}', {"b": 1})):
        body = f'{{"model": "auto", {field}: {said}, {rest}}}'.encode()
        assert parse("chat", body[:-1] + b', "messages": []}').stream_options
        changed = with_stream_usage(body, options_there=True)
        assert json.loads(changed) == {**json.loads(body), "stream_options": {**sent, "include_usage": True}}
        assert rest.encode() in changed
    for body in (b'{"model": "auto", "stream_options": 7}', b'{"model": "auto", "stream_options": [true]}'):
        assert with_stream_usage(body, options_there=True) == body, "it is for the expert to refuse"
    plain = b'{ "model": "auto", "metadata": {"stream_options": 1}}'
    assert json.loads(with_stream_usage(plain, options_there=False)) == {
        **json.loads(plain),
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    "body",
    [
        b'{"metadata": {"model": "mine"}, "model": "auto"}',
        b'{"messages": [{"model": "mine"}], "model" : "auto", "tools": [{"model": "mine"}]}',
        b'{"mod\\u0065l": "auto", "metadata": {"model": "mine"}}',
        b'{"model": "first", "metadata": {"model": "mine"}, "model": "auto"}',
        b'{"prompt": "say \\"model\\": \\"auto\\"", "model": "auto"}',
    ],
)
def test_objects_inside_keep_their_model(body: bytes) -> None:
    changed = json.loads(with_model(body, "upstream"))
    expected = json.loads(body)
    assert changed == {**expected, "model": "upstream"}


def test_the_query_is_the_last_message_of_the_user() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "x" * 4000}}]},
        {"role": "tool", "content": "42"},
    ]
    asked = parse("chat", chat(messages=messages, stream=True, max_tokens=50))
    assert (asked.query, asked.tools, asked.images, asked.stream, asked.output_tokens) == ("look", True, True, True, 50)
    assert 1000 < asked.tokens < 1200, "an image counts as an image, not as its bytes"
    assert parse("chat", chat(tools=[{"type": "function"}])).tools
    assert not parse("chat", chat()).tools


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "x" * 40_000, "format": "wav"}},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "x" * 40_000}},
        {"type": "input_file", "filename": "a.pdf", "file_data": "x" * 40_000},
    ],
)
def test_sounds_and_files_do_not_count_as_their_bytes(part: dict) -> None:
    content = [{"type": "text", "text": "look"}, part]
    bodies = {"chat": chat(messages=[{"role": "user", "content": content}])}
    bodies["responses"] = json.dumps({"model": "auto", "input": [{"role": "user", "content": content}]}).encode()
    for kind, body in bodies.items():
        asked = parse(kind, body)  # type: ignore[arg-type]
        assert 1000 < asked.tokens < 1200
        assert (asked.query, asked.images) == ("look", False)


def test_prompts_and_inputs_are_queries_too() -> None:
    assert parse("completions", b'{"model": "auto", "prompt": ["a", "b"]}').query == "a\nb"
    assert parse("completions", b'{"model": "auto", "prompt": [1, 2]}').query == ""
    assert parse("embeddings", b'{"model": "e", "input": "text"}').query == "text"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b"\xef\xbb\xbf{}", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b"[]", "invalid_json"),
        (b'{"model": 1' + b"0" * 5000 + b"}", "invalid_json"),
        (b"{}", "invalid_model"),
        (b'{"model": ""}', "invalid_model"),
        (b'{"model": ["auto"]}', "invalid_model"),
        (b'{"model": "auto"}', "invalid_messages"),
        (b'{"model": "auto", "messages": {}}', "invalid_messages"),
        (b'{"model": "auto", "messages": [], "stream": "yes"}', "invalid_type"),
    ],
)
def test_what_is_no_request_is_refused(body: bytes, code: str) -> None:
    with pytest.raises(Problem) as caught:
        parse("chat", body)
    assert (caught.value.status, caught.value.code) == (400, code)
    assert set(json.loads(caught.value.body)["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("chat", {"messages": [0] * (MOST + 1)}, "messages: expected at most 100,000 entries"),
        ("chat", {"messages": [{"content": [0] * (MOST // 2 + 1)}] * 2}, "messages: expected at most 100,000 parts of messages"),
        ("responses", {"input": [0] * (MOST + 1)}, "input: expected at most 100,000 entries"),
        ("responses", {"input": [{"role": "user", "content": [0] * (MOST + 1)}]}, "input: expected at most 100,000 parts"),
        ("completions", {"prompt": [0] * (MOST + 1)}, "prompt: expected at most 100,000 entries"),
        ("embeddings", {"input": [0] * (MOST + 1)}, "input: expected at most 100,000 entries"),
        ("chat", {"messages": [], **dict.fromkeys(map(str, range(999)))}, "the body: expected at most 1,000 fields, got 1,001"),
    ],
)
def test_what_would_take_long_to_read_is_refused_with_its_limit(kind: Kind, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Problem, match=message) as caught:
        parse(kind, chat(**fields) if kind == "chat" else json.dumps({"model": "auto", **fields}).encode())
    assert caught.value.status == 400


def test_as_much_as_is_read_is_read() -> None:
    fields = dict.fromkeys(map(str, range(998)))
    assert parse("chat", json.dumps({"model": "auto", "messages": [0] * MOST, **fields}).encode()).model == "auto"


def test_an_error_never_repeats_the_body() -> None:
    with pytest.raises(Problem) as caught:
        parse("chat", b'{"model": "auto", "secret-prompt')
    assert "secret-prompt" not in caught.value.message


def test_hints_are_numbers_above_zero() -> None:
    found = hints({b"x-deferral-price-of-error": b"0.5", b"x-deferral-regions": b"eu, us", b"x-other": b"1"})
    assert found.setting == (0.5, None, None, None)
    assert found.regions == {"eu", "us"}
    for text in (b"", b"nan", b"inf", b"-1", b"0", b"1 2", b"1_0", b"\xff"):
        with pytest.raises(Problem) as caught:
            hints({b"x-deferral-budget": text})
        assert caught.value.status == 400
    for text in (b"", b" ", b","):
        with pytest.raises(Problem, match="x-deferral-regions: expected names such as eu, us") as caught:
            hints({b"x-deferral-regions": text})
        assert caught.value.status == 400
    several = {b"x-deferral-min-quality": b"0.5", b"x-deferral-budget": b"1", b"x-deferral-max-latency": b"2"}
    with pytest.raises(Problem, match="x-deferral-min-quality: expected one trade-off, got x-deferral-budget as well") as caught:
        hints(several)
    assert (caught.value.status, caught.value.param) == (400, "x-deferral-min-quality")
    with pytest.raises(Problem, match=r"x-deferral-region: there is no such hint; .* x-deferral-regions") as caught:
        hints({b"x-deferral-region": b"eu"})
    assert caught.value.status == 400


def test_usage_is_what_the_upstream_says_or_an_estimate() -> None:
    reported = b'{"id": "chatcmpl-7", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 6, "x": {"y": 1}}}'
    found = usage_of(reported, 99)
    assert found is not None
    assert (found.input_tokens, found.output_tokens, found.estimated, found.reply_id) == (5, 6, False, "chatcmpl-7")
    guessed = usage_of(b'{"choices": [{"message": {"content": "12345678 a\\"b"}}], "usage": null}', 99)
    assert guessed is not None
    assert (guessed.input_tokens, guessed.output_tokens, guessed.estimated) == (99, 3, True)
    for strange in (b'{"prompt_tokens": -1}', b'{"prompt_tokens": 1e9}', b'{"prompt_tokens": true}', b"[]", b'"many"'):
        found = usage_of(b'{"usage": ' + strange + b"}", 99)
        assert found is not None
        assert found.estimated
    for nothing in (b"{}", b'{"prompt_tokens": null, "completion_tokens": null}'):
        found = usage_of(b'{"choices": [{"message": {"content": "12345678"}}], "usage": ' + nothing + b"}", 99)
        assert found == (99, 2, True, "", 0), "an answer is not for nothing"
    assert usage_of(b"[]", 1) is None
    assert usage_of(b'{"choices": [', 1) is None
    assert usage_of(b"[" * 100_000, 1) is None


def test_an_estimate_counts_characters_however_they_are_spelled_and_thoughts_once() -> None:
    for text in ("a" * 40, "\u4e2d" * 40, "\n" * 40):
        for ascii_only in (True, False):
            said = {"choices": [{"message": {"content": text}}]}
            assert usage_of(json.dumps(said, ensure_ascii=ascii_only).encode(), 9) == (9, 10, True, "", 0)
    for twice in ({"reasoning_content": "b" * 40}, {"reasoning_details": [{"type": "text", "text": "b" * 40}]}):
        said = {"choices": [{"delta": {"reasoning": "b" * 40, **twice}}]}
        meter = StreamMeter()
        meter.feed(b"data: " + json.dumps(said).encode() + b"\n\n")
        assert meter.usage(9).output_tokens == 10


@pytest.mark.parametrize(
    "written",
    [
        {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "a" * 400}}]},
        {"tool_calls": [{"index": 0, "type": "custom", "custom": {"name": "f", "input": "a" * 400}}]},
        {"audio": {"id": "audio_1", "transcript": "a" * 400}},
        {"refusal": "a" * 400},
    ],
)
def test_an_estimate_counts_what_clients_may_have_a_model_write_into(written: dict[str, Any]) -> None:
    assert usage_of(json.dumps({"choices": [{"message": written}]}).encode(), 9) == (9, 100, True, "", 0)
    meter = StreamMeter()
    meter.feed(b"data: " + json.dumps({"choices": [{"delta": written}]}).encode() + b"\n\n")
    assert meter.usage(9)[:3] == (9, 100, True)


def test_output_that_is_not_reported_is_what_the_total_leaves_or_an_estimate() -> None:
    answer = {"choices": [{"message": {"content": "a" * 400}}]}
    for usage, expected in (
        ({"prompt_tokens": 10, "total_tokens": 300}, (10, 290, False, "", 0)),
        ({"prompt_tokens": 10}, (10, 100, True, "", 0)),
        ({"prompt_tokens": 10, "completion_tokens": None}, (10, 100, True, "", 0)),
        ({"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 530}, (10, 520, False, "", 0)),  # thoughts in the total
        ({"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 5}, (10, 20, False, "", 0)),
        ({"input_tokens": 10, "output_tokens": 0, "total_tokens": 70}, (10, 60, False, "", 0)),
        ({"prompt_tokens": 10, "total_tokens": 3}, (99, 100, True, "", 0)),
    ):
        assert usage_of(json.dumps({**answer, "usage": usage}).encode(), 99) == expected
    assert usage_of(b'{"data": [], "usage": {"prompt_tokens": 10}}', 99) == (10, 0, False, "", 0), "vectors have none"


@pytest.mark.parametrize("size", [1, 7, 1000, 100_000])
def test_what_a_stream_reports_is_kept_however_much_follows(size: int) -> None:
    last = {"usage": {"prompt_tokens": 1000, "completion_tokens": 500}, "search_results": ["x" * 6000], "choices": []}
    whole = b'data: {"choices": [{"delta": {"content": "ab"}}], "usage": null}\n\ndata: ' + json.dumps(last).encode()
    meter = StreamMeter()
    for start in range(0, len(whole), size):
        meter.feed(whole[start : start + size])
    assert meter.usage(20)[:3] == (1000, 500, False)


@settings(max_examples=60)
@given(cuts=st.lists(st.integers(1, 60), max_size=30), end=st.sampled_from([b"\n\n", b"\r\n\r\n"]))
def test_of_a_stream_the_event_of_its_usage_alone_is_left_out(cuts: list[int], end: bytes) -> None:
    first = b'data: {"choices": [], "prompt_filter_results": [], "usage": null}' + end
    said = b": a comment" + end + b'data: {"choices": [{"delta": {"content": "\\"choices\\": [] usage"}}], "usage": null}' + end
    usage = b'data: {"id": "c", "choices": [ ], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}' + end
    last, cut = b"data: [DONE]" + end, b'data: {"choices": [], "usage": {"prompt_tok'
    rest, without, given = first + said + usage + last + cut, WithoutUsage(), b""
    for size in cuts:
        given += without.part(rest[:size])
        rest = rest[size:]
    given += without.part(rest) + without.held
    assert given == first + said + last + cut


def test_as_much_is_set_aside_as_answers_are_asked_for() -> None:
    def answers(kind: Any, **fields: Any) -> int:
        return parse(kind, json.dumps({"model": "auto", "messages": [], **fields}).encode()).answers

    assert [answers("chat", n=n) for n in (None, 1, 128, 0, -3, True, "9", 2.5)] == [1, 1, 128, 1, 1, 1, 1, 1]
    assert answers("completions", prompt=["a", "b"], n=2, best_of=3) == 6
    assert [answers("completions", prompt=prompt) for prompt in ("a", [1, 2, 3], [[1], [2]], [])] == [1, 1, 2, 1]
    assert answers("embeddings", input=["a", "b"]) == 1
    expert = Expert("large", "http://127.0.0.1:1", input_price=1.0, output_price=2.0)
    request = parse("chat", b'{"model": "auto", "messages": [], "n": 7}')
    expected = Choice(("large",), "", 1.0, {}, {"large": 0.5}, {}, 1.0, "", False)
    assert set_aside(expert, expected, request) == 3.5
    assert set_aside(expert, expected, request._replace(model="large")) == 0.5, "a price by name is that of all"


def test_usage_of_a_reply_that_is_too_long_to_be_read() -> None:
    vectors = b'{"data": [' + b"0.25," * 40_000 + b'0], "usage": {"prompt_tokens": 8, "total_tokens": 8}}'
    found = usage_of(vectors, 99)
    assert found is not None
    assert (found.input_tokens, found.output_tokens, found.estimated) == (8, 0, False)
    assert usage_of(vectors[:-2], 99) is None
    long = b'{"choices":[{"message":{"content":"' + b"a" * 200_000 + b'"}}]'
    assert usage_of(long + b"}", 9) == (9, 50_000, True, "", 0)
    more = b', "usage": {"prompt_tokens": 5, "completion_tokens": 6}, "more": "' + b"b" * 5000 + b'"}'
    assert usage_of(long + more, 9) == (5, 6, False, "", 0), "neither in the first nor in the last bytes"


@settings(max_examples=40)
@given(cuts=st.lists(st.integers(1, 40), max_size=30))
def test_a_stream_is_metered_however_it_is_cut(cuts: list[int]) -> None:
    usage = b'data: {"id": "c-1", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 6}}\n\n'
    whole = b'data: {"id": "c-1", "choices": [{"delta": {"content": "hi"}}]}\n\n' + usage + b"data: [DONE]\n\n"
    meter, rest = StreamMeter(), whole
    for cut in cuts:
        meter.feed(rest[:cut])
        rest = rest[cut:]
    meter.feed(rest)
    found = meter.usage(99)
    assert meter.finished
    assert (found.input_tokens, found.output_tokens, found.estimated) == (5, 6, False)


@pytest.mark.parametrize("size", [1, 7, 1400, 40_000, 1 << 20])
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b""])
def test_a_text_counts_however_packets_cut_it(size: int, end: bytes) -> None:
    for name, meter in (("chat", StreamMeter()), ("responses", ResponseMeter())):
        text = 'a"\\\n\u4e2d' * 20_000  # of five characters, and more bytes than are kept of one line
        if size == 1:
            text = text[:500]
        said = {"delta": text} if name == "responses" else {"choices": [{"index": 0, "delta": {"content": text}}]}
        whole = b"data: " + json.dumps(said).encode() + end
        if not end:
            whole = whole[: whole.rindex(b'"')]  # cut off in the middle
        for start in range(0, len(whole), size):
            meter.feed(whole[start : start + size])
        # Of an escape that 65,536 bytes cut in two each half may count.
        assert meter.usage(9)[:3] == (9, pytest.approx(len(text) / 4, abs=2), True)


def test_a_stream_without_usage_is_estimated_from_its_text() -> None:
    meter = StreamMeter()
    for _ in range(10):
        meter.feed(b'data: {"id": "c-1", "choices": [{"delta": {"content": "word "}, "finish_reason": null}]}\n\n')
    assert not meter.finished
    meter.feed(b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n')
    assert meter.finished
    found = meter.usage(99)
    assert (found.input_tokens, found.output_tokens, found.estimated, found.reply_id) == (99, 13, True, "c-1")
