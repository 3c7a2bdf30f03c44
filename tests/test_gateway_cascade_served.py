"""One expert asked first, through a gateway and on record: what is charged, what is learned from it, and what it saves."""

import asyncio
import json
import math
import re
import socket
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deferral.cli import main
from deferral.errors import DataError
from deferral.gateway import cascade_answers
from deferral.gateway.cascade_answers import answers_on_record
from deferral.gateway.database import connect
from deferral.gateway.experts_file import Expert
from deferral.gateway.export import CERTAIN, logged
from deferral.gateway.forgetting import forget
from deferral.gateway.record import Record
from deferral.gateway.rows import CascadeRow
from deferral.gateway.settings import Settings
from deferral.gateway.what_if import what_if
from deferral.routing import Log, Outcome, Router, answers_in, confidence_of, fit_cascade
from deferral.routing.cascade import features
from deferral.routing.policies import Linear
from tests.faulty_upstream import Upstream
from tests.gateway_rows import row
from tests.handmade_cascade import GUESS, PRICES, unsure_router
from tests.running_gateway import EASY, HARD, RunningGateway
from tests.served_app import served

SURELY = f"{GUESS}, surely"


async def _recorded(path: str, rows: list[Any], quality: dict[str, float]) -> None:
    record = Record(path, store_text=True, retention_days=1e6)
    record.start()
    for one in rows:
        record.add(one)
    assert all(await asyncio.gather(*(record.feedback(name, good, source_key="") for name, good in quality.items())))
    await record.close()


def through(number: int, ending: str, propensity: float, **more: Any) -> Any:
    expert, extra = ("small", 0.0) if ending == "kept" else ("large", 1e-4)
    sure = tuple(confidence_of([-0.5, -0.1]) or ())
    cascade = CascadeRow("small", ending, extra, 0.6, sure)
    price = 1e-4 if ending == "kept" else 1e-3 + extra
    return row(number, expert=expert, chosen=expert, propensity=propensity, price=price, cascade=cascade, **more)


