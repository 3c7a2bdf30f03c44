"""Train a network on images: SGD with Nesterov's momentum and a cosine schedule, a checkpoint after every epoch.

Resuming gives what not stopping would have given, on a CPU to the bit: the checkpoint holds the generator that draws rows and
crops, beside model, optimizer and schedule.  A loss or gradient that is not finite stops the run before the step.  Under torchrun
all ranks train one network; the first writes its checkpoints.
"""

import hashlib
import io
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import ranks
from benchmarks.harness.cells import write_whole
from benchmarks.harness.images import augment
from benchmarks.harness.networks import Network
from deferral.datasets import DataError, Images

__all__ = ["Diverged", "OutOfTime", "Recipe", "Watch", "outputs_of", "take_step", "train"]

_ROWS_AT_ONCE = 1000  # without gradients


class Diverged(RuntimeError):
    """The loss or a gradient is not finite."""


class OutOfTime(Exception):
    """The time budget is spent; everything done is in a checkpoint."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained."""

    epochs: int
    batch: int = 256
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    augmented: bool = True
    clip: float = float("inf")  # the largest size of a gradient that is taken as it is
    warm_up: float = 0.0  # share of the steps in which the learning rate rises
    bfloat16: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class Watch:
    """What happens after every epoch: told epoch and mean loss; and when to stop, on the clock of `time.monotonic`."""

    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None
    deadline: float = float("inf")


Loss = Callable[[Tensor, Tensor], Tensor]  # scores (B, outputs), labels (B,) -> (B,)


def train(
    build: Callable[[], Network], data: Images, loss: Loss, recipe: Recipe, checkpoint: Path, *, seed: int, watch: Watch = Watch()
) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network, resumed from the checkpoint where there is one, and how fast it went.

    Raises OutOfTime behind a checkpoint when the deadline has passed, Diverged with epoch and step, and DataError for a
    checkpoint that is damaged or of another run.
    """
    device = data.images.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(seed)
    model = build().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.learning_rate, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    steps = recipe.epochs * -(-len(data) // recipe.batch)
    schedule = _schedule(optimizer, recipe, steps)
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    # A checkpoint of other images or another recipe must not be continued.
    identity = {**asdict(recipe), "seed": seed, "rows": len(data), "data": _fingerprint(data), "weights": _shapes(model)}
    done, seconds = _resume(checkpoint, parts, generator, identity, device)
    if ranks.agree(done) != done:
        raise RuntimeError(f"{checkpoint}: expected one folder that all ranks see, but they found different checkpoints in it")
    stepping = ranks.together(model)
    if recipe.compiled:
        stepping = torch.compile(stepping)
    busy: list[int] = []
    for epoch in range(done, recipe.epochs):
        started = time.monotonic()
        mean = _epoch(stepping, parts, data, loss, recipe, generator, epoch)
        busy += _utilisation(device)
        seconds += time.monotonic() - started
        if ranks.first():
            _save(checkpoint, parts, generator, identity, epoch + 1, seconds)
        watch.on_epoch(epoch + 1, mean)
        if ranks.agree(time.monotonic() > watch.deadline) and epoch + 1 < recipe.epochs:
            raise OutOfTime
    speed = {
        "images_per_second": round(recipe.epochs * len(data) / seconds, 1),
        "training_seconds": round(seconds, 2),
        "checkpoint_mebibytes": round(checkpoint.stat().st_size / 2**20, 2),
    }
    if device.type == "cuda":
        speed["peak_memory_mebibytes"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    if busy:
        speed["gpu_utilisation_percent"] = round(sum(busy) / len(busy), 1)
    # The first rank may now remove the checkpoint, which all have read.
    ranks.meet()
    return model.eval().requires_grad_(False), speed


@torch.no_grad()
def outputs_of(model: nn.Module, images: Tensor, *, bfloat16: bool) -> tuple[Tensor, Tensor]:
    """Features (N, width) and scores (N, outputs) of a trained network, float32."""
    assert isinstance(model, Network)
    features = []
    with _precision(images.device, bfloat16):
        for part in images.split(_ROWS_AT_ONCE):
            features.append(model.features(part).float())
    together = torch.cat(features)
    return together, model.scores(together)


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    loss: Loss,
    recipe: Recipe,
    *,
    weight: float = 1.0,
) -> Tensor:
    """One step of the optimizer on a batch, or on this rank's share of one at its weight.  -> the mean loss of the batch

    Raises Diverged, on all ranks alike, before the step where loss or gradient is not finite.
    """
    with _precision(images.device, recipe.bfloat16):
        scores = model(images)
    # Outside of autocast torch's own losses would round their logarithms to bfloat16.
    scores = scores.float()
    mean = loss(scores, labels).mean() * weight
    optimizer.zero_grad()
    mean.backward()
    mean = ranks.average(mean.detach())
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    size = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if not bool(torch.isfinite(mean + size)):
        raise Diverged(
            f"the loss is {float(mean):g}, the size of its gradient {float(size):g}; stopped before the step.  The "
            f"largest score is {float(scores.detach().abs().max()):g}: lower the learning rate ({recipe.learning_rate:g}), or "
            "look for what is not finite in the loss"
        )
    if recipe.clip < float("inf"):
        torch.nn.utils.clip_grads_with_norm_(parameters, recipe.clip, size)
    optimizer.step()
    return mean


def _epoch(
    model: nn.Module,
    parts: dict[str, Any],
    data: Images,
    loss: Loss,
    recipe: Recipe,
    generator: torch.Generator,
    epoch: int,
) -> float:
    device = data.images.device
    schedule = parts["schedule"]
    model.train()
    total = torch.zeros((), device=device)
    for step, rows in enumerate(torch.randperm(len(data), generator=generator).split(recipe.batch)):
        batch = data[rows.to(device)]
        # Drawn for the whole batch on every rank: their generators stay alike.
        images = augment(batch.images, generator) if recipe.augmented else batch.images
        mine, weight = ranks.share(len(rows))
        try:
            mean = take_step(model, parts["optimizer"], images[mine], batch.labels[mine], loss, recipe, weight=weight)
        except Diverged as error:
            raise Diverged(f"epoch {epoch + 1}, step {step + 1}: {error}") from None
        schedule.step()
        total += mean * len(rows)
    return float(total) / len(data)


def _schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Down by a cosine, after a rise where the recipe has one and it is more than a step."""
    if recipe.warm_up * steps < 2:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=steps + 1, pct_start=recipe.warm_up, cycle_momentum=False
    )


