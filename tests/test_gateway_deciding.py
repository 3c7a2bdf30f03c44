"""Hard constraints, hints, and what happens when a decision takes too long."""

import asyncio
import json
import math
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from deferral.gateway.choice import Choice, set_aside
from deferral.gateway.deciding import Decider
from deferral.gateway.eligible import Limited, merged, refusal, served
from deferral.gateway.experts_file import Expert
from deferral.gateway.problems import Problem
from deferral.gateway.requests import Asked, Hints, parse
from deferral.routing import Abilities, Needs, Router, log_of_table
from deferral.routing.one_query import price_of_one
from deferral.routing.policies import Neighbours
from tests.running_gateway import EASY, HARD, small_router
from tests.test_routing_dearness import asked as priced_answers
from tests.test_routing_dearness import counts

EXPERTS = {
    "small": Expert("small", "http://127.0.0.1:1", context_tokens=1000, tools=False, images=False, responses=False, region="eu"),
    "large": Expert("large", "http://127.0.0.1:1", region="us"),
}


@pytest.fixture(scope="module")
def router() -> Router:
    return small_router()


@pytest.fixture(scope="module")
def decider(router: Router) -> Decider:
    return Decider(router, EXPERTS, deadline_s=1.0)


def asked(query: str = EASY, **needs) -> Asked:
    return Asked(
        **(
            {"model": "auto", "query": query, "tokens": 10, "output_tokens": 0, "tools": False, "images": False, "stream": False}
            | needs
        )
    )


def choose(decider: Decider, request: Asked, limited: Limited | None = None, **hints) -> Choice:
    return asyncio.run(decider.choose(request, Hints(**hints), limited or Limited()))


def test_the_cheapest_expected_cost_is_asked_first_and_the_others_after_it(decider: Decider, router: Router) -> None:
    for query, ranking in ((EASY, ("small", "large")), (HARD, ("large", "small"))):
        choice = choose(decider, asked(query))
        expected = router.route(query)
        assert choice.ranking == ranking
        assert choice.ranking[0] == expected.expert
        assert (dict(choice.cost), choice.propensity, choice.price_of_error) == (expected.cost, 1.0, 0.05)
        assert choice.best == "large"
        assert not choice.fast_path


@pytest.mark.parametrize("needs", [{"tools": True}, {"images": True}, {"responses": True}, {"tokens": 999, "output_tokens": 2}])
def test_what_the_small_one_cannot_do_the_large_one_does(decider: Decider, needs: dict) -> None:
    choice = choose(decider, asked(**needs))
    assert choice.ranking == ("large",)
    assert set(choice.cost) == {"large"}


def test_what_router_and_file_say_of_an_expert_holds_together(router: Router) -> None:
    router.abilities = {"large": Abilities(context_tokens=50)}
    try:
        decider = Decider(router, EXPERTS, deadline_s=1.0)
    finally:
        router.abilities = {}
    assert choose(decider, asked(HARD, tokens=51)).ranking == ("small",)
    assert refusal(decider.experts["large"], asked(tokens=51), Hints(), None), "nor by its name"
    with pytest.raises(Problem, match="exceed its window of 50"):
        choose(decider, asked(tokens=51, tools=True))


def test_an_expert_can_do_what_both_router_and_file_say_that_it_can() -> None:
    both = merged(Expert("one", "http://127.0.0.1:1", context_tokens=100, tools=False), Abilities(200, images=False, region="eu"))
    assert (both.context_tokens, both.tools, both.images, both.region) == (100, False, False, "eu")
    one = Expert("one", "http://127.0.0.1:1", images=False, region="us")
    other = merged(one, Abilities(tools=False, region="eu"))
    assert (other.context_tokens, other.tools, other.images, other.region) == (None, False, False, "us")


