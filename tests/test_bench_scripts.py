"""The scripts of the published tables: options, ends, downloads, and two tiny cells of each."""

import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.io import loadmat, savemat

from benchmarks import (
    judging,
    loss_table,
    losses,
    multi_expert,
    predictor_rejector,
    realizable,
    regression,
    router,
    score_based,
    training_step,
    two_stage,
)
from benchmarks import page as gateway_page
from benchmarks.harness.cells import Cell, Results
from deferral.datasets import svhn
from deferral.torchvision_compat import import_torchvision
from tests.bench_tables import SCRIPTS, run


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        *((script, ["--rounds", "0"], "'--rounds': 0 is not in the range") for script in (judging, losses, training_step)),
        (gateway_page, ["--rows", "-3"], "'--rows': -3 is not in the range"),
        (router, ["--largest", "0"], "'--largest': 0 is not in the range"),
        (training_step, ["--batch", "0"], "'--batch': 0 is not in the range"),
        (training_step, ["--threads", "-3"], "'--threads': -3 is not in the range"),
        (training_step, ["--device", "nowhere"], "--device nowhere: expected a torch device"),
        *(
            (script, ["--bogus"], "No such option")
            for script in (judging, losses, training_step, gateway_page, router, loss_table)
        ),
        (realizable, ["--root", "."], "No such option"),
    ],
)
def test_a_bad_option_is_told_without_a_traceback(
    script, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        script.command.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "out", "said"),
    [
        ("calibrate", "found.json", "abalone.csv.gz, and it is not there; --root, or DEFERRAL_DATA, names the folder"),
        ("calibrate", "file/found.json", "file"),
        ("routing", "found", "No such file or directory"),
    ],
)
def test_absent_data_and_a_folder_that_cannot_be_made_are_told_without_a_traceback(
    name: str, out: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    folders = ["--root", str(tmp_path), "--out", str(tmp_path / out)]
    work = ["--work", str(tmp_path / "work")] if name == "calibrate" else []
    ran = subprocess.run([sys.executable, "-m", "benchmarks", name, *folders, *work], capture_output=True, text=True)
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: "), ran.stderr
    assert said in last


def test_an_interrupt_while_a_script_is_imported_is_told_without_a_traceback() -> None:
    interrupted = """
import importlib, runpy, sys
def stopping(name):
    raise KeyboardInterrupt
importlib.import_module = stopping
sys.argv[1:] = ["realizable"]
runpy.run_module("benchmarks", run_name="__main__")
"""
    ran = subprocess.run([sys.executable, "-c", interrupted], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (130, "stopped\n")


def test_help_of_the_table_of_losses_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loss_table, "PAGE", tmp_path / "losses.md")
    with pytest.raises(SystemExit) as ended:
        loss_table.command.main(["--help"])
    assert ended.value.code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ci_slow
def test_realizable_cells_are_skipped_when_they_are_finished(tmp_path: Path) -> None:
    arguments = ["--seeds", "1", "--cells", "2", "--out", str(tmp_path)]
    run(realizable, *arguments)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert len(files) == 2
    run(realizable, *arguments)
    assert len(list(tmp_path.rglob("*.json"))) == 4
    assert all(path.read_bytes() == content for path, content in files.items())
    record = json.loads(next(iter(files)).read_text())
    assert [part["at"] for part in record["parts"]] == [{"training rows": 100}, {"training rows": 200}]
    assert set(record["machine"]) >= {"commit", "torch", "device", "python"}


def test_no_time_is_a_clean_end(tmp_path: Path) -> None:
    run(realizable, "--seeds", "1", "--budget-minutes", "0", "--out", str(tmp_path))
    assert not list(tmp_path.rglob("*.json"))


def test_an_interrupt_ends_cleanly_and_says_how_to_continue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(realizable, "baselines", interrupt)
    result = CliRunner().invoke(realizable.command, ["--preset", "tiny", "--quiet", "--out", str(tmp_path)])
    assert result.exit_code == 130
    assert result.stderr == "stopped; the same command continues from the last checkpoint\n"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that a server of this machine gives out, with a small SVHN that torchvision takes for the real one."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    generator = np.random.default_rng(0)
    with ThreadingHTTPServer(("localhost", 0), partial(Quiet, directory=str(folder))) as server:
        files = {}
        for split, rows in (("train", 600), ("test", 200)):
            name = f"{split}_32x32.mat"
            pixels = generator.integers(0, 256, (32, 32, 3, rows), dtype=np.uint8)
            savemat(folder / name, {"X": pixels, "y": generator.integers(1, 11, (rows, 1), dtype=np.uint8)})
            md5 = hashlib.md5((folder / name).read_bytes()).hexdigest()
            files[split] = [f"http://localhost:{server.server_port}/{name}", name, md5]
        monkeypatch.setattr(import_torchvision().datasets.SVHN, "split_list", files)
        monkeypatch.setenv("no_proxy", "*")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield folder
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_svhn_is_downloaded_checked_and_run(mirror: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "cells"
    arguments = ["--data", "svhn", "--seeds", "1", "--root", str(root), "--out", str(out), "--cells", "5"]
    run(score_based, "--download", *arguments)
    records = {record["cell"]["method"]: record for record in Results(out).read_all("abstention")}
    assert len(records) == 5
    assert records["always abstain"]["parts"][0]["cost"]["estimate"] == pytest.approx(0.2)
    single = records["Mozannar-Sontag (mu=1)"]["settings"]
    assert single["speed"]["images_per_second"] > 0
    assert records["two-stage score-based"]["settings"]["first_stage"]["images_per_second"] > 0
    cell = Cell(**records["two-stage score-based"]["cell"])
    assert len(Results(out).samples(cell)["cost0"]) == 200
    # The loader: digit 0 is written as 10, and channels come last but one.
    written = loadmat(mirror / "train_32x32.mat")
    data = svhn(root, train=True)
    assert torch.equal(data.labels, torch.from_numpy(written["y"].astype(np.int64)).flatten() % 10)
    assert torch.equal(data.images[7, 2], torch.from_numpy(written["X"][:, :, 2, 7]))
    # What is there is not loaded again.
    for file in mirror.iterdir():
        file.unlink()
    run(score_based, "--download", *arguments[:-1], "1")


@pytest.mark.parametrize("fault", ["no network", "another file"])
def test_a_download_that_fails_says_what_to_do(mirror: Path, tmp_path: Path, fault: str) -> None:
    if fault == "no network":
        import_torchvision().datasets.SVHN.split_list["train"][0] = "http://localhost:1/train_32x32.mat"  # nobody listens there
    else:
        (mirror / "train_32x32.mat").write_bytes(b"another file")
    arguments = ["--preset", "tiny", "--quiet", "--data", "svhn", "--download", "--root", str(tmp_path), "--out", str(tmp_path)]
    result = CliRunner().invoke(score_based.command, arguments)
    assert result.exit_code == 1
    reason = {"no network": r"<urlopen error .*>", "another file": "File not found or corrupted."}[fault]
    what_to_do = r"without a network, copy the unpacked files there and leave --download out"
    assert re.search(rf"Error: svhn: could not be downloaded to .* \({reason}\); {what_to_do}", result.stderr)


def in_ci(script) -> bool:
    """Scripts on the same images differ by their losses: in CI one of them, the others with the slow tests."""
    return script not in (predictor_rejector, multi_expert, two_stage)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, marks=pytest.mark.ci_slow if in_ci(script) else pytest.mark.slow, id=script.__name__)
        for script in SCRIPTS
    ],
)
def test_two_tiny_cells_on_real_data(script, data_root: Path, tmp_path: Path) -> None:
    methods = {score_based: 6, predictor_rejector: 7, multi_expert: 9, two_stage: 8}.get(script, 5)
    seeds = () if script is regression else ("--seeds", "1")
    root = () if script is realizable else ("--root", str(data_root))
    run(script, *seeds, "--cells", str(methods), *root, "--out", str(tmp_path))
    records = [json.loads(path.read_text()) for path in tmp_path.rglob("*.json")]
    assert len(records) == methods
    for record in records:
        for part in record["parts"]:
            assert part["cost"]["low"] <= part["cost"]["estimate"] <= part["cost"]["high"]


