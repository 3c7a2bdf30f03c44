"""A candidate router beside the live one: it changes no reply, and what is said of it is what it would have done."""

import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sqlalchemy import delete, literal, null, select, update

from deferral.cli import main
from deferral.gateway.agreement import Gain, _live, agreement
from deferral.gateway.choice import Choice
from deferral.gateway.database import connect
from deferral.gateway.dialects import insert_rows
from deferral.gateway.experts_file import Expert
from deferral.gateway.preparing import prepare
from deferral.gateway.rows import CascadeRow, cascade_values, values
from deferral.gateway.schema import cascades, decisions, feedback, shadows
from deferral.gateway.settings import Settings
from deferral.gateway.shadow import Shadow, load_shadow
from deferral.gateway.what_if import what_if
from deferral.routing import Router
from deferral.routing.decisions import AT_RANDOM
from tests.faulty_upstream import Upstream
from tests.gateway_rows import row
from tests.running_gateway import EASY, HARD, RunningGateway, small_router

ADMIN = "an-admin-key-of-some-length"
ERROR, PRICE = 0.02, {"small": 0.001, "large": 0.01}


@pytest.fixture(scope="module")
def router() -> Router:
    return small_router()


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def recorded(path: Path, count: int, *, explore: float, judged: bool = True, calls: int = 1) -> str:
    """The live router always asks the small expert, but for what it explores; the candidate the large one where it is hard.

    With `calls`, so many requests in a row have the same query.
    """
    generator, engine = np.random.default_rng(3), connect(str(path))
    prepare(engine)
    rows, said, shadowed = [], [], []
    for number in range(count):
        hard = number % 2 == 1
        quality = {"small": 0.7, "large": 0.9}
        chosen = str(generator.choice(["small", "large"])) if generator.random() < explore else "small"
        cost = {"small": 0.3, "large": 0.4}
        made = row(
            number, time=1000.0 + number, expert=chosen, chosen=chosen, price_of_error=ERROR, price=PRICE[chosen],
            propensity=1 - explore / 2 if chosen == "small" else explore / 2, expected_quality=quality, expected_price=PRICE,
            expected_cost=cost, draw=number // calls / count, reason="" if chosen == "small" else f"large, {AT_RANDOM} to learn",
        )  # fmt: skip
        rows.append(values(made))
        truth = (0.3 if hard else 0.9) if chosen == "small" else 0.95
        said.append((made.id, "", float(generator.random() < truth), made.time))
        shadowed.append((made.id, made.time, "c", "large" if hard else "small", "{}"))
    with engine.begin() as connection:
        insert_rows(connection, decisions, rows)
        insert_rows(connection, shadows, shadowed)
        if judged:
            insert_rows(connection, feedback, said)
    engine.dispose()
    return str(path)


