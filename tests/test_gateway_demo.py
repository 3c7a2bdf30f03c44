"""The demo of the gateway: its questions, its table, its language models and their endpoint."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from rich.progress import Progress

from deferral.demo.questions import KINDS, Question, is_right, questions
from deferral.demo.routed import PRICE_OF_ERROR, Reply, Result, judged, show
from tests.served_app import served


def test_questions_are_different_of_every_kind_and_repeatable() -> None:
    drawn = questions(400, seed=0)
    assert len({question.text for question in drawn}) == 400
    assert set(Counter(question.kind for question in drawn)) == set(KINDS)
    assert drawn == questions(400, seed=0)
    seen = frozenset(question.text for question in drawn)
    assert not seen & {question.text for question in questions(400, seed=1, exclude=seen)}


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        ("sort", lambda words, answer: sorted(words[1:]) == answer.split()),
        ("backwards", lambda words, answer: words[1:-1][::-1] == answer.split()),
        ("small sum", lambda words, answer: int(words[1]) + int(words[3]) == int(answer)),
        ("first letter", lambda words, answer: words[5] == answer),
        ("last letter", lambda words, answer: words[-1] == answer),
    ],
)
def test_their_answers_are_right(kind: str, check: Any) -> None:
    for question in questions(200, seed=3):
        if question.kind == kind:
            assert check(question.text.rstrip(".?").split(), question.answer), question


def test_the_table_is_what_was_answered(capsys: pytest.CaptureFixture[str]) -> None:
    test = [Question("sort", f"q{number}", "a") for number in range(4)]

    def replies(expert: str, dollars: float, *texts: str) -> list[Reply]:
        return [Reply(text, expert, dollars) for text in texts]

    small = replies("small", 0.0001, "a", "b", " a ", "b")
    large = replies("large", 0.0004, "a", "a", "b", "b")
    auto = [small[0], large[1], small[2], large[3]]
    methods = judged(test, {"small": small, "large": large, "auto": auto})
    right = {method.name: method.right.tolist() for method in methods}
    assert right["always small"] == [1, 0, 1, 0]
    assert right["routed"] == [1, 1, 1, 0]
    assert right["oracle"] == [1, 1, 1, 0]
    assert right["random, same share"] == [1, 0.5, 0.5, 0]
    oracle = methods[-1]
    assert oracle.dollars.tolist() == [0.0001, 0.0004, 0.0001, 0.0001], "who is never right is asked at the least price"
    for method in methods[:-1]:
        assert (method.cost >= oracle.cost - 1e-12).all() or method.name.startswith("random")
    np.testing.assert_allclose(methods[0].cost, [0.1, 1.1, 0.1, 1.1])
    assert PRICE_OF_ERROR == 0.001
    show(Result(test, methods, [reply.expert for reply in auto], {"small": 1, "large": 2}, 12, 1.0))
    printed = capsys.readouterr().out
    assert "asked the large model for 50% of the questions" in printed
    assert "12 requests are on the gateway's record" in printed


@pytest.fixture(scope="module")
def model() -> Any:
    from deferral.demo.language import LanguageModel, make_tokenizer, new_model

    tokenizer = make_tokenizer([f"{each.text} {each.answer}" for each in questions(300, seed=0)])
    return LanguageModel(new_model(width=32, layers=2, heads=4, seed=1), tokenizer)


@pytest.fixture
def client(model: Any) -> Iterator[openai.OpenAI]:
    from deferral.demo.endpoint import app

    with (
        served(app(model, "tiny")) as url,
        openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as found,
    ):
        yield found


@pytest.mark.ci_slow
def test_answers_side_by_side_are_those_given_alone_and_without_a_cache(model: Any, tmp_path: Path) -> None:
    import torch

    texts = [question.text for question in questions(12, seed=5)]
    together = model.answers(texts)
    assert together == [model.answers([text])[0] for text in texts]
    prompt = model.prompt([{"role": "user", "content": texts[0]}])
    steps = [step for _, step in model.steps([prompt], [replace_sampling(alternatives=3)])]
    tokens = list(prompt)
    for step in steps:
        logprobs = model.model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        assert step.logprob == pytest.approx(float(logprobs.max()), abs=1e-4)
        assert step.alternatives[0][1] == pytest.approx(step.logprob)
        tokens.append(int(logprobs.argmax()))
    model.save(tmp_path / "saved")
    assert not [path for path in (tmp_path / "saved").iterdir() if path.suffix not in (".json", ".safetensors", ".jinja")]
    assert type(model).load(tmp_path / "saved").answers(texts[:2]) == together[:2]


def replace_sampling(**values: Any) -> Any:
    from deferral.demo.language import Sampling

    return replace(Sampling(most_tokens=6), **values)


@pytest.mark.ci_slow
def test_the_endpoint_speaks_with_the_official_client(client: openai.OpenAI, model: Any) -> None:
    messages: Any = [{"role": "user", "content": "Sort 7 3 9."}]
    asked: Any = {"model": "tiny", "messages": messages, "max_tokens": 6}
    answer = client.chat.completions.create(logprobs=True, top_logprobs=2, **asked)
    [choice] = answer.choices
    assert choice.message.content == model.answers(["Sort 7 3 9."])[0][: len(choice.message.content or "")]
    assert choice.finish_reason in ("stop", "length")
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert "".join(token.token for token in tokens) == choice.message.content
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)
    assert all(math.isclose(token.top_logprobs[0].logprob, token.logprob, abs_tol=1e-6) for token in tokens)
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens == len(model.prompt(messages))
    assert usage.completion_tokens == len(tokens) + (choice.finish_reason == "stop")
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == choice.message.content
    assert chunks[-1].usage == usage
    drawn = [client.chat.completions.create(temperature=2.0, seed=7, **asked).choices[0].message.content for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert [each.id for each in client.models.list()] == ["tiny"]
    for wrong in (
        {"messages": []},
        {"max_tokens": 0},
        {"temperature": 3},
        {"messages": [{"role": "user", "content": "b " * 200}]},
    ):
        with pytest.raises(openai.BadRequestError, match=r"expected|context window"):
            client.chat.completions.create(**(asked | wrong))


@pytest.mark.slow
def test_the_whole_demo_with_models_that_learn_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deferral.demo import gateway

    for name, value in (
        ("LARGE", replace(gateway.LARGE, width=64, steps=3)),
        ("SMALL", replace(gateway.SMALL, width=32, steps=2)),
    ):
        monkeypatch.setattr(gateway, name, value)
    monkeypatch.setattr(gateway, "FITTING", 60)
    monkeypatch.setattr(gateway, "TRAINING", 500)
    for _ in range(2):
        with Progress(disable=True) as progress, gateway.running(tmp_path, 50, 0, progress) as (result, url):
            assert result.rows == 150
            assert len(result.questions) == 50
            assert [method.name for method in result.methods] == [
                "always small",
                "always large",
                "random, same share",
                "routed",
                "oracle",
            ]
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as found:
                messages: Any = [{"role": "user", "content": "Sort 7 3 9."}]
                assert found.chat.completions.create(model="auto", messages=messages, max_tokens=2).usage
        made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
        assert len(made) == 2
    assert made == {path: path.stat().st_mtime_ns for path in made}, "the second run trains nothing"
    with pytest.raises(openai.APIConnectionError), openai.OpenAI(base_url=url, api_key="none", max_retries=0) as gone:
        gone.models.list()


def test_is_right_wants_the_answer_and_nothing_more() -> None:
    question = Question("sum", "Add 3 and 4 apples.", "7")
    assert is_right(" 7\n", question)
    assert not any(is_right(text, question) for text in ("", "77", "7 apples"))