def test_the_record_keeps_both_prices_and_no_text_is_needed_to_learn_from_it(database: str) -> None:
    rows = [
        through(0, "kept", 0.9),
        through(1, "deferred", 0.1),
        through(2, "kept", 1.0),
        row(3),
        through(4, "kept", 0.9, query=None),
    ]
    rows += [replace(through(5, "deferred", 0.9), expert="small"), through(6, "kept", 0.9)]
    asyncio.run(_recorded(database, rows, {f"id-{number}": 1.0 for number in range(6)}))
    engine = connect(database)
    left_out: Counter[str] = Counter()
    answers = answers_on_record(engine, ["small", "large"], "small", left_out)
    assert answers.mask.tolist() == [[True, False], [False, True], [True, False], [False, False], [False, False]]
    np.testing.assert_allclose(answers.price, [[1e-4, 1e-3]] * 5)
    # Two of the small expert's three answers are judged, and of the two draws of the large one, of which one failed, one.
    np.testing.assert_allclose(answers.propensity, [[0.6, 1], [1, 0.05], [0.6, 1], [1, 1], [1, 1]])
    np.testing.assert_allclose(answers.estimate, [[0.5, 0.9]] * 5)
    np.testing.assert_allclose(answers.confidence[0], features([confidence_of([-0.5, -0.1])])[0])  # type: ignore[list-item]
    assert left_out == dict.fromkeys((cascade_answers.CERTAIN, cascade_answers.IN_VAIN, cascade_answers.NO_QUALITY), 1)
    left_out.clear()
    outcomes = [one.outcome for one in logged(engine, left_out)]
    assert [outcome.price for outcome in outcomes] == pytest.approx([1e-4, 1e-3, 1e-4])
    assert [outcome.confidence is not None for outcome in outcomes] == [True, False, False]
    assert [outcome.latency_s for outcome in outcomes[:2]] == [0.25, pytest.approx(math.nan, nan_ok=True)], (
        "of one answer, or not"
    )
    assert left_out[CERTAIN] == 1
    assert what_if(engine, since=0, until=1e9, present=0.01).rows == 5, "what was kept with certainty proves nothing"
    with pytest.raises(DataError, match="Serve with --explore"):
        answers_on_record(engine, ["small", "large"], "large", Counter())
    forget(engine, key="")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("select count(*) from cascades").scalar_one() == 0
    engine.dispose()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A gateway whose small expert is sure of texts with "surely" in them, and tells nothing of those with "mute"."""
    folder = tmp_path_factory.mktemp("cascade")
    with Upstream(forever_s=30) as upstream:
        common = {"connect_s": 1, "first_byte_s": 20, "total_s": 20}
        experts = {
            name: Expert(name, upstream.url, input_price=price, output_price=price, logprobs=True, **common)
            for name, price in PRICES.items()
        }  # type: ignore[arg-type]
        router = unsure_router()
        router.save(folder / "router")
        with RunningGateway(router, experts, Settings(database=str(folder / "gateway.db"))) as gateway:
            yield SimpleNamespace(gateway=gateway, upstream=upstream, folder=folder)


def on_record(running: Any, identity: str) -> dict[str, Any]:
    """The decision and its cascade."""
    until = time.monotonic() + 5
    query = "select * from decisions left join cascades on cascades.decision = decisions.id where id = ?"
    while time.monotonic() < until:
        with closing(sqlite3.connect(running.folder / "gateway.db")) as connection:
            connection.row_factory = sqlite3.Row
            if found := connection.execute(query, (identity,)).fetchone():
                return dict(found)
        time.sleep(0.01)
    raise AssertionError("it is not on record")


def test_first_answers_that_are_judged_more_often_do_not_count_for_more(tmp_path: Path) -> None:
    """Six were kept and six deferred, by a coin; all of the kept ones are judged .7, and two of the others .9."""
    database = str(tmp_path / "g.db")
    rows = [through(number, "kept" if number < 6 else "deferred", 0.5) for number in range(12)]
    asyncio.run(_recorded(database, rows, {f"id-{number}": 0.7 if number < 6 else 0.9 for number in range(8)}))
    answers = answers_on_record(connect(database), ["small", "large"], "small", Counter())
    for guess in (0.5, 0.0):
        quality = guess + np.where(answers.mask, (answers.quality - guess) / answers.propensity, 0.0)
        np.testing.assert_allclose(quality.mean(0), [0.7, 0.9])


@pytest.mark.ci_slow
def test_through_a_gateway_answers_are_kept_or_deferred_charged_and_recorded(running: Any) -> None:
    gateway, upstream = running.gateway, running.upstream
    token, key = gateway.state.keys.create("cascade", budget=1.0)

    def deferred_so_far() -> float:
        text = gateway.call(gateway.state.metrics.text())
        counted = re.search(rb'deferral_cascades_total\{expert="small",outcome="deferred"\} (\S+)', text)
        return float(counted[1]) if counted else 0.0

    before = deferred_so_far()
    del upstream.seen[:]
    status, headers, reply = gateway.chat(f"{SURELY} 71", key=token)
    assert (status, headers["x-deferral-expert"], headers["x-deferral-cascade"], headers["x-deferral-first"]) == (
        200,
        "small",
        "kept",
        "small",
    )
    assert reply["choices"][0]["logprobs"] is None
    assert reply["x_unknown"] == {"kept": ["as", "it", "is"]}
    assert [seen.model for seen in upstream.seen] == ["small"]
    kept = on_record(running, headers["x-deferral-id"])
    assert (kept["ending"], kept["extra"], kept["price"]) == ("kept", 0.0, pytest.approx(47e-6))
    assert len(json.loads(kept["confidence"])) == 7
    del upstream.seen[:]
    status, headers, reply = gateway.chat(f"{GUESS} 72", key=token)
    assert (status, headers["x-deferral-expert"], headers["x-deferral-cascade"], headers["x-deferral-attempts"]) == (
        200,
        "large",
        "deferred",
        "2",
    )
    small, large = upstream.seen
    assert (small.model, small.json["top_logprobs"], large.model) == ("small", 5, "large")
    assert "logprobs" not in large.json
    deferred = on_record(running, headers["x-deferral-id"])
    assert (deferred["attempts"], deferred["ending"], deferred["extra"], deferred["price"]) == (
        2,
        "deferred",
        pytest.approx(47e-6),
        pytest.approx(47e-4 + 47e-6),
    )
    assert float(headers["x-deferral-price"]) == pytest.approx(47e-4 + 47e-6)
    assert gateway.state.limits.left(key) == pytest.approx(1.0 - 47e-4 - 2 * 47e-6)
    assert deferred_so_far() == before + 1
    del upstream.seen[:]
    body = {"model": "auto", "messages": [{"role": "user", "content": f"{GUESS} 72"}]}
    status, headers, _ = gateway.ask("POST", "/v1/chat/completions", body, key=token, idempotency_key="once")
    assert (status, len(upstream.seen), "x-deferral-cascade" in headers) == (200, 1, False), "two would have one key"
    # Easy and hard queries are routed as ever, and so is what is streamed or asked for by name.
    for text, fields in (
        (f"{EASY} 7", {}),
        (f"{HARD} 7 in full", {}),
        (f"{GUESS} 7", {"stream": True}),
        (f"{GUESS} 7", {"model": "small"}),
    ):
        del upstream.seen[:]
        status, headers, _ = gateway.chat(text, key=token, **fields)
        assert (status, len(upstream.seen)) == (200, 1)
        assert "x-deferral-cascade" not in headers
        assert b"logprobs" not in upstream.seen[0].body


@pytest.mark.ci_slow
def test_a_client_that_leaves_ends_both_and_has_paid_for_what_there_was(running: Any) -> None:
    gateway, upstream = running.gateway, running.upstream
    token, key = gateway.state.keys.create("leaves", budget=1.0)
    upstream.behave("large", "slow-first-byte")
    try:
        del upstream.seen[:]
        body = json.dumps({"model": "auto", "messages": [{"role": "user", "content": f"{GUESS} 73"}]}).encode()
        with socket.create_connection(("127.0.0.1", gateway.port)) as client:
            client.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n%b"
                % (token.encode(), len(body), body)
            )
            until = time.monotonic() + 10
            while len(upstream.seen) < 2:
                assert time.monotonic() < until
                time.sleep(0.01)
        while not upstream.seen[1].gone:
            assert time.monotonic() < until
            time.sleep(0.01)
        with closing(sqlite3.connect(running.folder / "gateway.db")) as connection:
            while not (rows := connection.execute("select id from decisions where outcome = 'cancelled'").fetchall()):
                assert time.monotonic() < until
                time.sleep(0.01)
        left = on_record(running, rows[0][0])
        # The first answer, and what the second expert has read by then.
        price = 47e-6 + left["input_tokens"] * PRICES["large"] / 1e6
        assert (left["ending"], left["price"], left["extra"]) == ("deferred", pytest.approx(price), pytest.approx(47e-6))
        assert (left["expert"], left["output_tokens"], left["estimated"]) == ("large", 0, 1)
        assert gateway.state.limits.left(key) == pytest.approx(1.0 - price)
        assert gateway.state.answerers.servers["large"].each[0].slots.taken == 0
        assert gateway.state.answerers.servers["small"].each[0].slots.taken == 0
    finally:
        upstream.behave("large", "good")


@pytest.mark.ci_slow
def test_failures_of_either_through_a_gateway(running: Any) -> None:
    gateway, upstream = running.gateway, running.upstream
    token, _ = gateway.state.keys.create("fails")
    upstream.behave("large", "status-401")
    status, headers, reply = gateway.chat(f"{GUESS} 74", key=token)
    upstream.behave("large", "good")
    assert (status, headers["x-deferral-expert"], headers["x-deferral-cascade"]) == (200, "small", "failed")
    assert reply["choices"][0]["logprobs"] is None
    row = on_record(running, headers["x-deferral-id"])
    assert (row["chosen"], row["expert"], row["price"]) == ("large", "small", pytest.approx(47e-6))
    upstream.behave("small", "status-401")
    status, headers, _ = gateway.chat(f"{GUESS} 75", key=token)
    upstream.behave("small", "good")
    assert (status, headers["x-deferral-expert"], headers["x-deferral-cascade"]) == (200, "large", "unanswered")
    status, headers, _ = gateway.chat(f"{GUESS} mute 76", key=token)
    assert (status, headers["x-deferral-cascade"]) == (200, "silent")
    assert "without log-probabilities" in headers["x-deferral-reason"]
    assert "without log-probabilities" in on_record(running, headers["x-deferral-id"])["reason"]


@pytest.fixture(scope="module")
def tiny() -> Iterator[Any]:
    """A tiny language model with random weights behind an endpoint that reports its tokens' log-probabilities."""
    from deferral.demo.endpoint import app
    from deferral.demo.language import LanguageModel, make_tokenizer, new_model
    from deferral.demo.questions import questions

    asked = [question.text for question in questions(400, seed=0)]
    model = LanguageModel(new_model(width=32, layers=2, heads=4, seed=0), make_tokenizer(asked))
    with served(app(model, "small")) as url:
        yield SimpleNamespace(model=model, questions=asked, url=url)


