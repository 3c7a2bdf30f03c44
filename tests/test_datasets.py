import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from deferral.datasets import DataError, cifar10, cifar10h_counts, cifar10n_annotators, digits, svhn
from deferral.experts import random_annotator, random_person


def test_digits() -> None:
    data = digits()
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.max() == 1
    assert torch.bincount(data.labels).min() > 170
    assert len(data[torch.arange(5)]) == 5


def test_a_folder_without_the_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cifar-10-batches-py/data_batch_1.* not found; name the folder .*--root"):
        cifar10(tmp_path, train=True)
    with pytest.raises(DataError, match=r"test_32x32\.mat"):
        svhn(tmp_path, train=False)
    with pytest.raises(DataError, match="--people"):
        cifar10h_counts(tmp_path)


def test_a_corrupted_batch_is_named(tmp_path: Path, data_root: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in (data_root / "cifar-10-batches-py").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "data_batch_1").unlink()
    (folder / "data_batch_1").write_bytes(b"not a batch")
    with pytest.raises(DataError, match=r"data_batch_1 is corrupted, its md5 is not c99cafc152244af753f735de768cd75f"):
        cifar10(tmp_path, train=False)


def test_corrupted_peoples_labels_are_named(tmp_path: Path) -> None:
    (tmp_path / "cifar10n.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DataError, match=r"cifar10n\.npz: expected a NumPy file"):
        cifar10n_annotators(tmp_path)
    np.savez(tmp_path / "cifar10n.npz", annotator=np.zeros((3, 3), dtype=np.int64))
    with pytest.raises(DataError, match=r"shape \(50000, 3\), got int64 of shape \(3, 3\)"):
        cifar10n_annotators(tmp_path)
    np.savez(tmp_path / "cifar10n.npz", annotator=np.array([object()]))
    with pytest.raises(DataError, match="plain arrays"):
        cifar10n_annotators(tmp_path)
    np.savez(tmp_path / "cifar10n.npz", annotator=np.full((50_000, 3), "cat"))
    with pytest.raises(DataError, match="an array of integers, not <U3"):
        cifar10n_annotators(tmp_path)
    np.savez(tmp_path / "other.npz", counts=np.ones((10_000, 10), dtype=np.int64))
    (tmp_path / "other.npz").rename(tmp_path / "cifar10h_counts.npy")
    with pytest.raises(DataError, match="an array of integers, not NpzFile"):
        cifar10h_counts(tmp_path)


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    """A deflated archive damaged at any place: an error that names the file, never another exception."""
    labels = np.random.default_rng(0).integers(0, 10, (50_000, 3))
    np.savez_compressed(tmp_path / "cifar10n.npz", annotator=labels)
    whole = (tmp_path / "cifar10n.npz").read_bytes()
    for place in np.random.default_rng(1).integers(0, len(whole), 40).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 0x5A
        (tmp_path / "cifar10n.npz").write_bytes(damaged)
        with contextlib.suppress(DataError):
            assert torch.equal(cifar10n_annotators(tmp_path), torch.from_numpy(labels))


def test_cifar10_test_images_and_their_people(data_root: Path) -> None:
    data, counts = cifar10(data_root, train=False), cifar10h_counts(data_root / "l2d")
    assert data.images.shape == (10_000, 3, 32, 32)
    assert data.images.dtype == torch.uint8
    assert data.labels[:5].tolist() == [3, 8, 8, 0, 6]
    people = random_person(counts, seed=0)
    assert (people == data.labels).double().mean().item() == pytest.approx(0.952, abs=0.01)
    annotators = cifar10n_annotators(data_root / "l2d")
    assert random_annotator(annotators, seed=0).shape == (50_000,)


@pytest.mark.ci_slow
def test_cifar10_training_images_meet_their_annotators(data_root: Path) -> None:
    labels = cifar10(data_root, train=True).labels
    right = (cifar10n_annotators(data_root / "l2d") == labels.unsqueeze(-1)).double().mean(0)
    assert right.tolist() == pytest.approx([0.828, 0.819, 0.824], abs=1e-3)


def test_a_copy_is_a_copy(tmp_path: Path, data_root: Path) -> None:
    shutil.copy(data_root / "l2d" / "cifar10h_counts.npy", tmp_path)
    assert torch.equal(cifar10h_counts(tmp_path), cifar10h_counts(data_root / "l2d"))
