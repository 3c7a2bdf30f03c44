"""Who answers the next turn of a conversation, whether it is in the messages or only named."""

import asyncio
import dataclasses
import json
import math
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import conversations as benchmark
from deferral.errors import DataError
from deferral.gateway import conversations, serve
from deferral.gateway.choice import Choice
from deferral.gateway.deciding import Decider
from deferral.gateway.eligible import Limited
from deferral.gateway.experts_file import Expert, read_experts
from deferral.gateway.hysteresis import RULES as DEFAULT
from deferral.gateway.hysteresis import Rules
from deferral.gateway.requests import Hints, hints
from deferral.gateway.settings import Settings
from deferral.gateway.usage import usage_of
from deferral.routing import Log, Outcome, Router
from tests.faulty_upstream import Upstream
from tests.running_gateway import EASY, HARD, RunningGateway, small_router
from tests.talks import RESULT, asked, said, talk, user

EXPERTS = {name: Expert(name, "http://127.0.0.1:1") for name in ("small", "large")}


# 0.005 errors for every token that has to be read anew, at $0.05 an error.
CACHING = EXPERTS | {"large": Expert("large", "http://127.0.0.1:1", input_price=250.0, cached_input_price=0.0)}


RULES = Rules(up=0.01, down=0.0, patience=2)


def easy(number: int) -> str:
    return f"{EASY} {number} and {number + 1}"


def hard(number: int) -> str:
    return f"{HARD} number {number} in full"


def choose(
    decider: Decider, messages: list[dict], name: bytes = b"", key: str = "", down: tuple[str, ...] = (), **setting: Any
) -> Choice:
    request = decider.read(asked(messages))
    limited = Limited(down=dict.fromkeys(down, 1.0), key=key)
    return asyncio.run(decider.choose(request, Hints(conversation=name, **setting), limited))


def path(decider: Decider, *queries: str, **options: Any) -> list[str]:
    """Who is asked for each of the queries."""
    return [choose(decider, talk(*queries[:end]), **options).ranking[0] for end in range(1, len(queries) + 1)]


@pytest.fixture(scope="module")
def fitted() -> Router:
    return small_router()


@pytest.fixture
def router(fitted: Router) -> Iterator[Router]:
    """To be changed at will."""
    before = fitted.explore, fitted.salt
    fitted.salt = "the same draws in every run"
    yield fitted
    fitted.explore, fitted.salt = before


def decider(router: Router, experts: dict[str, Expert] = EXPERTS, rules: Rules | None = RULES) -> Decider:
    return Decider(router, experts, deadline_s=1.0, rules=rules)


def test_a_request_without_a_history_is_decided_as_if_there_were_no_conversations(router: Router) -> None:
    router.explore = 0.3
    ours, plain = decider(router, CACHING), decider(router, CACHING, rules=None)
    for number in range(20):
        for text in (easy(number), hard(number), "hello"):
            messages = [{"role": "system", "content": "be brief"}, user(text)]
            request = asked(messages)
            assert ours.read(request) is request
            assert choose(ours, messages) == choose(plain, messages)
            named = choose(ours, messages, name=f"{number} {text}".encode())
            assert named == choose(plain, messages), "and so is the first of a named conversation"


def test_a_conversation_goes_up_at_once_and_down_when_it_is_sure(router: Router) -> None:
    both = decider(router)
    assert path(both, easy(1), hard(1), easy(2), easy(3), easy(4)) == ["small", "large", "large", "small", "small"]
    assert path(both, hard(1), easy(1), hard(2), easy(2), hard(3)) == ["large"] * 5
    assert path(decider(router, rules=None), hard(1), easy(1), hard(2)) == ["large", "small", "large"]


def test_a_change_has_to_be_worth_the_lost_prompt_cache(router: Router) -> None:
    caching = decider(router, CACHING)
    short, long = talk(easy(1), hard(1)), [{"role": "system", "content": "x" * 800}, *talk(easy(1), hard(1))]
    assert choose(caching, short).ranking[0] == "large"
    stays = choose(caching, long)
    assert stays.ranking[0] == "small"
    saved = stays.cost["small"] - stays.cost["large"]
    assert saved > 0.7
    assert f"stays with small: large would save {saved:.3f} errors" in stays.reason
    assert ", a change costs " in stays.reason
    assert choose(decider(router), long).ranking[0] == "large", "without a discount nothing is lost"
    assert choose(caching, long, price_of_error=5.0).ranking[0] == "large", "at a hundredth of the errors it is"