@pytest.mark.slow
def test_with_a_tiny_models_own_log_probabilities_it_costs_less_than_routing_alone(tiny: Any, tmp_path: Path) -> None:
    """The small model is right, by construction and with noise, where its answer is likelier than its median answer."""
    from deferral.demo.language import Sampling

    prompts = [tiny.model.prompt([{"role": "user", "content": text}]) for text in tiny.questions]
    steps: dict[int, list[Any]] = {number: [] for number in range(len(prompts))}
    for number, step in tiny.model.steps(prompts, [Sampling(8, alternatives=5)] * len(prompts)):
        steps[number].append(step)
    sure = [
        confidence_of(
            [step.logprob for step in one if step.text], [[p for _, p in step.alternatives] for step in one if step.text]
        )
        for one in steps.values()
    ]
    likely = np.array([-np.inf if one is None else one.mean for one in sure])
    generator = np.random.default_rng(0)
    right = (likely > np.median(likely)) ^ (generator.random(len(likely)) < 0.1)
    price = {"small": 0.0001, "large": 0.01}
    log = Log()
    for text, one, good in zip(tiny.questions[:300], sure, right, strict=False):
        log.append(Outcome(text, "small", float(good), price["small"], confidence=one))
        log.append(Outcome(text, "large", 1.0, price["large"]))
    router = Router(0.05, policies=(Linear,)).fit(log)
    router.cascade = fit_cascade(answers_in(log, router, "small"))
    assert router.cascade.why_not(0.05) == "", router.cascade.report(0.05)
    with Upstream() as upstream:
        experts = {"small": Expert("small", tiny.url, logprobs=True), "large": Expert("large", upstream.url)}
        with RunningGateway(router, experts, Settings(database=str(tmp_path / "gateway.db"))) as gateway:
            saved, endings = [], Counter()
            for number in range(300, 360):
                status, headers, reply = gateway.chat(tiny.questions[number], max_tokens=8, temperature=0.0)
                assert status == 200
                ending = headers.get("x-deferral-cascade", "not asked first")
                endings[ending] += 1
                given = headers["x-deferral-expert"]
                if given == "small":
                    assert reply["choices"][0]["message"]["content"] == "".join(step.text for step in steps[number])
                    assert reply["choices"][0]["logprobs"] is None
                alone = router.route(tiny.questions[number]).expert
                cost = {"small": 1 - right[number] + price["small"] / 0.05, "large": price["large"] / 0.05}
                saved.append(cost[alone] - cost[given] - (price["small"] / 0.05 if ending == "deferred" else 0.0))
    assert set(endings) <= {"kept", "deferred", "not asked first"}
    assert endings["kept"] > 10
    assert endings["deferred"] > 10
    assert np.mean(saved) > 0.03, (np.mean(saved), endings)