def _precision(device: torch.device, bfloat16: bool) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()


def _utilisation(device: torch.device) -> list[int]:
    """The share in % of the last second in which the GPU was at work; nothing where that cannot be asked."""
    if device.type != "cuda":
        return []
    try:
        return [torch.cuda.utilization(device)]
    except Exception:  # it needs NVML's bindings and a driver that answers, and fails by errors of either
        return []


def _resume(
    path: Path, parts: dict[str, Any], generator: torch.Generator, identity: dict[str, Any], device: torch.device
) -> tuple[int, float]:
    if not path.is_file():
        return 0, 0.0
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        found = state["identity"]
    except Exception as error:  # on damaged bytes the restricted unpickler raises whatever it stumbles over
        raise DataError(f"{path}: expected a checkpoint, could not read it; delete the file to train again") from error
    if found != identity:
        differing = sorted(key for key in identity if found.get(key) != identity[key])
        raise DataError(f"{path}: a checkpoint of another run ({', '.join(differing)} differ); delete it to train again")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    generator.set_state(state["generator"].cpu())
    return state["epoch"], state["seconds"]


def _save(
    path: Path, parts: dict[str, Any], generator: torch.Generator, identity: dict[str, Any], epoch: int, seconds: float
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    states = {name: part.state_dict() for name, part in parts.items()}
    # By way of memory: on a full disk `torch.save` speaks of positions in its file, not of the disk.
    written = io.BytesIO()
    torch.save({**states, "generator": generator.get_state(), "identity": identity, "epoch": epoch, "seconds": seconds}, written)
    with write_whole(path) as partial:
        partial.write_bytes(written.getvalue())


def _fingerprint(data: Images) -> str:
    sample = data.images[:: max(1, len(data) // 100)].cpu().numpy().tobytes() + data.labels.cpu().numpy().tobytes()
    return hashlib.sha256(sample).hexdigest()[:16]


def _shapes(model: nn.Module) -> str:
    return hashlib.sha256(repr([(n, tuple(p.shape)) for n, p in model.named_parameters()]).encode()).hexdigest()[:16]
