"""Names of models that the experts file adds: of an expert, or of the router at settings of its own."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from deferral.errors import DataError
from deferral.gateway.aliases import Alias, applied, read_experts_file
from deferral.gateway.checking import check
from deferral.gateway.experts_file import Expert, read_experts
from deferral.gateway.generation import check_aliases
from deferral.gateway.requests import Hints, parse
from deferral.gateway.settings import Settings
from tests.faulty_upstream import Upstream
from tests.running_gateway import EASY, HARD, RunningGateway, small_router

ALIASES = """
[aliases.thrifty]
price_of_error = 0.005          # hard questions are not worth the large one

[aliases."gpt-4o"]
expert = "large"

[aliases.little]
experts = ["small"]

[aliases.big]
experts = ["large"]
"""


def experts_file(folder: Path, aliases: str = ALIASES, url: str = "http://127.0.0.1:9/v1") -> Path:
    path = folder / "experts.toml"
    tables = [f'[experts.{name}]\nbase_url = "{url}"\n' for name in ("small", "large")]
    path.write_text("".join([*tables, f'[experts.other]\nbase_url = "{url}"\nroute = false\n', aliases]))
    return path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("aliases")
    with Upstream() as upstream:
        experts, aliases = read_experts_file(experts_file(folder, url=upstream.url))
        settings = Settings(database=str(folder / "gateway.db"))
        with RunningGateway(small_router(), experts, settings, aliases=aliases) as gateway:
            keys = {
                "any": gateway.state.keys.create("tests")[0],
                "small": gateway.state.keys.create("small alone", experts=["small"])[0],
            }
            yield SimpleNamespace(gateway=gateway, upstream=upstream, keys=keys)


def client(running: Any, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=running.gateway.url, api_key=running.keys[key], max_retries=0, timeout=20)


def answered_by(running: Any, model: str, text: str, key: str = "any", **headers: str) -> tuple[str, str]:
    """Who answered, and the model that it was asked for."""
    with client(running, key) as asking:
        raw = asking.chat.completions.with_raw_response.create(
            model=model, messages=[{"role": "user", "content": text}], extra_headers=headers
        )
        return raw.headers["x-deferral-expert"], raw.parse().model


def test_a_name_stands_for_a_trade_off_a_choice_or_an_expert(running: Any) -> None:
    hard = f"{HARD} number 7 in full"
    assert answered_by(running, "auto", hard) == ("large", "large")
    assert answered_by(running, "thrifty", hard) == ("small", "small")
    assert answered_by(running, "little", hard) == ("small", "small")
    assert answered_by(running, "gpt-4o", f"{EASY} 3 and 4") == ("large", "large")
    # A header says more of this one request.
    assert answered_by(running, "thrifty", hard, **{"x-deferral-price-of-error": "0.05"}) == ("large", "large")


def test_what_a_key_may_not_ask_it_may_not_ask_by_another_name(running: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4o' is no expert that this key may ask"):
        answered_by(running, "gpt-4o", "x", key="small")
    with client(running) as any_, client(running, "small") as small:
        assert [model.id for model in any_.models.list()] == [
            "auto",
            "small",
            "large",
            "other",
            "thrifty",
            "gpt-4o",
            "little",
            "big",
        ]
        assert [model.id for model in small.models.list()] == ["auto", "small", "thrifty", "little"]
        assert small.models.retrieve("thrifty").id == "thrifty"
        with pytest.raises(openai.NotFoundError):
            small.models.retrieve("gpt-4o")


def test_why_nobody_is_left_names_the_alias(running: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="small: not among the experts of this alias"):
        answered_by(running, "big", "x", key="small")


def test_a_response_goes_on_with_who_gave_it_under_an_alias_too(running: Any) -> None:
    with client(running) as asking:
        first = asking.responses.create(model="gpt-4o", input="x", metadata={"seed": "alias"})
        raw = asking.responses.with_raw_response.create(model="thrifty", input="and then?", previous_response_id=first.id)
        assert raw.headers["x-deferral-expert"] == "large"
        with pytest.raises(openai.BadRequestError, match=r"large may not answer .* not among the experts of this alias"):
            asking.responses.create(model="little", input="and then?", previous_response_id=first.id)


def test_headers_go_before_what_the_alias_says_and_a_trade_off_before_any_other() -> None:
    asked = parse("chat", b'{"model": "a", "messages": []}')
    alias = Alias("a", "", Hints(budget=5.0, max_latency=2.0, regions=frozenset({"eu"}), experts=frozenset({"small"})))
    assert applied(alias, asked, Hints())[0].model == "auto"
    assert applied(alias, asked, Hints())[1] == alias.hints
    meant = applied(alias, asked, Hints(min_quality=0.5, regions=frozenset({"us"}), conversation=b"c"))[1]
    assert meant == Hints(
        min_quality=0.5, max_latency=2.0, regions=frozenset({"us"}), experts=frozenset({"small"}), conversation=b"c"
    )


@pytest.mark.parametrize(
    ("aliases", "line", "said"),
    [
        ("[aliases.a]\n", 8, "alias 'a', it says nothing"),
        ("[aliases.small]\nbudget = 1\n", 8, "it is the name of an expert already"),
        ("[aliases.auto]\nbudget = 1\n", 8, "it asks the router already"),
        ("[aliases.a]\nbudgets = 1\n", 9, "budgets: unknown; expected some of expert"),
        ("[aliases.a]\nexpert = 'medium'\n", 9, "expert: 'medium' is no expert of this file"),
        ("[aliases.a]\nexpert = ['small']\n", 9, "expert: expected one name, got ['small']; experts are those among whom"),
        ("[aliases.a]\nexpert = 'small'\nbudget = 1\n", 9, "expert: expected nothing beside it"),
        ("[aliases.a]\nexperts = ['small', 'big']\n", 9, "experts: 'big' is no expert of this file"),
        ("[aliases.a]\nexperts = ['other']\n", 9, "experts: 'other' has route = false"),
        ("[aliases.a]\nexperts = 'small'\n", 9, "experts: expected a list of names"),
        ("[aliases.a]\nregions = []\n", 9, "regions: expected a list of names"),
        ("[aliases.a]\nprice_of_error = 0\n", 9, "price_of_error: expected a number above 0, got 0"),
        ("[aliases.a]\nmin_quality = 1.5\n", 9, "min_quality: expected a number from 0 to 1"),
        ("[aliases.a]\nmax_latency = true\n", 9, "max_latency: expected a number above 0, got True"),
        ("[aliases.a]\nbudget = 1\nmin_quality = 0.5\n", 10, "min_quality: expected one trade-off, got budget as well"),
        ("[aliases.'\u00e4']\nbudget = 1\n", 8, "expected 1 to 100 printable ASCII characters"),
        ("aliases = 3\n", None, "expected tables [aliases.NAME], got int"),
    ],
)
def test_an_alias_that_is_none(aliases: str, line: int | None, said: str, tmp_path: Path) -> None:
    path = experts_file(tmp_path, aliases)
    if line is None:
        path.write_text(aliases + path.read_text().replace(aliases, ""))
    read_experts(path)
    with pytest.raises(DataError, match=re.escape(said)) as raised:
        read_experts_file(path)
    assert f"{path}:{line or 1}: " in str(raised.value)


def test_an_alias_that_the_router_cannot_meet_is_found_before_it_is_used(tmp_path: Path) -> None:
    small_router().save(tmp_path / "router")
    path = experts_file(tmp_path, "[aliases.a]\nexperts = ['small']\nmin_quality = 0.99\n")
    settings = Settings(database=str(tmp_path / "g.db"), router_folder=tmp_path / "router", experts_file=path, port=0)
    [fault] = [one for one in check(settings, ask=False).findings if one.part == "aliases"]
    assert (fault.kind, "alias 'a': " in fault.text) == ("fault", True)
    experts, aliases = read_experts_file(path)
    with pytest.raises(ValueError, match="alias 'a': "):
        RunningGateway(small_router(), experts, settings, aliases=aliases)
    path = experts_file(tmp_path)
    assert "clients may also ask for thrifty, gpt-4o, little, big" in str(check(settings, ask=False))


def test_an_alias_leads_to_somebody_where_it_says_he_is(tmp_path: Path) -> None:
    def experts(region: str) -> dict[str, Expert]:
        return {name: Expert(name, "http://127.0.0.1:9/v1", region=where) for name, where in (("small", "us"), ("large", region))}

    router, europe = small_router(), Alias("a", "", Hints(min_quality=0.9, regions=frozenset({"eu"})))
    check_aliases(router, experts("eu"), {"a": europe})
    with pytest.raises(ValueError, match="alias 'a': none of its experts is served in eu"):
        check_aliases(router, experts("EU"), {"a": europe})
    swapped = {"small": experts("eu")["large"], "large": experts("us")["large"]}
    with pytest.raises(ValueError, match="alias 'a': min_quality"):
        check_aliases(router, {name: replace(one, name=name) for name, one in swapped.items()}, {"a": europe})


def test_aliases_come_and_go_with_a_reload(tmp_path: Path) -> None:
    small_router().save(tmp_path / "router")
    with Upstream() as upstream:
        path = experts_file(tmp_path, "", upstream.url)
        settings = Settings(database=str(tmp_path / "g.db"), router_folder=tmp_path / "router", experts_file=path)
        with RunningGateway(small_router(), read_experts(path), settings) as gateway:
            key, _ = gateway.state.keys.create("tests")

            def status() -> int:
                return gateway.chat(EASY, key=key, model="thrifty")[0]

            assert status() == 404
            experts_file(tmp_path, ALIASES, upstream.url)
            gateway.call(gateway.state.reload())
            assert status() == 200
            experts_file(tmp_path, "[aliases.thrifty]\nbudget = 'much'\n", upstream.url)
            with pytest.raises(DataError, match="alias 'thrifty', budget"):
                gateway.call(gateway.state.reload())
            assert status() == 200


def test_only_the_name_is_changed_in_what_is_sent(running: Any) -> None:
    with client(running) as asking:
        asking.chat.completions.create(model="thrifty", messages=[{"role": "user", "content": EASY}], seed=77)
    [seen] = [one for one in running.upstream.seen if b'"seed":77' in one.body.replace(b" ", b"")]
    assert json.loads(seen.body) == {"model": "small", "messages": [{"role": "user", "content": EASY}], "seed": 77}


def test_experts_and_aliases_are_of_one_version_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = experts_file(tmp_path, "[aliases.a]\nexpert = 'small'\n"), Path.read_text

    def read_and_replaced(file: Path, **options: Any) -> str:
        text = read(file, **options)
        path.write_text(text.replace("small", "tiny"))
        return text

    monkeypatch.setattr(Path, "read_text", read_and_replaced)
    experts, aliases = read_experts_file(path)
    assert (list(experts), aliases) == (["small", "large", "other"], {"a": Alias("a", "small")})