def test_an_expert_that_is_nowhere_answers_for_no_region(router: Router) -> None:
    decider = Decider(router, {**EXPERTS, "large": replace(EXPERTS["large"], region=None)}, deadline_s=1.0)
    assert choose(decider, asked(HARD), regions=frozenset({"eu"})).ranking == ("small",)
    with pytest.raises(Problem, match="small: it is in eu; large: its region is not known"):
        choose(decider, asked(HARD), regions=frozenset({"us"}))


def test_an_empty_mask_is_a_clear_400(decider: Decider) -> None:
    for request, limited, hints, words in (
        (asked(tools=True), Limited(allow={"small"}), {}, "small: it takes no tools"),
        (asked(responses=True), Limited(allow={"small"}), {}, "small: it has no /responses"),
        (asked(), Limited(allow={"another"}), {}, "none is allowed for this key"),
        (asked(), Limited(), {"regions": frozenset({"mars"})}, "small: it is in eu; large: it is in us"),
        (asked(), Limited(), {"max_latency": 0.01}, "no expert that may be asked answers within 0.01 s"),
        (asked(), Limited(allow={"small"}), {"max_latency": 0.01}, "answers within 0.01 s on average (small "),
        (asked(), Limited(), {"budget": 0.001}, "the cheapest expert costs"),
        (asked(), Limited(), {"budget": 1.0, "price_of_error": 1.0}, "expected one of"),
    ):
        with pytest.raises(Problem) as caught:
            choose(decider, request, limited, **hints)
        assert caught.value.status == 400
        assert words in caught.value.message
        assert "large" not in caught.value.message or limited.allow is None, "a key is not told of experts it may not ask"


def test_who_is_down_is_not_asked_and_if_all_are_the_client_is_told_when_to_come_back(decider: Decider) -> None:
    assert choose(decider, asked(EASY), Limited(down={"small": 9.0})).ranking == ("large",)
    with pytest.raises(Problem) as caught:
        choose(decider, asked(EASY), Limited(down={"small": 9.0, "large": 3.2}))
    assert (caught.value.status, caught.value.headers["retry-after"]) == (503, "4")


def test_a_limit_of_all_who_are_left_is_told_as_a_limit_and_not_as_an_outage(decider: Decider) -> None:
    for busy, status, code in (({"small", "large"}, 429, "experts_busy"), ({"small"}, 503, "experts_down")):
        with pytest.raises(Problem) as caught:
            choose(decider, asked(EASY), Limited(down={"small": 9.0, "large": 3.2}, busy=frozenset(busy)))
        assert (caught.value.status, caught.value.code, caught.value.headers["retry-after"]) == (status, code, "4")


def test_a_setting_that_only_those_who_are_down_can_meet_is_worth_coming_back_for(decider: Decider) -> None:
    for down, hints, query in (
        ({"large": 3.2}, {"min_quality": 0.9}, HARD),
        ({"small": 3.2}, {"max_latency": 0.5}, EASY),
        ({"small": 3.2}, {"budget": 1.0}, EASY),
    ):
        with pytest.raises(Problem, match=f"down for the moment: {next(iter(down))}") as caught:
            choose(decider, asked(query), Limited(down=down), **hints)
        assert (caught.value.status, caught.value.code, caught.value.headers["retry-after"]) == (503, "experts_down", "4")
    with pytest.raises(Problem) as caught:
        choose(decider, asked(HARD), Limited(down={"large": 3.2}), budget=0.001)
    assert caught.value.status == 400, "nobody is that cheap"


def test_a_setting_that_the_rest_of_a_budget_cannot_meet_is_left_to_the_budget(decider: Decider) -> None:
    choice = choose(decider, asked(HARD), Limited(left=0.005), min_quality=0.99)
    assert choice.ranking == ("large",), "which the budget refuses"
    # The mix asks the small one for half of the queries, and cannot do without the others.
    mixed = [choose(decider, asked(f"{HARD} {number}"), Limited(left=0.005), min_quality=0.75) for number in range(20)]
    assert {one.ranking for one in mixed} == {("large",)}