def test_a_short_follow_up_stays_where_the_conversation_is(router: Router) -> None:
    both = decider(router)
    assert both.conversations is not None
    assert both.conversations.follow_up == len(easy(1)), "no query of the log is shorter"
    for begin, expert in ((hard(1), "large"), (easy(1), "small")):
        for text in ("yes", "go on", "and in French?", " " * 99 + "why?"):
            messages = talk(begin, text)
            choice = choose(both, messages)
            assert choice.ranking[0] == expert
            assert choice.reason.startswith(f"stays with {expert}: the follow-up is short; {expert}: expected quality")
            assert both.read(asked(messages)).query == begin, "what is scored is what goes on record"
    assert path(both, hard(1), easy(1), "yes", "no", easy(2)) == ["large", "large", "large", "large", "small"], (
        "they do not count"
    )
    scored_too = choose(decider(router, rules=dataclasses.replace(RULES, follow_up=0)), talk(hard(1), "yes"))
    assert "the follow-up is short" not in scored_too.reason


def test_an_agent_s_loop_asks_the_same_expert_again(router: Router) -> None:
    router.explore = 0.5
    both = decider(router)
    for number in range(12):
        messages = talk(easy(number), hard(number))
        loop = [choose(both, messages).ranking[0]]
        for call in range(3):
            messages = [*messages, said(None, tool_calls=[]), {"role": "tool", "content": f"{EASY} {call}"}]
            loop.append(choose(both, messages).ranking[0])
            messages = [*messages, said(), user(f"<tool_response>{EASY}</tool_response>")]
            loop.append(choose(both, messages).ranking[0])
        assert len(set(loop)) == 1


def test_what_may_not_be_asked_is_left_at_once_and_returned_to(router: Router) -> None:
    both, messages = decider(router), talk(hard(1), hard(2))
    away = choose(both, messages, down=("large",))
    assert away.ranking == ("small",)
    assert away.reason.startswith("leaves large, which may not be asked now, for small; small: expected quality")
    assert choose(both, talk(hard(1), hard(2), easy(1))).ranking[0] == "large", "it kept its place"
    assert choose(both, talk(hard(1), "yes"), down=("large",)).ranking == ("small",)
    first = choose(both, talk(hard(1)), down=("large",))
    assert first.reason.startswith("small: expected quality"), "nobody is left where nobody was asked"


def test_a_named_conversation_is_where_one_with_all_its_messages_is(router: Router) -> None:
    generator = np.random.default_rng(0)
    router.explore = 0.3
    for number in range(6):
        queries = [(easy, hard)[kind](int(place)) for place, kind in enumerate(generator.integers(0, 2, 8))]
        one, other = decider(router), decider(router)
        for end in range(1, len(queries) + 1):
            whole = choose(one, talk(*queries[:end]))
            alone = choose(other, [user(queries[end - 1])], name=b"number %d" % number)
            again = choose(other, [user(queries[end - 1]), said(), user([RESULT])], name=b"number %d" % number)
            assert alone == again == whole


def test_where_others_may_be_asked_than_when_it_was_drawn_no_chance_is_told(router: Router) -> None:
    """It hangs on what an earlier draw chose, of which nothing is known but the place."""
    router.explore = 0.3
    both = decider(router)
    first = choose(both, [user(hard(1))], name=b"mine")
    [other] = {"small", "large"} - {first.ranking[0]}
    assert choose(both, [user("yes")], name=b"mine").propensity == first.propensity
    assert math.isnan(choose(both, [user("yes")], name=b"mine", down=(other,)).propensity)
    assert choose(both, [user("yes")], name=b"mine").propensity == first.propensity, "and then it is known again"
    away = choose(both, [user("yes")], name=b"mine", down=first.ranking[:1])
    assert (away.ranking[0], math.isnan(away.propensity)) == (other, True)


