"""The ranks of torchrun, one process for each GPU (nccl) or on the CPU (gloo), that train one network together:

    torchrun --standalone --nproc-per-node 4 -m benchmarks score-based --preset paper --device cuda

Every rank takes its share of each batch, and gradients are averaged: a step is that of one process up to rounding, but for batch
norms, which see the rank's share.  The first rank decides, claims and writes, and the others follow.  Without torchrun there is
one rank, and nothing is sent.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import click
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["agree", "average", "count", "first", "group", "meet", "share", "together"]

# The others wait while the first rank evaluates, or waits for a lock that another run holds.
PATIENCE = timedelta(days=1)


@contextmanager
def group(device: torch.device) -> Iterator[torch.device]:
    """Joins the ranks that torchrun's environment names; gives this rank's device.  Raises UsageError for a numbered GPU."""
    if "LOCAL_RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield device
        return
    if device.type == "cuda":
        if device.index is not None:
            raise click.UsageError(f"under torchrun every rank takes the GPU of its own number: say --device cuda, not {device}")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # What DDP loads when it is first used keeps a process group that is there by then, whose threads then outlive the program.
    importlib.import_module("torch._dynamo")
    # Decisions are tensors on the CPU, gradients lie where the network does.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield device
        # No rank leaves while another still listens.
        meet()
    finally:
        dist.destroy_process_group()


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def first() -> bool:
    """True on the rank that decides and writes."""
    return count() == 1 or dist.get_rank() == 0


def agree(value: int) -> int:
    """What the first rank says, on every rank."""
    if count() == 1:
        return value
    said = torch.tensor(int(value))
    dist.broadcast(said, src=0)
    return int(said)


def meet() -> None:
    """Returns when every rank is here."""
    if count() > 1:
        dist.all_reduce(torch.zeros(()))


def average(value: Tensor) -> Tensor:
    """The mean of a tensor over the ranks, on every rank."""
    if count() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / count()


def share(rows: int) -> tuple[slice, float]:
    """Which of a batch's rows are this rank's, and the weight at which the mean over ranks of means is the mean of the batch.

    Where the rows are fewer than the ranks, a rank without one takes the first at weight 0: all have to meet in the gradient.
    """
    if count() == 1:
        return slice(None), 1.0
    mine = range(rows)[dist.get_rank() :: count()]
    return (slice(mine.start, None, count()), len(mine) * count() / rows) if mine else (slice(1), 0.0)


def together(model: nn.Module) -> nn.Module:
    """The same network, whose `backward` averages the gradients over the ranks."""
    return model if count() == 1 else DistributedDataParallel(model)