def test_the_trade_off_is_turned_by_hints_and_by_a_budget_that_runs_low(decider: Decider) -> None:
    assert choose(decider, asked(HARD)).ranking[0] == "large"
    assert choose(decider, asked(HARD), price_of_error=0.001).ranking[0] == "small"
    thrifty = choose(decider, asked(HARD), Limited(thrift=0.02))
    assert thrifty.ranking[0] == "small"
    assert thrifty.price_of_error == pytest.approx(0.001)
    assert choose(decider, asked(HARD), max_latency=0.5).ranking == ("small",)
    assert choose(decider, asked(HARD), Limited(left=0.005)).ranking == ("small",)
    assert choose(decider, asked(HARD), Limited(left=0.0)).ranking == ("small",), "the budget itself refuses"
    assert choose(decider, asked(HARD), Limited(left=0.0), max_latency=0.5).ranking == ("small",)
    assert choose(decider, asked(HARD), min_quality=0.99).ranking[0] == "large"


def test_who_is_too_dear_is_told_by_all_that_is_sent(router: Router) -> None:
    prices = {"small": 0.01, "large": 2.0}
    decider = Decider(
        router, {name: Expert(name, "http://127.0.0.1:1", input_price=price) for name, price in prices.items()}, deadline_s=1.0
    )
    long = asked(HARD, tokens=100_000)
    assert choose(decider, long, Limited(left=0.5)).ranking[0] == "large"
    # The query alone is expected to cost a cent of the large one; what comes with it is $0.20 of input.
    choice = choose(decider, long, Limited(left=0.1))
    assert choice.ranking == ("small",)
    assert choose(decider, asked(HARD), Limited(left=0.1)).ranking[0] == "large"
    assert choose(decider, long, Limited(left=0.0)).ranking == ("small",), "the budget itself refuses"
    decider.close()


def test_the_static_mix_of_a_late_decision_says_how_probable_it_was_and_whom_nobody_may_ask(
    decider: Decider, router: Router
) -> None:
    plan = replace(router.plan(needs=Needs.of(allow=["small"])), mix=np.array([0.25, 0.75]))
    found = decider._by_mix(plan, "a query")
    assert found.propensity.tolist() == [0.25 if found.names == ["small"] else 0.75]
    assert np.isfinite(found.cost).tolist() == [[True, False]]


def test_an_expert_that_is_not_to_be_chosen_is_not(router: Router) -> None:
    assert served(router, {**EXPERTS, "large": replace(EXPERTS["large"], route=False)}) == ["small"]


def test_what_is_left_of_a_budget_may_be_spent_to_the_last(decider: Decider) -> None:
    choice = choose(decider, asked(HARD))
    dollars = set_aside(EXPERTS["large"], choice, asked(HARD))
    assert choose(decider, asked(HARD), Limited(left=dollars)).ranking == ("large", "small")
    assert choose(decider, asked(HARD), Limited(left=0.999 * dollars)).ranking == ("small",)


def test_a_cap_on_the_time_holds_where_a_budget_runs_low(decider: Decider) -> None:
    low = Limited(thrift=0.9)
    assert choose(decider, asked(HARD), low).ranking[0] == "large"
    assert choose(decider, asked(HARD), low, max_latency=0.5).ranking == ("small",)


def test_past_the_deadline_the_static_mix_decides_and_says_so() -> None:
    may_go_on = threading.Event()
    may_go_on.set()

    def encode(texts: list[str]) -> np.ndarray:
        may_go_on.wait()
        return np.array([[len(text), text.count("e"), "prove" in text, 1.0] for text in texts], float)

    router = small_router(encoder=encode)
    decider = Decider(router, EXPERTS, deadline_s=0.05)
    in_time = choose(decider, asked(EASY))
    may_go_on.clear()
    late = choose(decider, asked(EASY))  # while the encoder waits, until the next line
    may_go_on.set()
    decider.close()
    assert not in_time.fast_path
    assert late.fast_path
    assert "the encoder took longer than 50 ms" in late.reason
    assert set(late.ranking) == {"small", "large"}
    assert late.propensity == router.plan().mix[router.experts.index(late.ranking[0])]


