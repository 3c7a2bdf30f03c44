"""Several ranks train one network: its steps are those of one process, and one rank writes."""

import json
import os
import socket
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness import ranks
from benchmarks.harness.networks import NETWORKS, Network
from benchmarks.harness.training import Diverged, OutOfTime, Recipe, Watch, train
from deferral.datasets import Images

ROOT = Path(__file__).parent.parent
ONE_STEP = Recipe(epochs=1, batch=9, learning_rate=0.05, augmented=False)
# The last batch of three has one row, which leaves a rank without any; clip acts on what all ranks agree on.
WHOLE = Recipe(epochs=3, batch=4, learning_rate=0.05, clip=0.5)
WITH_NORMS = Recipe(epochs=2, batch=10, learning_rate=0.05)


def images(rows: int) -> Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (rows, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(rows) % 10)


def plain(outputs: int) -> Network:
    """Without batch norms, which see the share of a rank."""
    return Network(nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 16), nn.Tanh()), 16, outputs)


def cross_entropy(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(scores, labels, reduction="none")


def infinite_for_seven(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Infinite on the label 7, though its gradient is finite."""
    return cross_entropy(scores, labels) + torch.where(labels == 7, torch.inf, 0.0)


def learned(recipe: Recipe, path: Path, *, rows: int, build=plain, loss=cross_entropy, watch: Watch | None = None) -> nn.Module:
    return train(lambda: build(10), images(rows), loss, recipe, path, seed=1, watch=watch or Watch())[0]


def on_each_rank(folder: Path) -> None:
    """What each of two processes does; the first one's networks are kept."""
    warnings.simplefilter("error")
    with ranks.group(torch.device("cpu")):
        rank = int(os.environ["RANK"])
        assert ranks.count() == 2
        assert ranks.first() == (rank == 0)
        assert ranks.agree(rank + 5) == 5
        assert ranks.average(torch.tensor(float(rank))) == 0.5
        one_step = learned(ONE_STEP, folder / "one.pt", rows=9)
        gradients = [parameter.grad for parameter in one_step.parameters()]
        whole = learned(WHOLE, folder / "whole.pt", rows=9)
        with pytest.raises(Diverged) as diverged:
            learned(ONE_STEP, folder / "diverged.pt", rows=8, loss=infinite_for_seven)
        with_norms = partial(learned, WITH_NORMS, rows=25, build=NETWORKS["small"])
        with_norms(folder / "norms.pt")
        # Only the first rank is out of time.
        with pytest.raises(OutOfTime):
            with_norms(folder / "cut.pt", watch=Watch(deadline=float("inf") if rank else 0.0))
        assert torch.load(folder / "cut.pt", weights_only=True)["epoch"] == 1
        ranks.meet()
        with_norms(folder / "cut.pt")
        kept = {"gradients": gradients, "whole": whole.state_dict(), "diverged": str(diverged.value)}
        torch.save(kept, folder / f"rank{rank}.pt")
        del diverged  # its traceback holds a network
    assert not torch.distributed.is_initialized()
    # A group that something still holds keeps threads, which may abort the program when it ends.
    assert not [path for path in Path("/proc/self/task").glob("*/comm") if "gloo" in path.read_text()]


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one_process(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = f"from pathlib import Path; from tests.test_bench_ranks import on_each_rank; on_each_rank(Path({str(tmp_path)!r}))"
    environment = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, told = process.communicate(timeout=120)
        assert (process.returncode, told) == (0, "")
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))

    # By definition: the gradient of the mean over all rows.
    torch.manual_seed(1)
    model, data = plain(10), images(9)
    F.cross_entropy(model(data.images), data.labels).backward()
    for parameter, ours, others in zip(model.parameters(), first["gradients"], second["gradients"], strict=True):
        torch.testing.assert_close(ours, parameter.grad)
        assert torch.equal(ours, others)
    alone = learned(WHOLE, tmp_path / "alone.pt", rows=9).state_dict()
    for name, value in alone.items():
        torch.testing.assert_close(first["whole"][name], value, rtol=1e-4, atol=1e-6)
    # Row 7 is of one rank alone.
    assert "epoch 1, step 1: the loss is inf" in first["diverged"]
    assert "epoch 1, step 1: the loss is inf" in second["diverged"]
    cut, norms = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("cut.pt", "norms.pt"))
    assert all(torch.equal(cut[name], norms[name]) for name in norms)


def test_every_row_of_a_batch_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for many in (2, 3, 8):
        monkeypatch.setattr(ranks, "count", lambda many=many: many)
        for rows in (1, 2, 7, 8):
            counted = torch.zeros(rows)
            for rank in range(many):
                monkeypatch.setattr(ranks.dist, "get_rank", lambda rank=rank: rank)
                mine, weight = ranks.share(rows)
                counted[mine] += weight / len(counted[mine]) / many
            torch.testing.assert_close(counted, torch.full((rows,), 1 / rows))


def torchrun(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "benchmarks"]
    command += ["score-based", "--preset", "tiny", "--data", "cifar10", "--seeds", "1", "--quiet", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_torchrun_writes_one_set_of_cells(data_root: Path, tmp_path: Path) -> None:
    with torchrun("--root", str(data_root), "--out", str(tmp_path)) as process:
        told = process.stderr.read().splitlines()
    assert process.returncode == 0, told
    paths = sorted(tmp_path.glob("abstention/tiny/*.json"))
    assert len(paths) == 6
    # One line for each cell, by one rank; no warning of theirs or of torchrun.
    assert len(told) == 6
    assert all(line.startswith("abstention: cifar10, ") for line in told)
    records = [json.loads(path.read_text()) for path in paths]
    assert all(record["machine"]["ranks"] == "2" for record in records)
    trained = [record for record in records if "speed" in record["settings"]]
    assert len(trained) == 2
    assert all(record["settings"]["speed"]["checkpoint_mebibytes"] > 0 for record in trained)
    assert not list((tmp_path / "work").glob("*.pt*"))
    before = {path: path.read_bytes() for path in paths}
    with torchrun("--root", str(data_root), "--out", str(tmp_path)) as process:
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert {path: path.read_bytes() for path in paths} == before


@pytest.mark.slow
def test_two_torchruns_share_the_cells(data_root: Path, tmp_path: Path) -> None:
    arguments = ("--root", str(data_root), "--out", str(tmp_path))
    with torchrun(*arguments) as one, torchrun(*arguments) as two:
        told = one.stderr.read().splitlines() + two.stderr.read().splitlines()
    assert (one.returncode, two.returncode) == (0, 0), told
    assert len(told) == len({line.partition(": cost")[0] for line in told}) == 6