def test_the_gain_is_what_the_candidate_would_have_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On hard queries, half of all, it would pay 0.009 more and answer 0.65 more of them: 0.1 errors a query in all."""
    path = recorded(tmp_path / "g.db", 2000, explore=0.3)
    found = agreement(connect(path), since=0, until=1e6)
    assert (found.candidate, found.rows, found.agree) == ("c", 2000, 1000)
    assert found.low < 0.5 < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / 2000**0.5, rel=0.01)
    assert sorted(found.pairs) == [("small", "large", 1000), ("small", "small", 1000)]
    truth = 0.5 * (0.65 - 0.009 / ERROR)
    assert found.gain is not None
    assert abs(found.gain.estimate - truth) < 4 * found.gain.half / 1.96
    assert abs(found.gain.weighted - truth) < 4 * found.gain.half / 1.96
    assert 0 < found.gain.half < 0.1
    assert found.gain.differ == 1000
    json.dumps(asdict(found), allow_nan=False)
    main(["gateway", "shadow", "--hours", "1000000", "--database", path])
    assert "agrees on 1000 of 2000 requests" in capsys.readouterr().out


@pytest.mark.parametrize("explore", [0.02, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("experts", [2, 3, 10])
def test_the_live_choice_is_known_however_much_is_explored(experts: int, explore: float) -> None:
    expected = {f"e{number}": [0.9, 0.1, 0.1 * number] for number in range(experts)}
    for chosen in expected:
        drawn = explore / experts
        reason = "" if chosen == "e0" else f"{chosen}, {AT_RANDOM} to learn: expected quality 0.90"
        chance = 1 - explore + drawn if chosen == "e0" else drawn
        row = SimpleNamespace(chosen=chosen, ending=None, propensity=chance, reason=reason)
        assert _live(row, expected) == "e0"  # type: ignore[arg-type]


def test_what_was_decided_before_exploration_began_does_not_count_for_the_gain(tmp_path: Path) -> None:
    """Nothing is known there of whom the candidate would ask, and the estimate is wrong: an answer of the large is worth more."""
    path = recorded(tmp_path / "g.db", 2000, explore=0.3)
    alone = agreement(connect(path), since=0, until=1e6).gain
    engine = connect(path)
    quality, cost = {"small": 0.7, "large": 0.9}, {"small": 0.3, "large": 0.4}
    certain = {"propensity": 1.0, "price_of_error": ERROR, "expected_quality": quality, "expected_price": PRICE}
    before = [row(number, time=900.0, expected_cost=cost, **certain) for number in range(2000, 4000)]
    with engine.begin() as connection:
        insert_rows(connection, decisions, list(map(values, before)))
        insert_rows(connection, shadows, [(made.id, made.time, "c", "large", "{}") for made in before])
        insert_rows(connection, feedback, [(made.id, "", 0.7, made.time) for made in before])
    found = agreement(engine, since=0, until=1e6)
    assert (found.rows, found.gain) == (4000, alone)
    with engine.begin() as connection:
        insert_rows(connection, decisions, [values(row(4000, expected_cost={"small": 0.3}, **certain))])
        insert_rows(connection, shadows, [("id-4000", 900.0, "c", "small", "{}")])
        insert_rows(connection, feedback, [("id-4000", "", 0.7, 900.0)])
    gain = agreement(engine, since=0, until=1e6).gain
    assert gain is not None
    assert alone is not None
    assert gain.rows == alone.rows + 1, "nobody else could have been drawn"
    engine.dispose()


def test_a_candidate_whose_rare_right_answers_were_not_seen_may_be_as_good(tmp_path: Path) -> None:
    """The live choice was right one time in twenty, the candidate's in none of the 50 times that it was drawn."""
    engine, rows, said = connect(str(tmp_path / "g.db")), [], []
    prepare(engine)
    quality = price = {"small": 0.05, "large": 0.05}
    for number in range(1000):
        chosen, why = ("large", f"large, {AT_RANDOM} to learn") if number % 20 == 0 else ("small", "")
        made = row(
            number, expert=chosen, chosen=chosen, reason=why, propensity=0.05 if why else 0.95, expected_quality=quality,
            expected_price=price, price=0.05, price_of_error=1.0,
        )  # fmt: skip
        rows.append(values(made))
        said.append((made.id, "", float(number % 20 == 1), made.time))
    with engine.begin() as connection:
        insert_rows(connection, decisions, rows)
        insert_rows(connection, shadows, [(one[0], 1000.0, "c", "large", "{}") for one in rows])
        insert_rows(connection, feedback, said)
    gain = agreement(engine, since=0, until=1e6).gain
    assert gain is not None
    assert gain.seen == (950, 50)
    assert gain.estimate < -0.03
    assert gain.estimate + gain.half > 0
    engine.dispose()