def test_a_named_conversation_is_held_for_its_key_and_for_a_while(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    both = decider(router)
    choose(both, [user(hard(1))], name=b"mine", key="key")
    follow_up = choose(both, [user("yes")], name=b"mine", key="key")
    assert (follow_up.ranking[0], follow_up.propensity) == ("large", 1.0)
    assert follow_up.reason.startswith("stays with large: the follow-up is short")
    assert choose(both, [user(easy(1))], name=b"mine", key="key").ranking[0] == "large"
    assert choose(both, [user(easy(1))], name=b"mine", key="another").ranking[0] == "small"
    assert choose(both, talk(hard(1), easy(1)), name=b"new").ranking[0] == "large", "what is not held is in the messages"
    now = time.monotonic()
    monkeypatch.setattr(conversations, "monotonic", lambda: now + 3700)
    assert choose(both, [user(easy(2))], name=b"mine", key="key").ranking[0] == "small"
    monkeypatch.setattr(conversations, "_MOST_NAMES", 3)
    held = both.conversations._held  # type: ignore[union-attr]
    for number in range(9):
        choose(both, [user(hard(number))], name=b"%d" % number)
        assert choose(both, [user("yes")], name=b"0").reason.startswith("stays with large"), "in use, it is not forgotten"
    assert len(held) == 3
    assert not any(EASY.encode() in name or HARD.encode() in name for name in held)


def test_long_conversations_are_replayed_from_a_beginning_that_seldom_moves(router: Router) -> None:
    both = decider(router)
    begins, lengths = [], []
    for end in range(1, 30):
        turns = both.read(asked(talk(*(hard(number) for number in range(end))))).turns
        begins.append(turns[0].query)
        lengths.append(len(turns))
    assert max(lengths) == 8
    assert min(lengths[8:]) == 5
    assert len(set(begins)) == 1 + math.ceil((29 - 8) / 4)


def test_the_propensity_is_how_often_that_expert_is_chosen(router: Router) -> None:
    router.explore = 0.3
    both = decider(router)
    for messages, held in ((talk(hard(1), easy(1)), "large"), (talk(easy(1), easy(2)), "small")):
        found: dict[str, list[float]] = {}
        for number in range(150):
            router.salt = f"salt {number}"
            choice = choose(both, messages)
            found.setdefault(choice.ranking[0], []).append(choice.propensity)
        assert {name: set(np.round(values, 6)) for name, values in found.items()} == {
            name: {0.85 if name == held else 0.15} for name in ("small", "large")
        }
        assert len(found[held]) / 150 == pytest.approx(0.85, abs=4 * math.sqrt(0.85 * 0.15 / 150))
    explored = next(choice for choice in _salted(both, router, talk(hard(1), easy(1))) if choice.ranking[0] == "small")
    assert explored.reason.startswith("drawn at random, to learn; the conversation stays with large; small: expected")


def _salted(both: Decider, router: Router, messages: list[dict]) -> Iterator[Choice]:
    for number in range(100):
        router.salt = f"salt {number}"
        yield choose(both, messages)


def test_a_conversation_that_the_static_mix_began_has_the_propensity_of_that_draw() -> None:
    rows = [
        Outcome(f"query {n}", name, good, price)
        for n in range(4)
        for name, good, price in (("small", 0, 1e-4), ("large", 1, 1e-2))
    ]
    router = Router(0.05, explore=0.2).fit(Log(rows))
    both = decider(router)
    counts, propensities = dict.fromkeys(EXPERTS, 0), {}
    messages = talk("a first request, that is long enough", "another request, as long as the first")
    for number in range(150):
        router.salt = f"salt {number}"
        choice = choose(both, messages, min_quality=0.25)
        counts[choice.ranking[0]] += 1
        propensities[choice.ranking[0]] = choice.propensity
    # What is drawn at random counts: 0.15 / 0.8 of the mix is the large one, and 0.2 / 2 beside it.
    assert propensities == pytest.approx({"small": 0.75, "large": 0.25})
    assert counts["large"] / 150 == pytest.approx(0.25, abs=4 * math.sqrt(0.1875 / 150))


def test_weighted_draws_of_conversations_say_what_an_expert_would_have_cost(router: Router) -> None:
    router.explore = 0.5
    both = decider(router)
    generator = np.random.default_rng(0)
    weighted = []
    for number in range(120):
        messages = talk(*((easy, hard)[kind](int(number)) for kind in generator.integers(0, 2, 3)))
        choice = choose(both, messages)
        quality = 1.0 if "large" in choice.ranking[0] or EASY in messages[-1]["content"] else 0.0
        weighted.append((choice.ranking[0] == "small") / choice.propensity * (1 - quality))
    # Half of the last requests are hard, and the small one fails on each of those.
    assert np.mean(weighted) == pytest.approx(0.5, abs=4 * np.std(weighted) / math.sqrt(120))


def test_with_a_slow_encoder_a_conversation_is_decided_in_time_and_scored_once() -> None:
    read: list[str] = []
    slow = 0.0

    def encode(texts: list[str]) -> np.ndarray:
        read.extend(texts)
        time.sleep(slow)
        return np.array([["prove" in text, "add" in text] for text in texts], float)

    router = small_router(encoder=encode)
    patient = Decider(router, EXPERTS, deadline_s=5.0, rules=RULES)
    read.clear()
    assert path(patient, hard(1), easy(1), easy(2)) == ["large", "large", "small"]
    assert read == [hard(1), hard(1), easy(1), easy(2)], "the first was a request by itself; then only what is new is read"
    hasty = Decider(router, EXPERTS, deadline_s=0.02, rules=RULES)
    slow = 0.3
    late = choose(hasty, talk(hard(1), easy(1)))
    slow = 0.0
    patient.close()
    hasty.close()
    assert late.fast_path
    assert "the encoder took longer than 20 ms" in late.reason


def test_prices_of_cached_input(tmp_path: Path) -> None:
    expert = Expert("a", "http://127.0.0.1:1", input_price=2.0, output_price=8.0, cached_input_price=0.5)
    assert expert.price(1000, 100, 600) == pytest.approx((400 * 2 + 600 * 0.5 + 100 * 8) / 1e6)
    assert expert.price(1000, 100, 5000) == pytest.approx((1000 * 0.5 + 100 * 8) / 1e6)
    assert dataclasses.replace(expert, cached_input_price=None).price(1000, 100, 600) == expert.price(1000, 100)
    file = tmp_path / "experts.toml"
    for value in ("3.0", "-1", "true", '"1"'):
        file.write_text(f'[experts.a]\nbase_url = "http://127.0.0.1:1/v1"\ninput_price = 2.0\ncached_input_price = {value}\n')
        with pytest.raises(DataError, match=r"experts.toml:4: expert 'a', cached_input_price: expected"):
            read_experts(file)
    reported = b'{"usage": {"prompt_tokens": 9, "completion_tokens": 6, "prompt_tokens_details": %s}}'
    for details, cached in (
        (b'{"cached_tokens": 7}', 7),
        (b'{"cached_tokens": 99}', 9),
        (b"null", 0),
        (b'{"cached_tokens": -1}', 0),
    ):
        usage = usage_of(reported % details, 1)
        assert usage is not None
        assert usage.cached_tokens == cached


def test_the_header_that_names_a_conversation() -> None:
    assert hints({b"x-deferral-conversation": b"mine"}).conversation == b"mine"
    assert hints({b"x-deferral-conversation": b""}).conversation == b""
    assert hints({}).conversation == b""


def test_the_options_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Settings] = []
    monkeypatch.setattr(serve, "run", lambda settings, **_: served.append(settings))
    file = tmp_path / "experts.toml"
    file.touch()
    for options in ([], ["--patience", "3", "--follow-up", "10"], ["--no-conversations"]):
        assert CliRunner().invoke(serve.serve, [str(tmp_path), "--experts", str(file), *options]).exit_code == 0
    assert [settings.conversations for settings in served] == [DEFAULT, Rules(patience=3, follow_up=10), None]


