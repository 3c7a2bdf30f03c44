"""Training that resumes, on images."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import training
from benchmarks.harness.abstention import SINGLE_STAGE
from benchmarks.harness.images import augment
from benchmarks.harness.networks import NETWORKS
from benchmarks.harness.presets import PRESETS
from benchmarks.harness.training import Diverged, OutOfTime, Recipe, Watch, _utilisation, outputs_of, train
from deferral.datasets import Images
from tests.bench_runs import RECIPE, cross_entropy, partial_cost, started, synthetic


def test_augmentation_is_pad_crop_flip_image_by_image() -> None:
    images = synthetic(40).images
    got = augment(images, torch.Generator().manual_seed(7))
    draws = torch.Generator().manual_seed(7)
    top, left = torch.randint(0, 9, (2, 40, 1), generator=draws)
    flips = torch.rand(40, 1, generator=draws) < 0.5
    assert 5 < flips.sum() < 35
    for image, out, y, x, flip in zip(images, got, top.flatten().tolist(), left.flatten().tolist(), flips, strict=True):
        crop = F.pad(image, (4, 4, 4, 4))[:, y : y + 32, x : x + 32]
        assert torch.equal(out, crop.flip(-1) if flip else crop)


def test_networks_have_the_sizes_of_the_papers() -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in build(10).parameters()) / 1e6 for name, build in NETWORKS.items()}
    assert sizes["resnet34"] == pytest.approx(21.28, abs=0.01)
    assert sizes["wrn28_10"] == pytest.approx(36.48, abs=0.01)
    assert sizes["small"] < 0.25
    # Weights and momentum in float32 stay under 16 MiB.
    assert sizes["fast"] * 8 < 16 * 1.048576
    for name in ("small", "fast"):
        assert NETWORKS[name](7)(synthetic(2).images).shape == (2, 7)


def test_out_of_time_stops_behind_a_checkpoint_and_resuming_changes_nothing(tmp_path: Path) -> None:
    data = synthetic()
    recipe = Recipe(epochs=4, batch=50, learning_rate=0.02, warm_up=0.3)
    seen: list[int] = []

    def run(path: Path, deadline: float) -> torch.nn.Module:
        watch = Watch(lambda epoch, loss: seen.append(epoch), deadline)
        return train(lambda: NETWORKS["small"](10), data, cross_entropy, recipe, path, seed=3, watch=watch)[0]

    whole = run(tmp_path / "whole.pt", float("inf"))
    for _ in range(3):
        with pytest.raises(OutOfTime):
            run(tmp_path / "cut.pt", time.monotonic() - 1)
    resumed = run(tmp_path / "cut.pt", time.monotonic() - 1)  # the last epoch is not cut off
    assert seen == [1, 2, 3, 4] * 2
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    again = run(tmp_path / "cut.pt", float("inf"))
    assert torch.equal(
        outputs_of(again, data.images[:5], bfloat16=False)[1], outputs_of(whole, data.images[:5], bfloat16=False)[1]
    )


def test_a_checkpoint_of_another_run_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "network.pt"

    def run(**changed) -> None:
        given = {"seed": 0, "data": synthetic(60), "recipe": Recipe(epochs=1, batch=60)} | changed
        train(lambda: NETWORKS["small"](10), given["data"], cross_entropy, given["recipe"], path, seed=given["seed"])

    run()
    with pytest.raises(ValueError, match=r"another run \(seed differ\)"):
        run(seed=1)
    with pytest.raises(ValueError, match=r"another run \(data, rows differ\)"):
        run(data=synthetic(70))
    with pytest.raises(ValueError, match=r"another run \(learning_rate differ\)"):
        run(recipe=Recipe(epochs=1, batch=60, learning_rate=0.3))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="delete the file to train again"):
        run()


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_step_and_says_where(tmp_path: Path, bad: str) -> None:
    data, steps = synthetic(), [0]

    def loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        steps[0] += 1
        values = cross_entropy(scores, labels)
        if steps[0] < 5:
            return values
        # sqrt at 0 is finite and its slope is not.
        return values * torch.nan if bad == "loss" else values + (0 * scores.sum(-1)).sqrt()

    with pytest.raises(Diverged, match=r"epoch 2, step 2: .*stopped before the step"):
        train(lambda: NETWORKS["small"](10), data, loss, RECIPE, tmp_path / "network.pt", seed=0)
    state = torch.load(tmp_path / "network.pt", weights_only=True)
    assert state["epoch"] == 1
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


def test_a_gpu_that_cannot_be_asked_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_bindings(device: torch.device) -> int:
        raise ModuleNotFoundError("pynvml does not seem to be installed or it can't be imported.")

    monkeypatch.setattr(torch.cuda, "utilization", without_bindings)
    assert _utilisation(torch.device("cuda:0")) == []
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 87)
    assert _utilisation(torch.device("cuda:0")) == [87]
    assert _utilisation(torch.device("cpu")) == []


class OneDevice(TorchDispatchMode):
    """Stands for a device of its own, `meta`: only copies may cross to it, and it says 1 where it is asked for a number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype == torch.bool or 1.0
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor) and (a.dim() or a.is_meta)]
        copied = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if not copied and len({a.device for a in tensors}) > 1:
            raise AssertionError(f"{func} of tensors on several devices")
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    "recipe", [replace(PRESETS[name].recipe, epochs=1, batch=4) for name in ("fast", "paper")], ids=["fast", "paper"]
)
def test_a_step_of_every_method_keeps_to_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: Recipe) -> None:
    monkeypatch.setattr(training, "_fingerprint", lambda data: "")
    monkeypatch.setattr(training, "_save", lambda path, *given: path.touch())
    for number, loss in enumerate([cross_entropy, *(partial_cost(loss) for loss in SINGLE_STAGE.values())]):
        with OneDevice():
            data = Images(
                torch.empty(6, 3, 32, 32, dtype=torch.uint8, device="meta"), torch.zeros(6, dtype=torch.long, device="meta")
            )
            model, _ = train(lambda: NETWORKS["small"](11), data, loss, recipe, tmp_path / f"{number}.pt", seed=0)
            features, scores = outputs_of(model, data.images, bfloat16=False)
        assert (features.device.type, scores.device.type, scores.shape) == ("meta", "meta", (6, 11))


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_a_device_that_is_not_there_is_told(tmp_path: Path, device: str) -> None:
    with pytest.raises(click.UsageError, match=f"--device {device}: "), started(tmp_path, device=device):
        pass


