"""`deferral route` from end to end."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest

from deferral.datasets import DataError
from deferral.routing import Log, Outcome, Router, commands, read_log, write_log
from deferral.routing.judging import held
from tests.route_command import call, outcomes, saved_router
from tests.routing_world import EXPERTS, QUICK, world
from tests.test_readme import run as run_page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_router(tmp_path_factory.mktemp("routing") / "router")


@pytest.mark.ci_slow
def test_fit_writes_a_router_and_reports_what_it_is_worth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deferral.routing.commands.Router", _quick_router())
    write_log(outcomes(60, 0), tmp_path / "log.jsonl")
    prices = {name: {"input": 1.0, "output": 2.0} for name in EXPERTS}
    (tmp_path / "prices.json").write_text(json.dumps(prices))
    arguments = (tmp_path / "log.jsonl", "-o", tmp_path / "router", "--price-of-error", 0.1, "--prices", tmp_path / "prices.json")
    result = call("fit", *arguments)
    assert result.exit_code == 0, result.output
    assert "Routability: static mix" in result.output
    router = Router.load(tmp_path / "router")
    assert router.experts == EXPERTS
    assert router.fitted.prices.base[2] == pytest.approx(router.fitted.prices.base[0])
    with pytest.raises(DataError, match="is no router"):
        call("fit", tmp_path / "log.jsonl", "-o", tmp_path, "--price-of-error", 0.1)
    for text, message in (
        ("{", r"prices\.json: expected an object .*, got no JSON"),
        ("[]", r"prices\.json: expected an object .*, got a list"),
        ('{"small": 1}', r"prices\.json: small: expected an object .*, got 1"),
        ('{"small": {"input": 0.5, "ouput": 1}}', r"prices\.json: small: .*, got input, ouput"),
        ('{"small": {"input": 0.5, "output": "much"}}', r"got what is no number: .*'much'"),
    ):
        (tmp_path / "prices.json").write_text(text)
        with pytest.raises(DataError, match=message):
            call("fit", *arguments)


def test_a_fit_keeps_the_router_that_was_there_beside_the_new_one(tmp_path: Path) -> None:
    write_log(outcomes(2, 0), tmp_path / "log.jsonl")
    place = tmp_path / "router"
    for error, kept in ((0.1, None), (0.3, 0.1)):
        result = call("fit", tmp_path / "log.jsonl", "-o", place, "--price-of-error", error)
        assert Router.load(place).price_of_error == error
        assert ("the one that was there is router.previous now" in result.output) == (kept is not None)
        assert kept is None or Router.load(tmp_path / "router.previous").price_of_error == kept
    shutil.rmtree(tmp_path / "router.previous")
    (tmp_path / "router.previous").mkdir()
    (tmp_path / "router.previous" / "precious").touch()
    with pytest.raises(DataError, match=r"router\.previous: it is there, and is no router"):
        call("fit", tmp_path / "log.jsonl", "-o", place, "--price-of-error", 0.4)
    assert Router.load(place).price_of_error == 0.3


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ("explain query {folder}", "-r"),
        ("turn {folder} --price-of-error 1", "-r"),
        ("batch {file} {folder}.out {folder}", "-r"),
        ("fit {file} {folder}.new --price-of-error 1", "-o"),
    ],
)
def test_a_folder_without_its_option_is_told_which_it_is(arguments: str, option: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").touch()
    words = [word.format(folder=tmp_path, file=tmp_path / "in.jsonl") for word in arguments.split()]
    result = call(*words)
    alone = words[-3] if "--price-of-error" in words else words[-1]
    assert result.exit_code == 2
    assert f"{alone} belongs to it: write {option} {alone}" in " ".join(result.output.split())
    assert "belongs to it" not in call("explain", "query", "another").output


@pytest.mark.ci_slow
def test_explain_says_whom_and_why(folder: Path) -> None:
    result = call("explain", "emperor treaty dynasty", "-r", folder, "--count", 2)
    assert result.exit_code == 0, result.output
    assert "nearest logged queries" in result.output
    assert "propensity 1" in result.output
    denied = call("explain", "emperor treaty dynasty", "-r", folder, "--deny", "small")
    assert "may not be asked" in denied.output
    for arguments, message in (
        (("--budget", 1e-6), "the cheapest expert costs"),
        (("--deny", "small", "--deny", "coder", "--deny", "large"), "no expert is left"),
        (("--certified-quality", 0.9999, "--confidence", 0.999999), "cannot be promised"),
    ):
        failed = call("explain", "x", "-r", folder, *arguments)
        assert failed.exit_code == 1
        assert message in failed.output


@pytest.mark.ci_slow
def test_evaluate_judges_by_folds_and_a_router_on_other_queries(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("deferral.routing.judging_commands.Router", _quick_router())
    write_log(outcomes(150, 1), tmp_path / "log.jsonl")
    result = call("evaluate", tmp_path / "log.jsonl", "--by-tag", "--folds", 3, "--resamples", 100, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (stored["rows"], stored["groups"]) == (150, 3)
    assert "150 queries of 3 subjects" in result.output
    assert "Over so few subjects the intervals are too short" in result.output
    unsaid = call("evaluate", tmp_path / "log.jsonl", "--by-tag", "--resamples", 100)
    assert "fitting and judging 3 folds" in unsaid.stderr
    # On a subject that was never seen there is nothing to go by.
    assert stored["figures"]["routed"]["AIQ"]["estimate"] < stored["figures"]["oracle"]["AIQ"]["estimate"]
    assert (tmp_path / "out" / "curve.png").stat().st_size > 1000
    other = call("evaluate", tmp_path / "log.jsonl", "-r", folder, "--resamples", 100)
    assert "always one expert" in other.output
    assert "so few subjects" not in other.output
    write_log(outcomes(300, 0), tmp_path / "same.jsonl")
    assert "left out: " in call("evaluate", tmp_path / "same.jsonl", "-r", folder, "--resamples", 100).output
    for given in (("--by-tag",), ("--folds", 3)):
        refused = call("evaluate", tmp_path / "log.jsonl", "-r", folder, *given)
        assert (refused.exit_code, f"{given[0]} cannot be combined with --router" in refused.output) == (2, True)
    assert "ask for fewer folds (--folds)" in call("evaluate", tmp_path / "log.jsonl", "--by-tag", "--folds", 9).output
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plain = call("evaluate", tmp_path / "log.jsonl", "-r", folder, "--resamples", 100, "-o", tmp_path / "plain")
    assert "curve.png is left out: it needs matplotlib" in plain.output
    # Where nobody watches, a line says what is done, and none is empty.
    assert plain.stderr.splitlines() == ["reading log.jsonl", "bootstrap"]


def _quick_router() -> type[Router]:
    class Quick(Router):
        def __init__(self, price_of_error: float, **options: object) -> None:
            super().__init__(price_of_error, **{"policies": QUICK, **options})  # type: ignore[arg-type]

    return Quick


@pytest.mark.ci_slow
def test_simulate_says_what_the_router_would_have_cost(folder: Path, tmp_path: Path) -> None:
    texts, _, quality, price = world(300, seed=3)
    asked = np.random.default_rng(0).integers(0, 3, 300)
    log = Log(Outcome(texts[i], EXPERTS[j], quality[i, j], price[i, j], propensity=1 / 3) for i, j in enumerate(asked))
    write_log(log, tmp_path / "log.parquet")
    result = call("simulate", tmp_path / "log.parquet", "-r", folder, "--resamples", 100)
    assert result.exit_code == 0, result.output
    for word in ("ips", "self-normalised", "doubly robust", "always coder", "as logged"):
        assert word in result.output
    router = Router.load(folder).describe_expert("half \ud800", quality=0.9, price=0.1)
    router.save(tmp_path / "wider")
    wider = call("simulate", tmp_path / "log.parquet", "-r", tmp_path / "wider", "--resamples", 100)
    assert r"the log has no outcome of half \ud800, so" in wider.stderr
    assert "always half" not in wider.output
    assert r"half \ud800" in call("explain", "q", "-r", tmp_path / "wider").stdout
    write_log(Log([Outcome("q", "stranger", 1.0, 0.0)]), tmp_path / "strange.jsonl")
    assert "'stranger'" in call("simulate", tmp_path / "strange.jsonl", "-r", folder).output


def test_without_its_extra_the_command_names_it() -> None:
    program = "import sys; sys.modules['threadpoolctl'] = None; from deferral.cli import main; main(['route', '--help'])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "the router needs threadpoolctl: pip install '.[router]'" in found.stderr
    assert "Traceback" not in found.stderr


def test_help_shows_every_default_and_says_what_similarity_is() -> None:
    context = click.Context(commands.route)
    for name in commands.route.list_commands(context):
        command = commands.route.get_command(context, name)
        for option in command.params:
            if isinstance(option, click.Option) and type(option.default) in (int, float):
                assert option.show_default, f"{command.name} {option.opts[0]}"
    assert "mean cosine with the ten nearest" in " ".join(call("explain", "--help").output.split())


@pytest.mark.ci_slow
def test_a_log_with_holes_is_judged_by_simulation(folder: Path) -> None:
    log = outcomes(5, 8)
    log.append(Outcome("one answer", "small", 1.0, 0.0))
    with pytest.raises(ValueError, match=r"coder has none on query 6, 'one answer'; .* simulate"):
        held(Router.load(folder), log.table())


@pytest.mark.ci_slow
def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    session = run_page("docs/routing.md", 6)
    assert session["router"].experts == ["small", "large"]
    assert len(session["actions"]) == 5
    assert session["worth"].cost["doubly robust"].low < session["worth"].cost["doubly robust"].high
    assert "Routability" in capsys.readouterr().out


@pytest.mark.ci_slow
def test_an_expert_with_next_to_no_outcomes_is_named_and_taken_for_no_better_than_the_mean() -> None:
    log = outcomes(200, 6)
    with contextlib.redirect_stderr(io.StringIO()) as clean:
        commands._warn_of_rare(log)
    log.append(Outcome(log.queries[3], "smal", 1.0, 0.001))
    with contextlib.redirect_stderr(io.StringIO()) as warned:
        commands._warn_of_rare(log)
    assert clean.getvalue() == ""
    assert "smal has only 1 of 601 outcomes" in warned.getvalue()
    assert "is it small, mistyped?" in warned.getvalue()
    fitted = Router(0.1, policies=QUICK).fit(log).fitted
    means = dict(zip(fitted.experts, fitted.means.tolist(), strict=True))
    others = np.mean([means[name] for name in EXPERTS])
    assert others < means["smal"] < others + 0.15, "six outcomes' worth, of which five are the mean of all"


@pytest.mark.ci_slow
def test_another_price_of_an_error_is_a_turn_and_what_each_policy_costs_is_a_bill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deferral.routing.commands.Router", _quick_router())
    log = outcomes(60, 0)
    write_log(log, tmp_path / "log.jsonl")
    call("fit", tmp_path / "log.jsonl", "-o", tmp_path / "router", "--price-of-error", 0.1)
    monkeypatch.undo()
    before = Router.load(tmp_path / "router")
    assert "$100 an error, $0.1 before" in call("turn", "-r", tmp_path / "router", "--price-of-error", 100).stdout
    turned = Router.load(tmp_path / "router")
    assert (before.price_of_error, turned.price_of_error) == (0.1, 100.0)
    query = log.queries[0]
    assert turned.route(query).cost == pytest.approx(before.route(query, price_of_error=100.0).cost)

    write_log(outcomes(40, 1), tmp_path / "other.jsonl")
    found = call(
        "evaluate", tmp_path / "other.jsonl", "-r", tmp_path / "router", "--price-of-error", 0.1, "--resamples", 100, "-o",
        tmp_path / "out",
    )  # fmt: skip
    assert "at $0.1 an error" in found.stdout
    bill = json.loads((tmp_path / "out" / "evaluation.json").read_text())["bill"]
    table = read_log(tmp_path / "other.jsonl").table()
    for place, name in enumerate(table.experts):
        always = bill[f"always {name}"]
        assert always["quality"]["estimate"] == pytest.approx(table.quality[:, place].mean())
        assert always["dollars per 1,000"]["estimate"] == pytest.approx(1000 * table.price[:, place].mean())
        less = bill["routed"]["cost"]["estimate"] - always["cost"]["estimate"]
        assert always["routed less this"]["estimate"] == pytest.approx(less)
    assert bill["oracle"]["cost"]["estimate"] <= min(policy["cost"]["estimate"] for policy in bill.values())
