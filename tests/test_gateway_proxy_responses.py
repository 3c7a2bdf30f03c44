"""The Responses API through a gateway, with the official client: whom it is routed to, and who goes on with what."""

import json
from typing import Any

import openai
import pytest

from tests.faulty_upstream import CHUNKS
from tests.running_gateway import EASY, HARD
from tests.whole_gateway import ADMIN_KEY, calm, rows

pytestmark = [pytest.mark.ci_slow, pytest.mark.usefixtures("nobody_is_down")]

PICTURE = "data:image/png;base64,AAAA"


def test_the_responses_api_is_routed_like_chat(running: Any, client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "name": "look_up", "parameters": {"type": "object", "properties": {"usage": {"type": "x"}}}}
    create = client.responses.with_raw_response.create
    for text, expert, model in ((EASY, "small", "small"), (HARD, "large", "big/one")):
        said: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": text}]}]
        for items in (text, said):
            raw = create(model="auto", input=items, instructions="be brief", metadata={"seed": text})
            answer = raw.parse()
            assert answer.output_text == f"{model}: {text}"
            assert raw.headers["x-deferral-expert"] == expert
            assert raw.headers["x-deferral-reason"].startswith(f"{expert}: expected quality")
        [row] = rows(running, f"id = '{raw.headers['x-deferral-id']}'")
        assert (row["expert"], row["outcome"], row["estimated"], row["reply_id"]) == (expert, "ok", 0, f"resp_{text}")
        assert (row["input_tokens"], row["output_tokens"]) == (7, CHUNKS)
        assert row["price"] == pytest.approx(running.experts[expert].price(7, CHUNKS, 3))
    raw = create(model="auto", input=EASY, tools=[tool])
    [call] = raw.parse().output
    assert (call.type, json.loads(call.arguments)) == ("function_call", {"text": EASY})  # type: ignore[union-attr]
    picture: Any = [{"role": "user", "content": [{"type": "input_image", "image_url": PICTURE, "detail": "auto"}]}]
    assert create(model="auto", input=picture).headers["x-deferral-expert"] == "large", "the small one takes none"
    assert create(model="small", input=HARD).headers["x-deferral-reason"] == "asked for by name"
    cheap = create(model="auto", input=HARD, extra_headers={"x-deferral-price-of-error": "0.001"})
    assert cheap.headers["x-deferral-expert"] == "small"
    body = b'{"input": [{"role": "user", "content": "add"}] , "x_unknown": {"model": 1.0} ,"model":"auto"}'
    status, _, _ = running.gateway.ask("POST", "/v1/responses", body, key=running.key)
    seen = running.upstream.seen[-1]
    assert (status, seen.path, seen.body) == (200, "/v1/responses", body.replace(b'"auto"', json.dumps(seen.model).encode()))


def test_streams_of_responses_say_what_they_cost_and_whether_they_are_whole(running: Any, client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="auto", input=HARD, stream=True))
    assert [event.type for event in (events[0], events[1], events[-1])] == [
        "response.created",
        "response.output_text.delta",
        "response.completed",
    ]
    assert len(events) == CHUNKS + 3
    row = rows(running, "streamed")[-1]
    assert (row["expert"], row["outcome"], row["reply_id"]) == ("large", "ok", "resp_1")
    assert (row["input_tokens"], row["output_tokens"], row["estimated"]) == (7, CHUNKS, 0)
    # Until the first byte others may answer, after it nobody.
    gateway, upstream = running.gateway, running.upstream
    upstream.behave("small", "status-500")
    raw = client.responses.with_raw_response.create(model="auto", input=EASY, stream=True)
    assert (raw.headers["x-deferral-expert"], len(list(raw.parse()))) == ("large", CHUNKS + 3)
    upstream.behave("small", "reset")
    with pytest.raises(openai.APIError, match="small broke off in the middle of the stream"):
        list(client.responses.create(model="auto", input=EASY, stream=True))
    upstream.behave("small", "truncated-sse")
    assert len(list(client.responses.create(model="auto", input=EASY, stream=True))) == 3
    upstream.behave("small", "good")
    calm(gateway)
    for code in ("image_too_large", "server_error"):
        list(client.responses.create(model="small", input=EASY, stream=True, metadata={"fails": code}))
    assert [row["outcome"] for row in rows(running, "streamed")[-4:]] == ["truncated"] * 4
    [(good, _, _)] = gateway.state.answerers.servers["small"].each[0].breaker._calls
    assert not good, "one of them is not its fault"
    calm(gateway)


