"""The command as a process: what a user types, what is printed, how it exits."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import click
import pytest

from deferral.cli import commands, main


def deferral(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deferral.cli", *arguments],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.slow
def test_the_demo_prints_a_table_and_saves_pictures_and_figures(tmp_path: Path) -> None:
    done = deferral("demo", "--out", str(tmp_path / "out"), "--seed", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("two-stage deferral") and "±" in line for line in lines)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "digits-seed1-cost-coverage.png",
        "digits-seed1-who-answers.png",
        "digits-seed1.json",
    ]
    figures = json.loads((tmp_path / "out" / "digits-seed1.json").read_text())
    assert figures["settings"]["seed"] == 1
    assert figures["methods"]["oracle"]["cost"]["low"] <= figures["methods"]["oracle"]["cost"]["high"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("demo", "--data", "cifar10", "--out", "{tmp}"), "needs --root"),
        (("demo", "--data", "cifar10", "--out", "{tmp}", "--root", "{tmp}"), "CIFAR-10N: expected the file"),
        (("demo", "--data", "cifar10", "--out", "{tmp}", "--root", "{tmp}", "--useless-expert"), "goes with --data digits"),
        (("demo", "--data", "mnist"), "'digits', 'cifar10'"),
        (("demo", "--device", "tpu"), "expected one of cpu"),
        (("demo", "--device", "meta"), "expected one of cpu"),
        (("demo", "--seed", "-1"), "-1 is not in the range"),
        (("demo", "--seed", str(2**64)), f"{2**64} is not in the range"),
        (("demo", "--seed", "7", "gateway"), "--seed is not of `demo gateway`; give options of gateway after its name"),
        (("evaluate", __file__, "--price", "0.05", "--out", "{tmp}"), "expected NAME=COST, got '0.05'"),
        (("evaluate", __file__, "--price", "a=b", "--out", "{tmp}"), "expected NAME=COST, got 'a=b'"),
        (("evaluate", __file__, "--out", "/dev/null/x"), "Not a directory"),
        (("evaluate", __file__, "--level", "95", "--out", "{tmp}"), "Invalid value for '--level': 95"),
        (("evaluate", __file__, "--level", "nan", "--out", "{tmp}"), "expected a finite number, got nan"),
        (("demo", "--out", "/dev/null/x"), "Not a directory"),
        (("nonsense",), "No such command"),
    ],
)
def test_bad_input_is_one_clear_error_without_a_traceback(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within this process: any exception but a clean exit would be a traceback."""
    monkeypatch.delenv("DEFERRAL_DATA", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(tmp=tmp_path) for argument in arguments])
    assert stopped.value.code not in (0, None)
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told


@pytest.mark.parametrize(("command", "promised"), [("demo", True), ("evaluate", False)])
def test_stopped_it_promises_a_checkpoint_only_where_there_may_be_one(
    command: str, promised: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(context: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.commands[command], "invoke", stopped)
    with pytest.raises(SystemExit) as ended:
        main([command, *([] if promised else [__file__])])
    assert ended.value.code == 130
    said = capsys.readouterr().err
    assert "stopped" in said
    assert ("last checkpoint" in said) is promised


def test_bench_runs_the_scripts_of_the_checkout_from_any_folder(tmp_path: Path) -> None:
    listed = deferral("bench")
    assert listed.returncode == 0
    assert "predictor-rejector" in listed.stdout
    wrong = deferral("bench", "predictor-rejecter")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "did you mean predictor-rejector?" in wrong.stderr
    elsewhere = subprocess.run(
        [sys.executable, "-m", "deferral.cli", "bench", "record", "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert "python -m benchmarks record" in elsewhere.stdout


def test_bench_outside_of_a_checkout_says_where_the_scripts_are(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parent.parent / "deferral", tmp_path / "deferral")
    # A path that names a checkout would have its benchmarks run, and their results replaced.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    call = partial(subprocess.run, capture_output=True, text=True, env=environment, check=False)
    done = call([sys.executable, "-m", "deferral.cli", "bench", "losses"], cwd=tmp_path)
    assert done.returncode == 2
    assert "clone it" in done.stderr
    # Of an installed package in a clone, the clone is meant.
    (tmp_path / "clone" / "benchmarks").mkdir(parents=True)
    (tmp_path / "clone" / "benchmarks" / "__main__.py").write_text("print('the clone runs')")
    (tmp_path / "clone" / "deferral").symlink_to(tmp_path / "deferral")
    code = "import sys; sys.path[0] = '..'; from deferral.cli import main; main(['bench', 'losses'])"
    done = call([sys.executable, "-c", code], cwd=tmp_path / "clone")
    assert (done.returncode, done.stdout) == (0, "the clone runs\n"), done.stderr


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "demo" in capsys.readouterr().out
    main(["--version"])
    assert capsys.readouterr().out.startswith("deferral, version 0")


@pytest.mark.parametrize("group", ["gateway", "route"])
def test_what_the_help_says_of_commands_elsewhere_is_what_they_say_themselves(group: str) -> None:
    context = click.Context(commands)
    found = commands.get_command(context, group)
    for name, (_, sentence) in found.elsewhere.items():
        assert found.get_command(context, name).get_short_help_str(200) == sentence


def test_the_package_runs_as_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["deferral", "--version"])
    runpy.run_module("deferral", run_name="__main__")
    assert capsys.readouterr().out.startswith("deferral, version 0")


@pytest.mark.slow
def test_a_refusal_as_a_process() -> None:
    refused = deferral("demo", "--device", "tpu")
    assert refused.returncode not in (0, None)
    assert "expected one of cpu" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_a_terminal_that_knows_ascii_alone_gets_its_table_and_its_files(tmp_path: Path) -> None:
    table = tmp_path / "ours.csv"
    table.write_text("target,answer,score,score_abstain\n" + "1,1,0.9,0.5\n0,1,0.4,0.5\n" * 20)
    done = deferral("evaluate", str(table), "--abstain-cost", "0.2", "--out", str(tmp_path / "out"), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "\\xb1" in done.stdout
    assert any(path.suffix == ".json" for path in (tmp_path / "out").iterdir())