def test_the_table_in_the_documentation_is_that_of_the_results() -> None:
    page = benchmark.PAGE.read_text(encoding="utf-8")
    record = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    assert benchmark.with_table(page, record) == page, "run python -m benchmarks conversations"
    assert Rules(**record["measured"]["rules"]) == DEFAULT


@pytest.mark.ci_slow
def test_conversations_through_a_gateway(tmp_path: Path) -> None:
    file = tmp_path / "experts.toml"
    with Upstream() as upstream:
        address = f'base_url = "http://127.0.0.1:{upstream.port}/v1"\n'
        file.write_text(f"[experts.small]\n{address}[experts.large]\n{address}", encoding="utf-8")
        database = tmp_path / "gateway.db"
        settings = Settings(database=str(database), conversations=RULES, store_text=True, retention_days=1)
        with RunningGateway(small_router(), read_experts(file), settings) as gateway:

            def ask(messages: list[dict], **headers: str) -> str:
                status, given, _ = gateway.ask("POST", "/v1/chat/completions", {"model": "auto", "messages": messages}, **headers)
                assert status == 200
                return given["x-deferral-expert"]

            assert [ask(talk(*(hard(1), easy(1), easy(2))[:end])) for end in (1, 2, 3)] == ["large", "large", "small"]
            assert ask([*talk(hard(1)), said(None, tool_calls=[]), {"role": "tool", "content": EASY}]) == "large"
            named = [ask([user(text)], x_deferral_conversation="mine") for text in (hard(2), easy(3), "yes", easy(4))]
            assert named == ["large", "large", "large", "small"]
            assert ask(talk(hard(3), "go on")) == "large"
            again = [ask([user(text)], x_deferral_conversation="again") for text in (hard(4), hard(4), hard(4), "yes")]
            assert again == ["large"] * 4
    with closing(sqlite3.connect(database)) as connection:
        kept = connection.execute(
            "select query, reason, draw from decisions join texts on decision = id order by decisions.time"
        ).fetchall()
    assert [query for query, _, _ in kept] == [
        hard(1), easy(1), easy(2), hard(1), hard(2), easy(3), "yes", easy(4), hard(3), *[hard(4)] * 3, "yes"
    ]  # fmt: skip
    assert kept[1][1].startswith("stays with large: small would save 0.1")
    assert ", for 1 of 2 requests" in kept[1][1]
    assert kept[2][1].startswith("leaves large for small: it saves 0.1")
    assert kept[8][1].startswith("stays with large: the follow-up is short")
    drawn = [draw for _, _, draw in kept]
    assert None not in drawn
    assert (len(set(drawn[-4:])), drawn[5] == drawn[6]) == (1, True), "a follow-up goes where an earlier request was drawn to"
    assert len(set(drawn)) == 8
