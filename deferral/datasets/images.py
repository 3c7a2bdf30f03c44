"""Images with one label each, as tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deferral.datasets.files import NotFound
from deferral.errors import DataError, installing
from deferral.torchvision_compat import import_torchvision

__all__ = ["Images", "cifar10", "cifar100", "digits", "svhn"]


@dataclass(frozen=True)
class Images:
    """Images (N, C, H, W) with one label each (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> "Images":
        return Images(self.images[rows], self.labels[rows])

    def to(self, device: torch.device | str) -> "Images":
        """The same images on a device."""
        return Images(self.images.to(device), self.labels.to(device))


def digits() -> Images:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels in [0, 1], float32; they come with the package."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ImportError(f"the digits need scikit-learn: {installing('sklearn')}") from error
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images / images.max()).float().reshape(-1, 1, 8, 8)
    return Images(pixels, torch.from_numpy(labels).long())


def cifar10(root: Path | str, *, train: bool) -> Images:
    """CIFAR-10 by torchvision's loader, md5 of every file checked; uint8 (N, 3, 32, 32).  Krizhevsky 2009."""
    return _cifar("CIFAR10", Path(root), train)


def cifar100(root: Path | str, *, train: bool) -> Images:
    """CIFAR-100 with its 100 fine labels, by torchvision's loader, md5 checked; uint8 (N, 3, 32, 32).  Krizhevsky 2009."""
    return _cifar("CIFAR100", Path(root), train)


def svhn(root: Path | str, *, train: bool) -> Images:
    """SVHN's cropped digits by torchvision's loader, md5 checked; uint8 (N, 3, 32, 32).  Netzer et al. 2011."""
    split = "train" if train else "test"
    loader = import_torchvision().datasets.SVHN
    _, name, md5 = loader.split_list[split]
    data = _load(lambda: loader(str(root), split=split), Path(root), [(name, md5)], "SVHN")
    return Images(torch.from_numpy(data.data), torch.from_numpy(data.labels).long())


def _cifar(name: str, root: Path, train: bool) -> Images:
    loader = getattr(import_torchvision().datasets, name)
    meta = (loader.meta["filename"], loader.meta["md5"])
    files = [(f"{loader.base_folder}/{file}", md5) for file, md5 in (*loader.train_list, *loader.test_list, meta)]
    data = _load(lambda: loader(str(root), train=train), root, files, name)
    # torchvision keeps the channels on the last axis, as PIL does.
    return Images(torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets))


def _load(loader: Callable[[], Any], root: Path, files: list[tuple[str, str]], what: str) -> Any:
    """torchvision checks every file's md5; where it refuses, the error names the file and what is wrong with it."""
    try:
        return loader()
    except RuntimeError as error:
        absent = [name for name, _ in files if not (root / name).is_file()]
        if absent:
            raise NotFound(f"{what}: expected the unpacked files {', '.join(absent)} in {root}, not found", "root") from error
        check = import_torchvision().datasets.utils.check_integrity
        for name, md5 in files:
            if not check(str(root / name), md5):
                raise DataError(f"{what}: {root / name} is corrupted, its md5 is not {md5}; copy it again") from error
        raise
