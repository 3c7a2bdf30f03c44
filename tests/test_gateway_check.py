"""What is found before a gateway goes live: nothing is changed, and every fault says what to do."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from sqlalchemy import update

from deferral.cli import main
from deferral.gateway.checking import check
from deferral.gateway.database import connect
from deferral.gateway.experts_file import Expert
from deferral.gateway.keys import Keys
from deferral.gateway.listening import listening
from deferral.gateway.preparing import prepare
from deferral.gateway.reaching import Reached, reach
from deferral.gateway.schema import VERSION
from deferral.gateway.schema import keys as key_table
from deferral.gateway.settings import Settings
from tests.faulty_upstream import Upstream, closed_port
from tests.running_gateway import small_router


class Other(BaseHTTPRequestHandler):
    """Lists many models, takes max_completion_tokens alone, reports neither usage nor log-probabilities, and has vectors."""

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            self._answer(404, {})
            return
        self._answer(200, {"data": [{"id": f"m{number}"} for number in range(9)]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/embeddings":
            self._answer(200, {"data": [], "usage": {"prompt_tokens": 1}})
        elif asked["model"] == "vectors":
            self._answer(404, {})
        elif "max_tokens" in asked:
            self._answer(400, {"error": {"message": "use max_completion_tokens instead"}})
        else:
            self._answer(200, {"choices": [{"message": {"content": "x"}, "logprobs": None}]})

    def _answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


FIRST = (Path(__file__).parent / "gateway_version_1.sql").read_text(encoding="utf-8")
PRICES = {"input_price": 1.0, "output_price": 2.0}


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("router") / "router"
    small_router().save(folder)
    return folder


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream(forever_s=0.5) as server:
        yield server


def reached(*experts: Expert, ask: bool = False) -> list[Reached]:
    return asyncio.run(reach(experts, ask=ask))


def test_an_expert_that_is_as_the_file_says(upstream: Upstream) -> None:
    plain, keyed = Expert("small", upstream.url, "good", **PRICES), Expert("large", upstream.url, "good", key="a-key", **PRICES)
    for found, key in zip(reached(plain, keyed), ("", "yes"), strict=True):
        assert (found.reachable, found.key, found.model, found.seconds) == ("yes", key, "yes", None)
        assert found.faults == found.notes == []
    assert [(seen.method, seen.path) for seen in upstream.seen] == [("GET", "/v1/models")] * 2
    assert sorted(seen.headers.get("authorization", "") for seen in upstream.seen) == ["", "Bearer a-key"]
    [found] = reached(keyed, ask=True)
    assert (found.seconds is not None, found.faults, found.notes) == (True, [], [])
    assert [upstream.seen[-1].json[name] for name in ("model", "max_tokens")] == ["good", 1]


@pytest.mark.parametrize(
    ("listing", "fault", "asked"),
    [
        ("status-401", "refuses the key (status 401); is the variable that key_env names", "yes"),
        ("status-500", "failed with status 500 when it was asked for its models", "yes"),
        ("reset-first", "closed the connection before it answered", "?"),
        ("not-http", "answered something that is no HTTP", "?"),
        ("slow-first-byte", "did not answer in time", "?"),
    ],
)
def test_who_does_not_list_its_models(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, listing: str, fault: str, asked: str
) -> None:
    if listing == "slow-first-byte":
        monkeypatch.setattr("deferral.gateway.reaching._LOOK_S", 0.1)
    upstream.behave("", listing)
    expert = Expert("small", upstream.url, "good", key="a-key", **PRICES)
    [found] = reached(expert)
    [said] = found.faults
    assert fault in said
    # Who answers a completion is right, whatever became of the list.
    [found] = reached(expert, ask=True)
    assert (found.model, found.faults == []) == (asked, asked == "yes")


def test_what_is_no_list_of_models_decides_nothing(upstream: Upstream) -> None:
    for listing in ("wrong-content-type", "malformed-json", "status-400", "status-429"):
        upstream.behave("", listing)
        [found] = reached(Expert("small", upstream.url, "good", **PRICES))
        assert (found.reachable, found.model, found.faults) == ("yes", "?", [])
        assert "is shown by --ask" in found.notes[0]


def test_who_cannot_be_asked(upstream: Upstream) -> None:
    with closed_port() as port:
        [found] = reached(Expert("small", f"http://127.0.0.1:{port}/v1", **PRICES), ask=True)
    assert found.reachable == "no"
    assert found.faults == [f"cannot be reached (http://127.0.0.1:{port}/v1/models); is its server running, and base_url right?"]
    [found] = reached(Expert("small", upstream.url.replace("http:", "https:"), **PRICES))
    assert "has no certificate that can be trusted" in found.faults[0]
    for model, words in {
        "status-401": "refused the gateway with status 401",
        "status-400": "refused a completion of one token with status 400; is model 'status-400' right?",
        "status-429": "asks for fewer requests",
        "malformed-json": "answered with JSON that cannot be read",
    }.items():
        [found] = reached(Expert("small", upstream.url, model, key="secret-of-the-expert", **PRICES), ask=True)
        unlisted, said = found.faults
        assert "does not list" in unlisted
        assert "but good; correct model" in unlisted
        assert words in said
        assert found.key == ("no" if model == "status-401" else "yes")
        assert "secret" not in str(found)
    assert reached(Expert("small", upstream.url, "other", **PRICES), ask=True)[0].faults == []


def test_what_is_worth_a_note(upstream: Upstream) -> None:
    [sure] = reached(Expert("large", upstream.url, "good", logprobs=True, **PRICES), ask=True)
    assert sure.notes == []
    assert upstream.seen[-1].json["logprobs"] is True


def test_every_address_is_looked_at(upstream: Upstream) -> None:
    with closed_port() as nobody:
        twice = Expert("small", upstream.url, "good", (f"http://127.0.0.1:{nobody}/v1",), **PRICES)
        first, second = reached(twice, ask=True)
    assert (first.shown, first.reachable, first.faults) == (f"small at {upstream.url}", "yes", [])
    assert (second.shown, second.reachable) == (f"small at http://127.0.0.1:{nobody}/v1", "no")
    assert "is its server running" in second.faults[0]


def test_servers_differ() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        [unlisted] = reached(Expert("small", url, "other", **PRICES))
        assert unlisted.faults == [
            "does not list the model 'other' but m0, m1, m2, m3, m4 and 4 more; correct model, or see with --ask"
        ]
        [lacking] = reached(Expert("small", url.removesuffix("/v1"), "m1", **PRICES))
        assert lacking.faults == [f"has no {url.removesuffix('/v1')}/models (status 404): does base_url lack /v1?"]
        [unsure] = reached(Expert("small", f"{url}/more", "m1", **PRICES))
        assert (unsure.faults, "does not list its models (status 404" in unsure.notes[0]) == ([], True)
        mute, vectors = reached(
            Expert("small", url, "m1", logprobs=True, **PRICES),
            Expert("e", url, "vectors", route=False, input_price=1.0),
            ask=True,
        )
        server.shutdown()
    assert mute.faults == vectors.faults == vectors.notes == []
    assert ["reports no usage" in mute.notes[0], "without log-probabilities" in mute.notes[1]] == [True, True]


def settings_for(router: Path, folder: Path, text: str, **options) -> Settings:
    (folder / "experts.toml").write_text(text, encoding="utf-8")
    given = {"database": str(folder / "gateway.db"), "router_folder": router, "experts_file": folder / "experts.toml", "port": 0}
    return Settings(**(given | options))


def found(settings: Settings, kind: str) -> list[str]:
    return [f"{one.part}: {one.text}" for one in check(settings, ask=False).findings if one.kind == kind]


def file_of(url: str, *names: str) -> str:
    return "".join(f'[experts.{name}]\nbase_url = "{url}"\nmodel = "good"\ninput_price = 1\noutput_price = 2\n' for name in names)


def test_a_gateway_that_can_go_live_and_nothing_is_made(router: Path, tmp_path: Path, upstream: Upstream) -> None:
    settings = settings_for(router, tmp_path, file_of(upstream.url, "small", "large"))
    checked = check(settings, ask=True)
    assert checked.ok
    assert [one.expert.name for one in checked.experts] == ["small", "large"]
    assert [one.kind for one in checked.findings] == ["good", "good", "note", "good", "note"]
    assert "streams of small, large cost is estimated" in checked.findings[-1].text
    assert "there is none, so that whoever is on this machine may ask" in found(settings, "note")[0]
    assert [path.name for path in tmp_path.iterdir()] == ["experts.toml"]


def test_the_routers_experts_against_those_of_the_file(router: Path, tmp_path: Path, upstream: Upstream) -> None:
    some = settings_for(router, tmp_path, file_of(upstream.url, "small"))
    assert found(some, "fault") == []
    assert "large of the router is not in the file" in found(some, "note")[0]
    [fault] = found(settings_for(router, tmp_path, file_of(upstream.url, "small", "lrage")), "fault")
    assert "the router does not know 'lrage'" in fault
    [fault] = found(settings_for(router, tmp_path, file_of(upstream.url, "small") + "route = 1\n"), "fault")
    assert "experts.toml:6" in fault
    [fault] = found(settings_for(tmp_path / "nowhere", tmp_path, file_of(upstream.url, "small")), "fault")
    assert fault.startswith("router: ")
    by_token = file_of(upstream.url, "small").replace("price = 1", "price = 1e-6").replace("price = 2", "price = 2e-6")
    notes = " ".join(found(settings_for(router, tmp_path, by_token), "note"))
    assert "are those dollars per million tokens" in notes
    one_of_two = file_of(upstream.url, "small").replace("price = 1", "price = 1e-6")
    notes = found(settings_for(router, tmp_path, one_of_two), "note")
    assert "small: input_price below $0.001 per million tokens: is it a price per token?" in notes
    free = file_of(upstream.url, "small").replace("put_price = 2", "put_price = 0")
    vectors = f'[experts.vectors]\nbase_url = "{upstream.url}"\nmodel = "good"\ninput_price = 1\nroute = false\n'
    about_prices = [note for note in found(settings_for(router, tmp_path, free + vectors), "note") if "_price" in note]
    assert [note[:24] for note in about_prices] == ["small: output_price 0: r"]
    no_candidate = settings_for(router, tmp_path, file_of(upstream.url, "small"), shadow_folder=tmp_path / "nowhere")
    assert found(no_candidate, "fault") == [], "the gateway starts without it"
    assert any(note.startswith("candidate: ") for note in found(no_candidate, "note"))


def test_an_address_that_is_taken(router: Path, tmp_path: Path, upstream: Upstream) -> None:
    with listening("127.0.0.1", 0) as taken:
        settings = settings_for(router, tmp_path, file_of(upstream.url, "small"), port=taken.getsockname()[1])
        [fault] = found(settings, "fault")
    assert "is taken by another process" in fault


def test_a_database_is_looked_at_and_left_as_it_is(router: Path, tmp_path: Path, upstream: Upstream, database: str) -> None:
    settings = settings_for(router, tmp_path, file_of(upstream.url, "small"), database=database)
    assert "can be written; its tables will be made" in "".join(found(settings, "good"))
    engine = connect(database)
    with engine.connect() as connection:
        assert not connection.dialect.has_table(connection, "keys")
    with engine.begin() as connection:
        for statement in FIRST.strip().removesuffix(";").split(";\n"):
            connection.exec_driver_sql(statement)
    assert f"has tables of version 1; they go to {VERSION}" in found(settings, "note")[1]
    assert not any("nobody may ask" in fault for fault in found(settings, "fault")), "its key is seen in tables of any version"
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT version FROM schema_version").scalar_one() == 1
    prepare(engine)
    assert f"has tables of version {VERSION}, and can be written" in "".join(found(settings, "good"))
    if engine.dialect.name == "postgresql":
        # As a standby is.
        standby = f"{database}{'&' if '?' in database else '?'}options=-c%20default_transaction_read_only%3Don"
        [fault] = found(replace(settings, database=standby), "fault")
        assert "the database cannot be used" in fault
        assert "read-only" in fault
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE schema_version SET version = 99")
    [fault] = found(settings, "fault")
    assert "or older, got 99" in fault
    engine.dispose()


def test_a_database_that_is_none(router: Path, tmp_path: Path, upstream: Upstream) -> None:
    (tmp_path / "text").write_text("no database, but text that is long enough to be looked at\n" * 20)
    for database, words in {
        "nonsense://user:secret@host": "expected the path of a file",
        str(tmp_path / "nowhere" / "gateway.db"): "create it first",
        str(tmp_path / "text"): "cannot be used, DatabaseError: file is not a database",
        "postgresql://user:secret@127.0.0.1:1/name": "cannot be used",
    }.items():
        [fault] = found(settings_for(router, tmp_path, file_of(upstream.url, "small"), database=database), "fault")
        assert words in fault
        assert "secret" not in fault
    [fault] = found(settings_for(router, tmp_path, file_of(upstream.url, "small"), store_text=True), "fault")
    assert "expected retention_days" in fault


def test_who_may_ask(router: Path, tmp_path: Path, upstream: Upstream) -> None:
    settings = settings_for(router, tmp_path, file_of(upstream.url, "small"))
    wide = settings_for(router, tmp_path, file_of(upstream.url, "small"), host="0.0.0.0")
    with closing(Keys(settings.database)) as keys:
        prepare(keys.engine)
        assert "other machines could reach this gateway, and it has no key" in found(wide, "fault")[0]
        keys.create("operator", admin=True)
        assert found(settings, "fault") == [], "a gateway is open that never had a key for clients"
        assert "there is none, so that whoever is on this machine may ask" in found(settings, "note")[1]
        assert "other machines could reach this gateway, and it has no key" in found(wide, "fault")[0]
        key = keys.create("alice", experts=["small", "smal"])[1]
        assert found(wide, "fault") == []
        assert f"{key.id} (alice) may ask smal, which the experts file does not have" in found(settings, "note")[1]
        keys.change("alice", experts=["smal"])
        [fault] = found(settings, "fault")
        assert f"(alice) may only ask smal, which the experts file does not have; `deferral gateway keys set {key.id}" in fault
        with keys.engine.begin() as connection:
            connection.execute(update(key_table).values(ends=time.time() - 1))
        assert "nobody may ask: there were keys" in found(settings, "fault")[0]


def test_the_command(
    router: Path, tmp_path: Path, upstream: Upstream, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    settings_for(router, tmp_path, file_of(upstream.url, "small", "large"))
    command = ["gateway", "check", str(router), "--experts", str(tmp_path / "experts.toml"), "--port", "0"]
    command += ["--database", str(tmp_path / "gateway.db")]
    main([*command, "--ask", "--log-level", "warning"])
    said = capsys.readouterr().out
    assert "it can go live\n" in said
    assert "1 in, 2 out" in said
    with pytest.raises(SystemExit) as ended:
        main([*command, "--host", "0.0.0.0"])
    assert ended.value.code == 1
    assert "fault: keys: 0.0.0.0: other machines could reach" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([*command, "--explore", "2"])
    assert ended.value.code == 2