def test_a_worker_with_too_much_to_do_is_not_waited_for(router: Router) -> None:
    decider = Decider(router, EXPERTS, deadline_s=60.0)

    may_go_on = threading.Event()

    async def run() -> list:
        asked_of_it = [asyncio.ensure_future(decider._in_worker(may_go_on.wait)) for _ in range(50)]
        while not asked_of_it[-1].done():
            await asyncio.sleep(0)
        may_go_on.set()
        return await asyncio.gather(*asked_of_it)

    results = asyncio.run(run())
    decider.close()
    assert results.count(True) == 32
    assert results.count(None) == 18


def test_all_who_come_with_a_new_setting_wait_for_one_plan_and_not_for_each_other(router: Router) -> None:
    decider, made, planned = Decider(router, EXPERTS, deadline_s=1.0), [], Router.plan

    def slowly(*arguments, **setting):
        made.append((threading.current_thread().name, setting["max_latency"]))
        time.sleep(0.2)
        return planned(*arguments, **setting)

    async def run() -> list:
        waiting = [asyncio.create_task(decider.choose(asked(EASY), Hints(max_latency=50.0), Limited())) for _ in range(40)]
        await asyncio.sleep(0.05)
        waiting[0].cancel()
        await decider.choose(asked(EASY), Hints(), Limited())
        assert not any(one.done() for one in waiting[1:]), "who has a plan does not wait for those who have none"
        return await asyncio.gather(*waiting, return_exceptions=True)

    choose(decider, asked(EASY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router, "plan", lambda **setting: slowly(router, **setting))
        results = asyncio.run(run())
    decider.close()
    assert [at for name, at in made if name.startswith("plan")] == [50.0]
    assert len(made) == 1, "the usual setting was planned before"
    assert isinstance(results[0], asyncio.CancelledError)
    assert {choice.ranking[0] for choice in results[1:]} == {"small"}


def test_settings_of_clients_neither_drive_out_nor_hold_up_the_usual_plans(router: Router) -> None:
    of_an_alias = Hints(budget=99.0)
    decider, planned = Decider(router, EXPERTS, deadline_s=1.0, settings=[of_an_alias.setting]), Router.plan

    def slowly(**setting):
        if setting.get("budget") is not None:
            time.sleep(0.03)
        return planned(router, **setting)

    async def run() -> None:
        for number in range(300):
            await decider.choose(asked(EASY), Hints(price_of_error=0.05 + number / 1e6), Limited())
        flood = [asyncio.create_task(decider.choose(asked(EASY), Hints(budget=5.0 + k), Limited())) for k in range(40)]
        await asyncio.sleep(0.01)
        await decider.choose(asked(EASY), Hints(), Limited())
        # One is down, and a plan without it is new.
        await decider.choose(asked(EASY), Hints(), Limited(down={"small": 5.0}))
        await decider.choose(asked(EASY), of_an_alias, Limited())
        waiting = [one for one in flood if not one.done()]
        assert len(waiting) > 20
        turned_away = await asyncio.gather(*flood, return_exceptions=True)
        assert sum(isinstance(one, Problem) and one.code == "busy" for one in turned_away) == 8

    choose(decider, asked(EASY))
    usual = dict(decider._plans._usual)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router, "plan", slowly)
        asyncio.run(run())
    decider.close()
    assert usual.items() <= decider._plans._usual.items()


