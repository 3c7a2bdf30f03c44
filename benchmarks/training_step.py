"""The harness's training step beside a plain cross-entropy step.  python -m benchmarks training-step [--network small]

Claim: augmentation, the checks for NaN and a deferral loss together cost at most 1.05 times a plain step of the same network (to
the machine's noise): forward, `F.cross_entropy`, backward, SGD with Nesterov's momentum.  Medians of interleaved rounds.
"""

import statistics
import time
from collections.abc import Callable

import click
import torch
import torch.nn.functional as F

from benchmarks.harness.images import augment
from benchmarks.harness.networks import NETWORKS
from benchmarks.harness.running import usable_device
from benchmarks.harness.training import Recipe, take_step
from deferral.losses import score_based_abstention


@click.command()
@click.option("--network", type=click.Choice(list(NETWORKS)), default="small", show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=60, show_default=True)
@click.option("--bfloat16", is_flag=True)
def command(network: str, batch: int, device: str, threads: int, rounds: int, bfloat16: bool) -> None:
    """The ratio of the two steps, with and without augmentation."""
    usable_device(device)
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, 32, 32), generator=generator, dtype=torch.uint8).to(device)
    labels = torch.randint(10, (batch,), generator=generator).to(device)
    recipe = Recipe(epochs=1, batch=batch, learning_rate=0.01, clip=1.0, bfloat16=bfloat16)
    model = NETWORKS[network](11).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def plain() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bfloat16):
            scores = model(images)
        loss = F.cross_entropy(scores, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def of_the_harness(given: Callable[[], torch.Tensor]) -> None:
        take_step(model, optimizer, given(), labels, lambda scores, y: score_based_abstention(scores, y, 0.05), recipe)

    steps: dict[str, Callable[[], None]] = {
        "plain": plain,
        "harness": lambda: of_the_harness(lambda: images),
        "harness, augmented": lambda: of_the_harness(lambda: augment(images, generator)),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 5):
        for name, step in steps.items():
            seconds = _seconds(step, device)
            if number >= 5:
                times[name].append(seconds)
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken, times["plain"], strict=True))
        click.echo(f"{name:20} {1e3 * statistics.median(taken):8.2f} ms  {ratio:.3f} x plain")


def _seconds(step: Callable[[], None], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started