def test_what_a_long_response_cost_and_whose_it_was(running: Any, client: openai.OpenAI) -> None:
    token, key = running.gateway.state.keys.create("writes much")
    body = {"model": "large", "input": "x" * 150_000, "metadata": {"usage": "mine"}}
    status, headers, _ = running.gateway.ask("POST", "/v1/responses", body, key=token)
    assert status == 200
    [row] = rows(running, f"id = '{headers['x-deferral-id']}'")
    assert (row["input_tokens"], row["output_tokens"], row["estimated"]) == (7, CHUNKS, 0)
    assert running.gateway.state.answerers.servers["large"].each[0].breaker._calls[-1][1] == key.id


def test_a_response_goes_on_with_whoever_gave_the_one_before(running: Any, client: openai.OpenAI) -> None:
    create = client.responses.with_raw_response.create
    first = create(model="auto", input=HARD, metadata={"seed": "first"}).parse()
    rows(running)
    # Though the small one would do.
    raw = create(model="auto", input=EASY, previous_response_id=first.id)
    assert (raw.headers["x-deferral-expert"], raw.headers["x-deferral-reason"]) == ("large", "gave the previous response")
    assert running.upstream.seen[-1].json["previous_response_id"] == first.id
    [row] = rows(running, f"id = '{raw.headers['x-deferral-id']}'")
    assert (row["requested"], row["expert"]) == ("large", "large")
    status, _, _ = running.gateway.ask("POST", "/v1/feedback", {"id": first.id, "thumbs": "up"}, key=running.key)
    assert status == 200
    other, _ = running.gateway.state.keys.create("other")
    for key, model, previous in ((running.key, "auto", "resp_unknown"), (other, "auto", first.id), (other, "large", first.id)):
        body = {"model": model, "input": EASY, "previous_response_id": previous}
        status, _, said = running.gateway.ask("POST", "/v1/responses", body, key=key)
        assert (status, json.loads(said)["error"]["code"]) == (400, "previous_response_not_found")
    # Who is named is asked, and says itself what it knows.
    named = create(model="small", input=EASY, previous_response_id="resp_unknown")
    assert (named.headers["x-deferral-expert"], named.headers["x-deferral-reason"]) == ("small", "asked for by name")


def test_a_response_with_a_long_id_is_its_keys_own_like_any_other(running: Any, client: openai.OpenAI) -> None:
    """Proxies such as LiteLLM's make long ids, that say where they are from."""
    create = client.responses.with_raw_response.create
    seeds = [f"{'x' * 400}{end}" for end in "ab"]
    first = create(model="auto", input=HARD, metadata={"seed": seeds[0]}).parse().id
    second = create(model="auto", input=EASY, metadata={"seed": seeds[1]}).parse().id
    rows(running)
    assert len(first) > 400
    raw = create(model="auto", input=EASY, previous_response_id=first)
    assert (raw.headers["x-deferral-expert"], raw.headers["x-deferral-reason"]) == ("large", "gave the previous response")
    assert running.upstream.seen[-1].json["previous_response_id"] == first
    other, _ = running.gateway.state.keys.create("another")
    for key, model, feedback, going_on in ((other, "large", 404, 400), (running.key, "large", 200, 200)):
        status, _, _ = running.gateway.ask("POST", "/v1/feedback", {"id": first, "thumbs": "up"}, key=key)
        assert status == feedback
        body = {"model": model, "input": EASY, "previous_response_id": first}
        status, _, _ = running.gateway.ask("POST", "/v1/responses", body, key=key)
        assert status == going_on
    for response, left in ((first, 1), (first, 0)):
        status, _, said = running.gateway.ask("GET", f"/admin/decisions?response={response}", key=ADMIN_KEY)
        assert (status, len(json.loads(said)["data"])) == (200, left)
        status, _, _ = running.gateway.ask("DELETE", f"/admin/responses/{response}", key=ADMIN_KEY)
        assert status == (200 if left else 404)
    assert running.gateway.ask("DELETE", f"/admin/responses/{second}", key=ADMIN_KEY)[0] == 200


def test_what_a_gateway_cannot_do_with_responses_it_says(running: Any, client: openai.OpenAI) -> None:
    for fields, param in (
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"background": True}, "background"),
        ({"previous_response_id": 7}, "previous_response_id"),
    ):
        status, _, said = running.gateway.ask("POST", "/v1/responses", {"model": "auto", "input": EASY} | fields, key=running.key)
        assert (status, json.loads(said)["error"]["param"]) == (400, param)
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="kept by the expert that gave them"):
            ask("resp_1")
