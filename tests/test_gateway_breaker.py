"""Breaker, retry budget and slots, on a clock of the test's."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deferral.gateway.breaker import Breaker
from deferral.gateway.retries import RetryBudget, backoff
from deferral.gateway.slots import Full, Slots


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        ticket = breaker.enter()
        assert ticket is not None
        breaker.failure(ticket)


def test_five_failures_open_it_and_one_success_closes_it_again(clock: Clock) -> None:
    breaker = Breaker(clock)
    fail(breaker, 4)
    assert breaker.state == "closed"
    fail(breaker)
    assert (breaker.state, breaker.down, breaker.wait, breaker.enter()) == ("open", True, 10, None)
    clock.now += 10
    assert (breaker.state, breaker.down) == ("half-open", False)
    probe = breaker.enter()
    assert probe is not None
    assert breaker.enter() is None, "one at a time"
    breaker.success(probe)
    assert (breaker.state, breaker.down) == ("closed", False)


def test_each_failed_trial_doubles_the_pause(clock: Clock) -> None:
    breaker = Breaker(clock)
    fail(breaker, 5)
    for pause in (10, 20, 40, 80, 160, 300, 300):
        assert breaker.wait == pause
        clock.now += pause
        fail(breaker)
    clock.now += 300
    probe = breaker.enter()
    assert probe is not None
    breaker.success(probe)
    fail(breaker, 5)
    assert breaker.wait == 10


def test_few_failures_among_many_successes_do_not_open_it(clock: Clock) -> None:
    breaker = Breaker(clock)
    for number in range(200):
        ticket = breaker.enter()
        assert ticket is not None
        (breaker.failure if number % 3 == 0 else breaker.success)(ticket)
    assert breaker.state == "closed"


def test_one_keys_failures_do_not_open_it_while_another_is_answered(clock: Clock) -> None:
    breaker = Breaker(clock)

    def call(key: str, good: bool = False) -> None:
        ticket = breaker.enter()
        assert ticket is not None
        if good:
            breaker.success(ticket, key)
        else:
            breaker.failure(ticket, key)

    for number in range(300):
        call("one")
        call("other", good=number % 20 < 19)
    assert breaker.state == "closed", "also where another's fails now and then"
    for _ in range(20):
        if breaker.state == "closed":
            call("other")
    assert breaker.state == "open", "it fails everybody"
    breaker.begin_anew()
    for _ in range(10):
        call("other", good=True)
    for _ in range(10):
        call("one")
    assert breaker.state == "open", "what went well before says nothing of now"
    breaker.begin_anew()
    for _ in range(4):
        call("one")
    call("other", good=True)
    call("one")
    assert breaker.state == "closed"
    fail(breaker)
    assert breaker.state == "open", "no request could have brought about the last"


@pytest.mark.parametrize("keys", [("one",), ("one", "other")], ids=["who asks alone", "who all fail"])
def test_nobodys_failures_are_their_own_doing_once_nobody_is_answered(clock: Clock, keys: tuple[str, ...]) -> None:
    breaker = Breaker(clock)
    for failing in ((), (), (), keys, keys, keys, keys):
        for key in failing:
            breaker.failure(breaker.enter() or 0, key)
        for key in ("one", "other"):
            breaker.success(breaker.enter() or 0, key)
    for number in range(100):
        breaker.failure(breaker.enter() or 0, keys[number % len(keys)])
    assert breaker.state == "closed", "until a moment ago the other was answered"
    clock.now += 61
    for number in range(20):
        if breaker.state == "closed":
            breaker.failure(breaker.enter() or 0, keys[number % len(keys)])
    assert breaker.state == "open"


def test_calls_from_before_it_opened_decide_nothing(clock: Clock) -> None:
    breaker = Breaker(clock)
    early = [breaker.enter() for _ in range(3)]
    fail(breaker, 5)
    breaker.success(early[0])  # type: ignore[arg-type]
    assert breaker.state == "open"
    clock.now += 10
    breaker.failure(early[1])  # type: ignore[arg-type]
    assert breaker.state == "half-open"
    breaker.leave(early[2])  # type: ignore[arg-type]


def test_a_trial_whose_client_left_makes_room_for_another(clock: Clock) -> None:
    breaker = Breaker(clock)
    fail(breaker, 5)
    clock.now += 10
    probe = breaker.enter()
    assert probe is not None
    breaker.leave(probe)
    assert breaker.enter() is not None


def test_the_first_bytes_of_a_trial_let_others_in_however_long_it_goes_on(clock: Clock) -> None:
    breaker = Breaker(clock)
    fail(breaker, 5)
    clock.now += 10
    probe = breaker.enter()
    assert probe is not None
    assert breaker.begun(0) == 0, "of a call from before it opened"
    assert breaker.down
    later = breaker.begun(probe)
    assert (breaker.state, breaker.down) == ("closed", False)
    assert breaker.begun(later) == later
    # How it ends is still told, as of any other call.
    fail(breaker, 4)
    breaker.failure(later)
    assert breaker.state == "open"


def test_rest_is_no_failure_and_ends(clock: Clock) -> None:
    breaker = Breaker(clock)
    ticket = breaker.enter()
    assert ticket is not None
    breaker.rest(7, ticket)
    assert (breaker.state, breaker.down, breaker.wait) == ("resting", True, 7)
    clock.now += 7
    assert (breaker.state, breaker.down) == ("closed", False)
    ticket = breaker.enter()
    assert ticket is not None
    breaker.rest(1, ticket)
    assert (breaker.state, breaker.down) == ("closed", True), "no news"
    clock.now += 1
    ticket = breaker.enter()
    assert ticket is not None
    breaker.rest(1e9, ticket)
    assert breaker.wait == 300, "nobody rests for ever"


def test_it_is_busy_as_long_as_nothing_is_wrong_but_a_limit(clock: Clock) -> None:
    for rests, busy in (([True], True), ([True, True], True), ([False], False), ([True, False], False), ([False, True], False)):
        breaker = Breaker(clock)
        tickets = [breaker.enter() or 0 for _ in rests]
        for ticket, limited in zip(tickets, rests, strict=True):
            breaker.rest(10, ticket, limited=limited)
        assert (breaker.down, breaker.busy) == (True, busy)
        clock.now += 10
        assert (breaker.down, breaker.busy) == (False, False)
    fail(breaker, 5)
    clock.now += 10
    breaker.rest(20, breaker.enter() or 0, limited=True)
    assert (breaker.down, breaker.busy) == (True, False), "it had failed before"


def test_failures_do_not_shorten_a_rest_that_was_asked_for(clock: Clock) -> None:
    breaker = Breaker(clock)
    tickets = [ticket for ticket in (breaker.enter() for _ in range(6)) if ticket is not None]
    breaker.rest(60, tickets[0])
    for ticket in tickets[1:]:
        breaker.failure(ticket)
    assert (breaker.state, breaker.wait) == ("open", 60)


@settings(max_examples=30)
@given(share=st.sampled_from([0.0, 0.1, 0.2, 1.0]), requests=st.integers(0, 500), greed=st.integers(0, 4))
def test_retries_are_a_share_of_the_requests(share: float, requests: int, greed: int) -> None:
    budget = RetryBudget(share)
    retries = 0
    for _ in range(requests):
        budget.request()
        retries += sum(budget.take() for _ in range(greed))
    assert retries <= 10 * (share > 0) + share * requests + 1e-6


@pytest.mark.parametrize("share", [0.25, 0.1])
def test_a_retry_is_worth_as_many_requests_as_its_share_says_and_ten_are_saved_up(share: float) -> None:
    budget = RetryBudget(share)
    for requests, retries in ((0, 10), (round(1 / share) - 1, 0), (1, 1), (round(5 / share), 5), (1000, 10)):
        for _ in range(requests):
            budget.request()
        assert sum(budget.take() for _ in range(20)) == retries


def test_backoff_is_anything_up_to_a_doubling_bound() -> None:
    assert [backoff(attempt, 1.0) for attempt in range(1, 8)] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert backoff(3, 0.0) == 0
    random.seed(0)
    assert len({backoff(1) for _ in range(10)}) == 10


def test_slots_are_handed_on_in_order_and_a_full_queue_says_when_to_come_back() -> None:
    async def run() -> None:
        slots = Slots(2, 3)
        await slots.take(1)
        await slots.take(1)
        order: list[int] = []

        async def wait(number: int) -> None:
            await slots.take(5)
            order.append(number)

        tasks = [asyncio.create_task(wait(number)) for number in range(3)]
        await asyncio.sleep(0)
        assert slots.queued == 3
        with pytest.raises(Full) as full:
            await slots.take(1)
        assert full.value.retry_after >= 1
        tasks[1].cancel()
        await asyncio.sleep(0)
        slots.give_back(0.1)
        slots.give_back(0.1)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [0, 2]
        assert slots.taken == 2
        slots.give_back(0.1)
        slots.give_back(0.1)
        assert (slots.taken, slots.queued) == (0, 0)

    asyncio.run(run())


def test_a_slot_that_comes_too_late_is_not_lost() -> None:
    async def run() -> None:
        slots = Slots(1, 5)
        await slots.take(1)
        with pytest.raises(Full):
            await slots.take(0.01)
        assert slots.queued == 0
        slots.give_back(0.0)
        await slots.take(0.01)
        assert slots.taken == 1
        # Handed over and cancelled in the same moment: the next one gets it.
        first, second = asyncio.create_task(slots.take(5)), asyncio.create_task(slots.take(5))
        await asyncio.sleep(0)
        slots.give_back(0.0)
        first.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        assert second.exception() is None
        slots.give_back(0.0)
        assert slots.taken == 0

    asyncio.run(run())


def test_other_limits_let_those_in_who_wait() -> None:
    async def run() -> None:
        slots = Slots(1, 5)
        await slots.take(1)
        waiting = [asyncio.create_task(slots.take(5)) for _ in range(3)]
        await asyncio.sleep(0)
        slots.resize(3, 5)
        await asyncio.sleep(0.01)
        assert (slots.taken, slots.queued, sum(task.done() for task in waiting)) == (3, 1, 2)
        slots.resize(1, 5)
        for _ in range(2):
            slots.give_back(0.0)
        assert (slots.taken, slots.queued) == (1, 1)
        slots.give_back(0.0)
        await asyncio.gather(*waiting)
        slots.give_back(0.0)
        assert slots.taken == 0

    asyncio.run(run())


def test_a_key_that_asks_for_everything_leaves_the_others_their_turn() -> None:
    async def run() -> None:
        slots = Slots(4, 6)
        order: list[str] = []

        async def ask(key: str) -> None:
            await slots.take(5, key)
            order.append(key)

        hog = [asyncio.create_task(ask("hog")) for _ in range(10)]
        await asyncio.sleep(0)
        assert (slots.taken, slots.queued) == (4, 6)
        # The queue is full: the last of who has most in it makes room, and only for who has less.
        others = [asyncio.create_task(ask(key)) for key in ("b", "c", "b", "hog")]
        await asyncio.sleep(0.01)
        assert slots.queued == 6
        assert [isinstance(task.exception(), Full) for task in hog if task.done()] == [False] * 4 + [True] * 3
        assert isinstance(others[3].exception(), Full)
        order.clear()
        for _ in range(4):
            slots.give_back(0.1, "hog")
            await asyncio.sleep(0)
        # With as many slots as the others it is again for who came first.
        assert order == ["b", "c", "hog", "hog"]
        slots.give_back(0.1, "c")
        await asyncio.sleep(0)
        assert order[4:] == ["b"]
        for key in ("b", "b", "hog", "hog"):
            slots.give_back(0.1, key)
        await asyncio.sleep(0)
        assert (slots.taken, slots.queued, order[5:]) == (1, 0, ["hog"])

    asyncio.run(run())


@pytest.mark.parametrize(("slots", "batches"), [(1, ["a"]), (1, ["a", "b"]), (2, ["a", "b"])])
def test_who_asks_seldom_waits_for_one_answer_also_where_a_batch_has_a_single_slot(slots: int, batches: list[str]) -> None:
    async def run() -> None:
        expert, order = Slots(slots, 100), []

        async def ask(key: str) -> None:
            await expert.take(5, key)
            order.append(key)

        tasks = [asyncio.create_task(ask(key)) for _ in range(20) for key in batches]
        await asyncio.sleep(0)
        for turn in range(16):
            if turn in (5, 9, 13):
                tasks.append(asyncio.create_task(ask("seldom")))
                await asyncio.sleep(0)
            expert.give_back(0.1, order[turn])
            await asyncio.sleep(0)
        assert [place for place, key in enumerate(order) if key == "seldom"] == [slots + turn for turn in (5, 9, 13)]
        for task in tasks:
            task.cancel()

    asyncio.run(run())


def test_keys_that_ask_all_the_time_have_the_same_share_of_one_slot() -> None:
    async def run() -> None:
        expert, order = Slots(1, 100), []

        async def ask(key: str) -> None:
            while True:
                await expert.take(5, key)
                order.append(key)
                await asyncio.sleep(0)
                expert.give_back(0.1, key)

        tasks = [asyncio.create_task(ask(key)) for key in ["batch"] * 30 + ["chat"] * 2 + ["other"] * 3]
        while len(order) < 300:
            await asyncio.sleep(0)
        assert all(95 <= order[:300].count(key) <= 105 for key in ("batch", "chat", "other"))
        for task in tasks:
            task.cancel()

    asyncio.run(run())


def test_places_are_counted_once_whatever_becomes_of_who_waits() -> None:
    async def run(seed: int) -> None:
        draw = random.Random(seed)
        pair = Slots(3, 5), Slots(1, 8)
        held: list[tuple[Slots, str]] = []

        async def ask(at: int, key: str) -> None:
            held.append((await pair[at].take(draw.choice([0.0, 0.001, 5]), key, pair[1 - at :][:1]), key))

        def give_back(place: int) -> None:
            slots, key = held.pop(place)
            slots.give_back(0.0, key)
            while slots.let_in([each for each in pair if each is not slots]):
                pass

        tasks: list[asyncio.Task[None]] = []
        for _ in range(200):
            match draw.randrange(5):
                case 0 | 1:
                    tasks.append(asyncio.create_task(ask(draw.randrange(2), draw.choice("abc"))))
                case 2 if tasks:
                    draw.choice(tasks).cancel()
                case 3 if held:
                    give_back(draw.randrange(len(held)))
                case 4:
                    draw.choice(pair).resize(draw.randint(1, 4), draw.randint(0, 6))
            if draw.random() < 0.5:
                await asyncio.sleep(0)
            assert sum(slots.taken for slots in pair) >= len(held)
        while held or not all(task.done() for task in tasks):
            await asyncio.sleep(0.002)
            while held:
                give_back(-1)
        assert [(slots.taken, slots.queued, slots._held, slots._queues) for slots in pair] == [(0, 0, {}, {})] * 2

    for seed in range(30):
        asyncio.run(run(seed))


def test_with_another_key_it_begins_anew_and_calls_of_before_decide_nothing() -> None:
    breaker = Breaker()
    tickets = [breaker.enter() for _ in range(6)]
    for ticket in tickets[:5]:
        assert ticket is not None
        breaker.failure(ticket)
    assert breaker.down
    breaker.begin_anew()
    assert (breaker.state, breaker.down, breaker.wait <= 0) == ("closed", False, True)
    assert tickets[5] is not None
    breaker.failure(tickets[5])
    assert not breaker._calls
    breaker.rest(60.0, tickets[5], limited=True)
    assert not breaker.down, "it was the other key that asked too often"
