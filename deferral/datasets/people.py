"""People's labels: who said what of which row."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deferral.datasets.files import existing, numbers, read_array, read_columns
from deferral.errors import DataError

__all__ = ["Pathologists", "Tweets", "chaoyang", "cifar10h_counts", "cifar10n_annotators", "cifar100n", "hate_speech"]


@dataclass(frozen=True)
class Tweets:
    """Tweets (N), how many people chose each class (N, 3), and the majority's class (N,)."""

    texts: tuple[str, ...]
    counts: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Pathologists:
    """Names of image files (N), their labels (N,) and the labels of three pathologists (N, 3)."""

    files: tuple[str, ...]
    labels: Tensor
    annotators: Tensor


def cifar10n_annotators(people: Path | str) -> Tensor:
    """Three people's labels of every CIFAR-10 training image, right on 82.8, 81.9 and 82.4%.  -> (50000, 3)

    `people` is the folder with `cifar10n.npz` (array `annotator`).  Wei et al., "Learning with Noisy Labels Revisited" (2022).
    """
    path = existing(Path(people) / "cifar10n.npz", "CIFAR-10N", "people")
    labels = read_array(path, "annotator")
    if labels.shape != (50_000, 3) or labels.min() < 0 or labels.max() > 9:
        raise DataError(f"{path}: expected labels 0..9 of shape (50000, 3), got {labels.dtype} of shape {labels.shape}")
    return torch.from_numpy(labels).long()


def cifar100n(people: Path | str) -> Tensor:
    """One person's fine label of every CIFAR-100 training image, right on 59.8%.  -> (50000,)

    `people` is the folder with `cifar100n.npz` (array `annotator`).  Wei et al. (2022).
    """
    path = existing(Path(people) / "cifar100n.npz", "CIFAR-100N", "people")
    labels = read_array(path, "annotator")
    if labels.shape != (50_000,) or labels.min() < 0 or labels.max() > 99:
        raise DataError(f"{path}: expected labels 0..99 of shape (50000,), got {labels.dtype} of shape {labels.shape}")
    return torch.from_numpy(labels).long()


def cifar10h_counts(people: Path | str) -> Tensor:
    """How many people chose each class for every CIFAR-10 test image; a random person is right on 95.2%.  -> (10000, 10)

    `people` is the folder with `cifar10h_counts.npy`.  Peterson et al., "Human Uncertainty Makes Classification More Robust"
    (2019).
    """
    path = existing(Path(people) / "cifar10h_counts.npy", "CIFAR-10H", "people")
    counts = read_array(path, None)
    if counts.shape != (10_000, 10) or (counts < 0).any() or (counts.sum(-1) == 0).any():
        raise DataError(f"{path}: expected counts of shape (10000, 10), at least one in each row, got shape {counts.shape}")
    return torch.from_numpy(counts).long()


def hate_speech(people: Path | str) -> Tweets:
    """24,783 tweets that 3 to 9 people called hate speech (0), offensive language (1) or neither (2).

    `people` is the folder with `hate_speech_davidson.csv.gz`.  Davidson et al., "Automated Hate Speech Detection and the Problem
    of Offensive Language" (2017).  The texts offend.
    """
    path = existing(Path(people) / "hate_speech_davidson.csv.gz", "hate speech", "people")
    columns = read_columns(path, ["hate_speech", "offensive_language", "neither", "class", "tweet"])
    *counts, label, texts = columns.values()
    table = torch.stack([numbers(path, column, torch.int64) for column in counts], dim=-1)
    labels = numbers(path, label, torch.int64)
    if len(labels) != 24_783 or bool((table < 0).any()) or bool((labels < 0).any()) or bool((labels > 2).any()):
        raise DataError(f"{path}: expected 24783 rows of counts and a class 0..2, got {len(labels)} rows; copy it again")
    if not torch.equal(table.gather(-1, labels.unsqueeze(-1)).squeeze(-1), table.amax(dim=-1)):
        raise DataError(f"{path}: expected the class that most people chose, some row has another; copy it again")
    return Tweets(texts=tuple(texts), counts=table, labels=labels)


def chaoyang(people: Path | str, *, train: bool) -> Pathologists:
    """Colon patches that three pathologists called normal (0), serrated (1), adenocarcinoma (2) or adenoma (3).

    4,103 training and 2,057 test rows; the three agree with the label on 91.1, 87.8 and 99.7% of them all.  The images, under the
    names in `files`, are to be had from their authors.
    `people` is the folder with `chaoyang_pathologists.csv.gz`.  Zhu et al., "Hard Sample Aware Noise Robust Learning for
    Histopathology Image Classification" (2021).
    """
    path = existing(Path(people) / "chaoyang_pathologists.csv.gz", "Chaoyang", "people")
    names = ["label", "pathologist_A", "pathologist_B", "pathologist_C"]
    columns = read_columns(path, ["split", "file", *names])
    table = torch.stack([numbers(path, columns[name], torch.int64) for name in names], dim=-1)
    split = "train" if train else "test"
    rows = torch.tensor([row for row, name in enumerate(columns["split"]) if name == split], dtype=torch.int64)
    expected = 4103 if train else 2057
    if len(rows) != expected or bool((table < 0).any()) or bool((table > 3).any()):
        raise DataError(f"{path}: expected {expected} rows of the {split} split with labels 0..3, got {len(rows)}; copy it again")
    files = tuple(columns["file"][row] for row in rows.tolist())
    return Pathologists(files=files, labels=table[rows, 0], annotators=table[rows, 1:])