def test_exploration_has_the_propensity_that_it_says(router: Router) -> None:
    before = router.explore, router.salt
    router.explore, router.salt = 0.2, "the same draws in every run"
    try:
        decider = Decider(router, EXPERTS, deadline_s=1.0)
        choices = [choose(decider, asked(f"{EASY} {number}")) for number in range(600)]
    finally:
        router.explore, router.salt = before
    rare = [choice for choice in choices if choice.propensity < 0.5]
    assert {round(choice.propensity, 3) for choice in choices} == {0.1, 0.9}
    assert {choice.ranking[0] for choice in rare} == {"large"}
    assert len(rare) == pytest.approx(60, abs=3 * math.sqrt(600 * 0.1 * 0.9)), "drawn as often as its propensity says"


def test_where_a_budget_leaves_one_expert_nothing_is_drawn(router: Router) -> None:
    before = router.explore
    router.explore = 0.2
    try:
        decider = Decider(router, EXPERTS, deadline_s=1.0)
        choices = [choose(decider, asked(f"{HARD} {number}"), Limited(left=0.005)) for number in range(200)]
    finally:
        router.explore = before
    assert {(choice.ranking, choice.propensity) for choice in choices} == {(("small",), 1.0)}


def test_each_of_several_inputs_has_the_window_to_itself() -> None:
    expert = Expert("e", "http://127.0.0.1:1", context_tokens=1000)

    def refused(kind, **fields) -> str:
        return refusal(expert, parse(kind, json.dumps({"model": "e"} | fields).encode()), Hints(), None)

    for inputs in (["x" * 2000] * 10, [[12_345] * 900] * 10, [12_345] * 900):
        assert not refused("embeddings", input=inputs)
        assert not refused("completions", prompt=inputs, max_tokens=100)
    for inputs in (["x" * 2000, "x" * 4004], [[1] * 1001], [1] * 1001, "x" * 4004):
        assert "exceed its window of 1000" in refused("embeddings", input=inputs)
    assert "about 950 tokens and 100" in refused("completions", prompt=[[1] * 950], max_tokens=100)
    assert parse("embeddings", json.dumps({"model": "e", "input": ["x" * 2000] * 10}).encode()).tokens > 5000, "all are paid for"


def test_many_decisions_at_once_leave_the_event_loop_time_for_others(router: Router) -> None:
    async def run() -> tuple[int, int]:
        decider = Decider(router, EXPERTS, deadline_s=1.0)
        choices = asyncio.gather(*(decider.choose(asked(f"{EASY} {number}"), Hints(), Limited()) for number in range(40)))
        rounds = 0
        while not choices.done():
            rounds += 1
            await asyncio.sleep(0)
        return rounds, len(await choices)

    rounds, decided = asyncio.run(run())
    assert decided == 40
    assert rounds >= 3, "sixteen at a time"