@pytest.mark.slow
def test_a_script_killed_three_times_has_the_same_cells(data_root: Path, tmp_path: Path) -> None:
    def start(folder: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "benchmarks", "score-based", "--preset", "tiny", "--seeds", "1", "--data", "cifar10"]
        command += ["--root", str(data_root), "--out", str(tmp_path / folder), "--quiet"]
        return subprocess.Popen(command, cwd=Path(__file__).parent.parent, stderr=subprocess.DEVNULL)

    def killed_when(pattern: str, count: int) -> None:
        with start("killed") as process:
            while len(list((tmp_path / "killed").rglob(pattern))) < count and process.poll() is None:
                time.sleep(0.002)
            process.kill()
        assert process.returncode == -9

    killed_when("stage1*.pt", 1)
    killed_when("*_seed0.json", 3)
    killed_when("abstention*.pt", 1)
    for folder in ("killed", "whole"):
        with start(folder) as process:
            pass
        assert process.returncode == 0
    whole, other = ({p.name: p for p in (tmp_path / folder / "abstention").rglob("*.*")} for folder in ("whole", "killed"))
    assert set(whole) == set(other)
    for name, path in whole.items():
        if path.suffix == ".json":
            assert json.loads(path.read_text())["parts"] == json.loads(other[name].read_text())["parts"], name
        else:
            with np.load(path) as left, np.load(other[name]) as right:
                assert all(np.array_equal(left[key], right[key]) for key in left.files), name
