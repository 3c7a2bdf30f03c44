"""Images as uint8 tensors on the device; augmentation is batched there, so no worker process is needed."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from deferral.datasets import DataError, Images, cifar10, cifar100, svhn
from deferral.torchvision_compat import import_torchvision

__all__ = ["CLASSES", "augment", "fetch", "load"]

READERS = {"cifar10": cifar10, "cifar100": cifar100, "svhn": svhn}
CLASSES = {"cifar10": 10, "cifar100": 100, "svhn": 10}
_PAD = 4


def load(data: str, root: Path, device: torch.device) -> tuple[Images, Images]:
    """Training and test images of a data set, on the device."""
    reader = READERS[data]
    return reader(root, train=True).to(device), reader(root, train=False).to(device)


def fetch(data: str, root: Path) -> None:
    """Download by torchvision's loaders what is not in the folder yet, md5 of every file checked.  Raises DataError."""
    datasets = import_torchvision().datasets
    try:
        if data == "svhn":
            for split in ("train", "test"):
                datasets.SVHN(str(root), split=split, download=True)
        else:
            {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[data](str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{data}: could not be downloaded to {root} ({error}); without a network, copy the unpacked files there and leave "
            "--download out"
        ) from error


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image padded by 4 zero pixels, cropped back at its own random place, flipped with probability 1/2.

    (B, C, H, W) -> (B, C, H, W).  The draws come from a CPU generator: a seed means the same crops on every device.
    """
    rows, _, height, width = images.shape
    top, left = torch.randint(0, 2 * _PAD + 1, (2, rows, 1), generator=generator)
    flip = torch.rand(rows, 1, generator=generator) < 0.5
    down = (torch.arange(height) + top).to(images.device)
    across = torch.arange(width).expand(rows, width)
    across = (torch.where(flip, width - 1 - across, across) + left).to(images.device)
    padded = F.pad(images, 4 * (_PAD,))
    # One flat gather: a batch of slices would be a Python loop.
    places = (down.unsqueeze(-1) * (width + 2 * _PAD) + across.unsqueeze(-2)).flatten(1).unsqueeze(1)
    return padded.flatten(2).gather(2, places.expand(-1, images.shape[1], -1)).view_as(images)