def test_a_turn_waits_for_company_and_no_longer_than_it_is_told(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now, soon, later = 100.0, 0, []

        def time(self) -> float:
            return self.now

        def create_future(self) -> asyncio.Future:
            return asyncio.Future(loop=loop)

        def call_soon(self, *_: object) -> None:
            self.soon += 1

        def call_later(self, seconds: float, *_: object) -> None:
            self.later.append(seconds)

    clock, loop, decider = Clock(), asyncio.new_event_loop(), Decider(router, EXPERTS, deadline_s=1.0)
    monkeypatch.setattr("deferral.gateway.deciding.asyncio.get_running_loop", lambda: clock)
    plan = router.plan()
    decider._in_turn(plan, EASY, 0.004)
    assert (clock.soon, clock.later) == (1, []), "the first turn waits for nobody"
    decider._turn(clock)  # type: ignore[arg-type]
    clock.now += 0.001
    waiting = [decider._in_turn(plan, f"{EASY} {number}", 0.004) for number in range(5)]
    assert (clock.soon, clock.later) == (1, [pytest.approx(0.003)]), "one turn for all five"
    decider._turn(clock)  # type: ignore[arg-type]
    assert all(future.done() for future in waiting)
    decider._in_turn(plan, EASY, 0.0)
    assert clock.soon == 2, "alone it is decided at once"
    loop.close()


def test_turns_are_the_further_apart_the_more_requests_are_under_way(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    decider, apart = Decider(router, EXPERTS, deadline_s=1.0), []
    in_turn = decider._in_turn
    monkeypatch.setattr(decider, "_in_turn", lambda plan, query, wait: apart.append(wait) or in_turn(plan, query, 0.0))
    asked, hints = parse("chat", json.dumps({"model": "auto", "messages": [{"role": "user", "content": EASY}]}).encode()), Hints()

    async def run() -> None:
        for under_way in (1, 2, 4, 5, 64):
            await decider.choose(asked, hints, Limited(), under_way=under_way)

    asyncio.run(run())
    assert apart == pytest.approx([0.0, 0.00075, 0.00225, 0.003, 0.003])


@pytest.mark.parametrize("earlier", [[], [HARD]], ids=["single", "conversation"])
def test_whoever_leaves_while_waiting_for_a_turn_holds_up_nobody(router: Router, earlier: list[str]) -> None:
    turns = [{"role": "user", "content": text} for text in earlier] + [{"role": "assistant", "content": ""}] * len(earlier)

    async def run() -> tuple[list, Choice]:
        decider = Decider(router, EXPERTS, deadline_s=1.0)

        def chosen(number: int) -> asyncio.Task[Choice]:
            messages = [*turns, {"role": "user", "content": f"{EASY} {number}"}]
            request = parse("chat", json.dumps({"model": "auto", "messages": messages}).encode())
            return asyncio.create_task(decider.choose(decider.read(request), Hints(), Limited()))

        waiting = [chosen(number) for number in range(60)]
        for leaving in (waiting[::3], waiting[1::3]):
            await asyncio.sleep(0)
            for task in leaving:
                task.cancel()
        return await asyncio.gather(*waiting, return_exceptions=True), await chosen(99)

    found, later = asyncio.run(run())
    assert all(isinstance(one, Choice) for one in [*found[2::3], later])
    assert any(isinstance(one, asyncio.CancelledError) for one in found)


def test_a_decision_that_fails_is_told_to_all_who_wait_for_it(router: Router) -> None:
    async def run() -> list:
        decider = Decider(router, EXPERTS, deadline_s=1.0)
        decider._decided = lambda *_: 1 / 0  # type: ignore[assignment]
        choices = (decider.choose(asked(f"{EASY} {number}"), Hints(), Limited()) for number in range(40))
        return await asyncio.wait_for(asyncio.gather(*choices, return_exceptions=True), 10)

    assert {type(one) for one in asyncio.run(run())} == {ZeroDivisionError}


def test_a_budget_that_runs_low_goes_by_the_price_that_is_foreseen_and_not_by_the_length() -> None:
    texts, _, quality, price = priced_answers(400)
    dear_proofs = Router(0.2, encoder=counts, policies=(Neighbours,)).fit(
        log_of_table(texts, ["terse", "talker"], quality, price)
    )
    decider = Decider(dear_proofs, {name: Expert(name, "http://127.0.0.1:1") for name in dear_proofs.experts}, deadline_s=5.0)
    texts, proof, _, _ = priced_answers(20, seed=1)
    by_length = price_of_one(dear_proofs.fitted, texts[0])[1]
    # A proof of the talker costs about 0.02, a fact 0.002; by length both 0.011.
    for text, dear in zip(texts, proof, strict=True):
        rich, poor = choose(decider, asked(text)), choose(decider, asked(text), Limited(left=0.005 if not dear else 0.015))
        assert rich.ranking[0] == "talker"
        assert poor.ranking[0] == ("terse" if dear else "talker")
        assert poor.price[poor.ranking[0]] <= (0.015 if dear else 0.005)
        assert 0.005 < by_length < 0.015
    decider.close()
