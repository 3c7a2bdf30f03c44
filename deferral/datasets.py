"""Real data as tensors: handwritten digits, CIFAR, SVHN, and people's labels of CIFAR-10.

`root` is one folder with `cifar-10-batches-py/`, `cifar-100-python/`, `*_32x32.mat`, and `l2d/` for people's labels.
"""

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deferral.torchvision_compat import import_torchvision

__all__ = ["DataError", "Images", "cifar10", "cifar10h_counts", "cifar10n_annotators", "cifar100", "digits", "svhn"]


class DataError(ValueError):
    """Data that is missing, corrupted or not what its name says."""


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
        raise ImportError("the digits need scikit-learn: pip install 'deferral[sklearn]'") from error
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


def cifar10n_annotators(people: Path | str) -> Tensor:
    """Three people's labels of every CIFAR-10 training image, right on 82.8, 81.9 and 82.4%.  -> (50000, 3)

    `people` is the folder with `cifar10n.npz` (array `annotator`).  Wei et al., "Learning with Noisy Labels Revisited" (2022).
    """
    path = _existing(Path(people) / "cifar10n.npz", "CIFAR-10N")
    labels = _read_array(path, "annotator")
    if labels.shape != (50_000, 3) or labels.min() < 0 or labels.max() > 9:
        raise DataError(f"{path}: expected labels 0..9 of shape (50000, 3), got {labels.dtype} of shape {labels.shape}")
    return torch.from_numpy(labels).long()


def cifar10h_counts(people: Path | str) -> Tensor:
    """How many people chose each class for every CIFAR-10 test image; a random person is right on 95.2%.  -> (10000, 10)

    `people` is the folder with `cifar10h_counts.npy`.  Peterson et al., "Human Uncertainty Makes Classification More Robust"
    (2019).
    """
    path = _existing(Path(people) / "cifar10h_counts.npy", "CIFAR-10H")
    counts = _read_array(path, None)
    if counts.shape != (10_000, 10) or (counts < 0).any() or (counts.sum(-1) == 0).any():
        raise DataError(f"{path}: expected counts of shape (10000, 10), at least one in each row, got shape {counts.shape}")
    return torch.from_numpy(counts).long()


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
            raise DataError(
                f"{what}: expected {', '.join(absent)} in {root}, not found; name the folder that holds the unpacked files "
                "with --root or DEFERRAL_DATA"
            ) from error
        check = import_torchvision().datasets.utils.check_integrity
        for name, md5 in files:
            if not check(str(root / name), md5):
                raise DataError(f"{what}: {root / name} is corrupted, its md5 is not {md5}; copy it again") from error
        raise


def _existing(path: Path, what: str) -> Path:
    if not path.is_file():
        raise DataError(f"{what}: expected the file {path}, and it is not there; name its folder with --people or DEFERRAL_DATA")
    return path


def _read_array(path: Path, key: str | None) -> np.ndarray:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            array = loaded if key is None else loaded[key]
        if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"an array of integers, not {getattr(array, 'dtype', type(array).__name__)}")
        return array
    except (ValueError, OSError, EOFError, LookupError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path}: expected a NumPy file with plain arrays of integers, could not read it ({error}); copy it again"
        ) from error