def test_who_was_drawn_from_a_static_mix_is_the_live_choice(tmp_path: Path) -> None:
    mixed = row(
        chosen="large", expert="large", propensity=0.3, expected_cost={"small": 0.3, "large": 0.4},
        reason="large by the static mix: asked for",
    )  # fmt: skip
    engine = connect(str(tmp_path / "g.db"))
    prepare(engine)
    with engine.begin() as connection:
        insert_rows(connection, decisions, [values(mixed)])
        insert_rows(connection, shadows, [("id-0", 1000.0, "c", "small", "{}")])
    assert agreement(engine, since=0, until=1e6).pairs == [("large", "small", 1)]
    engine.dispose()


def test_who_fails_more_often_does_not_count_for_less(tmp_path: Path) -> None:
    """Half of the draws of the large one fall back: those that are left stand for these."""
    path = recorded(tmp_path / "g.db", 4000, explore=0.3)
    engine = connect(path)
    whole = agreement(engine, since=0, until=1e6).gain
    with engine.begin() as connection:
        large = connection.execute(select(decisions.c.id).where(decisions.c.chosen == "large")).scalars().all()
        failed = np.random.default_rng(0).permutation(large)[: len(large) // 2].tolist()
        connection.execute(update(decisions).where(decisions.c.id.in_(failed)).values(expert="small"))
    some = agreement(engine, since=0, until=1e6).gain
    assert whole is not None
    assert some is not None
    assert some.rows == 4000 - len(failed)
    assert some.half > 1.2 * whole.half, "half as many draws say less"
    assert abs(some.estimate - whole.estimate) < 2 * some.half
    shares = what_if(engine, since=0, until=1e6, present=ERROR)
    assert shares.rows == 4000 - len(failed)
    engine.dispose()


def test_a_query_that_is_asked_again_is_one_draw(tmp_path: Path) -> None:
    each, together = (
        agreement(connect(recorded(tmp_path / f"{calls}.db", 2000, explore=0.3, calls=calls)), since=0, until=1e6).gain
        for calls in (1, 5)
    )
    assert each is not None
    assert together is not None
    assert (each.rows, each.estimate) == (together.rows, pytest.approx(together.estimate))
    assert together.seen[1] <= each.seen[1]
    assert each.half != together.half
    few = agreement(connect(recorded(tmp_path / "few.db", 2000, explore=0.3, calls=110)), since=0, until=1e6)
    assert few.gain is None
    assert "too little was explored" in few.why_no_gain


def test_no_request_outweighs_all_others_by_its_own_price_of_an_error(tmp_path: Path) -> None:
    engine = connect(recorded(tmp_path / "g.db", 2000, explore=0.3))
    usual = agreement(engine, since=0, until=1e6).gain
    with engine.begin() as connection:
        some = select(decisions.c.id).where(decisions.c.propensity < 0.5).limit(3)
        connection.execute(update(decisions).where(decisions.c.id.in_(some)).values(price_of_error=1e-9))
    found = agreement(engine, since=0, until=1e6).gain
    assert usual is not None
    assert found is not None
    assert abs(found.estimate - usual.estimate) < usual.half
    assert found.half < 1.5 * usual.half
    engine.dispose()


def test_the_gain_is_that_of_all_requests_where_one_expert_is_judged_less(tmp_path: Path) -> None:
    """Of the small expert, which hard queries went to, nine answers in ten are judged; of the large one, one in ten."""
    engine = connect(recorded(tmp_path / "g.db", 8000, explore=0.6))
    share = {"small": 0.9, "large": 0.1}
    generator = np.random.default_rng(4)
    with engine.begin() as connection:
        experts = dict(connection.execute(select(decisions.c.id, decisions.c.expert)).all())
        silent = [name for name, expert in experts.items() if generator.random() > share[expert]]
        for start in range(0, len(silent), 500):
            connection.execute(delete(feedback).where(feedback.c.decision.in_(silent[start : start + 500])))
    found = agreement(engine, since=0, until=1e6).gain
    assert found is not None
    assert found.rows == 8000 - len(silent)
    truth = 0.5 * (0.65 - 0.009 / ERROR)
    assert abs(found.estimate - truth) < 4 * found.half / 1.96 < 0.15
    assert abs(found.weighted - truth) < 4 * found.half / 1.96
    engine.dispose()


def test_what_an_answer_decided_is_not_taken_for_a_choice_of_the_router(tmp_path: Path) -> None:
    path = recorded(tmp_path / "g.db", 2000, explore=0.3)
    engine = connect(path)
    before = agreement(engine, since=0, until=1e6)
    with engine.begin() as connection:
        # A first answer that was paid for and not given changes nothing of what the given one is worth.
        connection.execute(update(decisions).values(price=decisions.c.price + 0.5))
        columns = decisions.c.id, literal("small"), literal("silent"), literal(0.5), null(), null()
        connection.execute(cascades.insert().from_select(list(cascades.c), select(*columns)))
    assert agreement(engine, since=0, until=1e6) == replace(before, gain=approximately(before.gain))
    costs = {"small": 0.3, "large": 0.4}
    kept = [
        row(number, expert="large", chosen="large", propensity=1.0, expected_cost=costs, cascade=CascadeRow("large", "kept"))
        for number in range(5000, 5100)
    ]
    # Another was to answer instead, and did not.
    kept += [
        row(number, expert="small", chosen="large", propensity=1.0, expected_cost=costs, cascade=CascadeRow("small", "failed"))
        for number in range(5100, 5150)
    ]
    with engine.begin() as connection:
        insert_rows(connection, decisions, [values(one) for one in kept])
        insert_rows(connection, cascades, [cascade_values(one) for one in kept])
        insert_rows(connection, shadows, [(one.id, one.time, "c", "small", "{}") for one in kept])
        insert_rows(connection, feedback, [(one.id, "", 1.0, one.time) for one in kept])
    after = agreement(engine, since=0, until=1e6)
    assert (after.rows, after.agree) == (2150, 1150), "the router is for the small one, whatever an answer said"
    assert after.gain == approximately(before.gain), "what was certain says nothing of the others"
    engine.dispose()


def approximately(gain: Gain | None) -> Any:
    assert gain is not None
    return replace(gain, **{name: pytest.approx(getattr(gain, name)) for name in ("estimate", "half", "weighted")})


def test_what_was_drawn_from_a_conversation_that_stays_elsewhere_is_not_the_live_choice(tmp_path: Path) -> None:
    """The small one is cheaper, and drawn by chance: the conversation is with the large one."""
    drawn = row(
        propensity=0.05, expected_cost={"small": 0.3, "large": 0.4},
        reason=f"{AT_RANDOM}, to learn; the conversation stays with large; small: expected quality 0.70",
    )  # fmt: skip
    engine = connect(str(tmp_path / "g.db"))
    prepare(engine)
    with engine.begin() as connection:
        insert_rows(connection, decisions, [values(drawn)])
        insert_rows(connection, shadows, [("id-0", 1000.0, "c", "large", "{}")])
    assert agreement(engine, since=0, until=1e6).pairs == [("large", "large", 1)]
    engine.dispose()


def test_without_exploration_or_judgements_no_gain_is_told(tmp_path: Path) -> None:
    found = agreement(connect(recorded(tmp_path / "a.db", 400, explore=0.0)), since=0, until=1e6)
    assert (found.agree, found.gain) == (200, None)
    assert "nothing was explored" in found.why_no_gain
    found = agreement(connect(recorded(tmp_path / "b.db", 200, explore=0.2)), since=0, until=1e6)
    assert found.gain is None
    assert "too little was explored" in found.why_no_gain
    found = agreement(connect(recorded(tmp_path / "c.db", 400, explore=0.3, judged=False)), since=0, until=1e6)
    assert found.gain is None
    assert "judged" in found.why_no_gain
    assert "--shadow" in str(agreement(connect(str(tmp_path / "c.db")), since=2e6, until=3e6))


def test_a_full_queue_drops_and_counts(tmp_path: Path, router: Router) -> None:
    engine = connect(str(tmp_path / "g.db"))
    prepare(engine)
    router.save(tmp_path / "router")
    shadow = load_shadow(tmp_path / "router", None, engine)
    assert isinstance(shadow, Shadow)
    cost = {"small": 0.1, "large": 0.2}
    choice = Choice(("small", "large"), "", 1.0, {}, {}, cost, 0.05, "large", False)
    for number in range(2000):
        shadow.offer(f"id-{number}", 1.0, f"{EASY} {number}", choice)
    until(lambda: shadow.scored + shadow.dropped == 2000)
    assert shadow.dropped > 0
    dropped = shadow.dropped
    shadow.offer("long", 1.0, "x" * 40_000, choice)
    assert shadow.dropped == dropped + 1
    shadow.offer("nobody", 1.0, EASY, choice._replace(cost={"another": 0.1}))
    dropped = shadow.dropped
    until(lambda: shadow.dropped == dropped + 1 or shadow.dropped > dropped)
    shadow.close()
    with engine.connect() as connection:
        assert len(connection.execute(select(shadows)).all()) == shadow.scored
    engine.dispose()


@pytest.mark.ci_slow
def test_beside_a_real_gateway_it_changes_nothing(tmp_path: Path, router: Router, caplog: pytest.LogCaptureFixture) -> None:
    router.save(tmp_path / "live")
    # The candidate knows the small expert alone.
    candidate = Router.load(tmp_path / "live").remove_expert("large")
    candidate.save(tmp_path / "candidate")
    database = str(tmp_path / "g.db")
    with Upstream() as upstream:
        experts = {name: Expert(name=name, base_url=upstream.url) for name in ("small", "large")}
        settings = Settings(
            database=database, admin_key=ADMIN, shadow_folder=tmp_path / "candidate", router_folder=tmp_path / "live"
        )
        with RunningGateway(router, experts, settings) as gateway:
            for number in range(6):
                for text, expert in (
                    (f"{EASY} {number} and {number + 1}", "small"),
                    (f"{HARD} number {number} in full", "large"),
                ):
                    status, said, _ = gateway.chat(text)
                    assert (status, said["x-deferral-expert"]) == (200, expert)
            gateway.chat(EASY, model="large")
            until(lambda: gateway.state.shadow.scored == 12)
            until(lambda: json.loads(gateway.ask("GET", "/admin/shadow", key=ADMIN)[2])["rows"] == 12)
            found = json.loads(gateway.ask("GET", "/admin/shadow", key=ADMIN)[2])
            assert found["agree"] == 6
            assert {tuple(pair) for pair in found["pairs"]} == {("small", "small", 6), ("large", "small", 6)}
            assert b'deferral_shadow_total{what="scored"} 12.0' in gateway.ask("GET", "/metrics", key=ADMIN)[2]
            # A candidate that is broken is told, and stops nobody.
            (tmp_path / "candidate" / "router.json").write_text("{")
            assert gateway.ask("POST", "/admin/reload", key=ADMIN)[0] == 200
            assert gateway.state.shadow is None
            assert gateway.chat(EASY)[0] == 200
            shutil.rmtree(tmp_path / "candidate")
            assert gateway.ask("POST", "/admin/reload", key=ADMIN)[0] == 200
            router.save(tmp_path / "candidate")
            assert gateway.ask("POST", "/admin/reload", key=ADMIN)[0] == 200
            assert gateway.chat(HARD)[1]["x-deferral-expert"] == "large"
            until(lambda: gateway.state.shadow.scored == 1)
            # One that fails while it decides stops nobody either.
            gateway.state.shadow.router.route = lambda *_, **__: 1 / 0
            assert gateway.chat(EASY)[0] == 200
            until(lambda: gateway.state.shadow.dropped == 1)
    assert sum("no candidate is scored" in line.message for line in caplog.records) == 2
    assert sum("cannot be scored" in line.message for line in caplog.records) == 1