@pytest.mark.cuda
def test_a_network_on_a_gpu_tells_its_memory(tmp_path: Path) -> None:
    speed = train(lambda: NETWORKS["small"](10), synthetic().to("cuda"), cross_entropy, RECIPE, tmp_path / "n.pt", seed=0)[1]
    assert speed["peak_memory_mebibytes"] > 0
    assert 0 <= speed.get("gpu_utilisation_percent", 0) <= 100


PROGRAM = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from tests.test_bench_training import Watch, long_run
model = long_run(Path({path!r}), Watch(lambda epoch, loss: print(epoch, flush=True)))
torch.save(model.state_dict(), {path!r} + ".done")
"""


def long_run(checkpoint: Path, watch: Watch) -> torch.nn.Module:
    recipe = Recipe(epochs=8, batch=50, learning_rate=0.02)
    return train(lambda: NETWORKS["small"](10), synthetic(200), cross_entropy, recipe, checkpoint, seed=5, watch=watch)[0]


@pytest.mark.slow
def test_killed_three_times_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    root = str(Path(__file__).parent.parent)

    def run(name: str, kill_after: int | None = None, wait: float = 0.0) -> list[int]:
        """The epochs it told, until it was killed `wait` seconds behind the epoch of that number."""
        program = PROGRAM.format(root=root, path=str(tmp_path / name))
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            told: list[int] = []
            while kill_after and (not told or told[-1] < kill_after):
                told.append(int(process.stdout.readline()))
            if kill_after is not None:
                time.sleep(wait)
                process.kill()
            told += [int(line) for line in process.stdout.read().split()]
        assert process.returncode == (0 if kill_after is None else -9)
        return told

    # Killed before anything is there, right behind a checkpoint, and some way into an epoch.
    parts = [run("killed.pt", 0, 0.3), run("killed.pt", 2), run("killed.pt", 4, 0.05), run("killed.pt")]
    told = [epoch for part in parts for epoch in part]
    # No epoch is told twice; one may go untold, whose checkpoint was written when it was killed.
    assert told == sorted(set(told))
    assert told[-1] == 8
    assert all(parts[1:])
    whole = long_run(tmp_path / "whole.pt", Watch()).state_dict()
    killed = torch.load(tmp_path / "killed.pt.done", weights_only=True)
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert not list(tmp_path.glob("*.partial*"))