@pytest.mark.slow
def test_the_command_replaces_a_cascade_only_by_one_that_the_record_shows_to_be_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cascade that is there takes every answer for as good as any other; the record knows who was sure, and rightly."""
    router = unsure_router()
    assert router.cascade is not None
    flat = {
        name: 0 * value if name in ("4.weight", "4.bias", "shifts") else value for name, value in router.cascade.arrays.items()
    }
    router.cascade = replace(router.cascade, arrays=flat)
    router.save(tmp_path / "router")
    generator = np.random.default_rng(0)
    rows, quality = [], {}
    for number in range(800):
        sure, kept = generator.random(2) < 0.5
        told = confidence_of([-0.01, -0.02] if sure else [-2.5, -2.0])
        assert told is not None
        one = through(number, "kept" if kept else "deferred", 0.5)
        cascade = replace(one.cascade, confidence=tuple(told))
        expected = {"expected_quality": {"small": 0.5, "large": 0.95}, "expected_price": {"small": 1e-4, "large": 1e-2}}
        price = 1e-4 if kept else 1e-2 + 1e-4
        rows.append(replace(one, cascade=cascade, price=price, query=None, **expected))
        quality[one.id] = float(generator.random() < (0.95 if not kept else 0.95 if sure else 0.05))
    database = str(tmp_path / "gateway.db")
    asyncio.run(_recorded(database, rows, quality))
    arguments = ["gateway", "cascade", str(tmp_path / "router"), "--database", database]
    before = (tmp_path / "router" / "router.json").read_bytes()
    main([*arguments, "--dry-run"])
    assert (tmp_path / "router" / "router.json").read_bytes() == before
    assert "dry run: " in capsys.readouterr().out
    main(arguments)
    assert "has the new cascade" in capsys.readouterr().out
    found = Router.load(tmp_path / "router").cascade
    assert found is not None
    assert found.why_not(0.05) == ""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 3, "none is better than itself"
