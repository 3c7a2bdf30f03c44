import contextlib
import csv
import gzip
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from deferral.datasets import (
    UCI,
    DataError,
    chaoyang,
    cifar10,
    cifar10h_counts,
    cifar10n_annotators,
    cifar100,
    cifar100n,
    digits,
    hate_speech,
    svhn,
    uci,
)
from deferral.experts import majority, random_annotator, random_person


def write_table(path: Path, header: list[str], rows: Iterable[Iterable[object]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def test_digits() -> None:
    data = digits()
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.max() == 1
    assert torch.bincount(data.labels).min() > 170
    assert len(data[torch.arange(5)]) == 5


def test_a_folder_without_the_files_is_named(tmp_path: Path) -> None:
    # A library names its argument; options are those of commands.
    with pytest.raises(
        DataError, match=r"cifar-10-batches-py/data_batch_1.* not found; give the folder that holds them as `root`$"
    ):
        cifar10(tmp_path, train=True)
    with pytest.raises(DataError, match=r"test_32x32\.mat"):
        svhn(tmp_path, train=False)
    for reader in (cifar10h_counts, cifar10n_annotators, cifar100n, hate_speech, partial(chaoyang, train=True)):
        with pytest.raises(DataError, match=r"not there; give the folder that holds them as `people`$"):
            reader(tmp_path)
    with pytest.raises(DataError, match=r"not there; give the folder that holds them as `folder`$"):
        uci(tmp_path, "abalone")


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


@pytest.mark.ci_slow
def test_every_flipped_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    """A deflated archive damaged at any place: an error that names the file, never another exception."""
    labels = np.random.default_rng(0).integers(0, 10, (50_000, 3))
    np.savez_compressed(tmp_path / "cifar10n.npz", annotator=labels)
    whole = (tmp_path / "cifar10n.npz").read_bytes()
    # The names and sizes at both ends are the few bytes that are read first.
    ends = [*range(70), *range(len(whole) - 140, len(whole))]
    for place in [*np.random.default_rng(1).integers(0, len(whole), 40).tolist(), *ends]:
        damaged = bytearray(whole)
        damaged[place] ^= (0x5A, 0x01)[place % 2]
        (tmp_path / "cifar10n.npz").write_bytes(damaged)
        with contextlib.suppress(DataError):
            assert torch.equal(cifar10n_annotators(tmp_path), torch.from_numpy(labels))


@pytest.mark.ci_slow
@pytest.mark.filterwarnings("ignore:.*(escape sequence|decimal literal|numeric literal)")
def test_every_damaged_header_of_a_plain_array_is_noticed_or_harmless(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(0, 50, (10_000, 10))
    path = tmp_path / "cifar10h_counts.npy"
    np.save(path, counts)
    whole = path.read_bytes()
    for place in range(128):
        for flipped in (0x40, 0x01):
            path.write_bytes(bytes([*whole[:place], whole[place] ^ flipped]) + whole[place + 1 :])
            with contextlib.suppress(DataError):
                assert torch.equal(cifar10h_counts(tmp_path), torch.from_numpy(counts))


def test_cifar10_test_images_and_their_people(data_root: Path) -> None:
    data, counts = cifar10(data_root, train=False), cifar10h_counts(data_root / "l2d")
    assert data.images.shape == (10_000, 3, 32, 32)
    assert data.images.dtype == torch.uint8
    assert data.labels[:5].tolist() == [3, 8, 8, 0, 6]
    people = random_person(counts, seed=0)
    assert (people == data.labels).double().mean().item() == pytest.approx(0.952, abs=0.01)
    annotators = cifar10n_annotators(data_root / "l2d")
    assert random_annotator(annotators, seed=0).shape == (50_000,)


def write_yacht(folder: Path, change: Callable[[list[list[str]]], None] = lambda rows: None) -> None:
    rows = [[f"{column + row / 7:.3f}" for column in range(7)] for row in range(308)]
    change(rows)
    write_table(folder / "yacht_hydrodynamics.csv.gz", [*"abcdef", "target"], rows)


def test_a_regression_table(tmp_path: Path) -> None:
    write_yacht(tmp_path)
    table = uci(tmp_path, "yacht_hydrodynamics")
    assert table.names == tuple("abcdef")
    assert table.features.dtype == table.targets.dtype == torch.float64
    expected = torch.arange(7) + torch.arange(308).double()[:, None] / 7
    torch.testing.assert_close(torch.cat([table.features, table.targets[:, None]], -1), expected, atol=6e-4, rtol=0)


def test_the_sex_of_an_abalone_is_three_columns(tmp_path: Path) -> None:
    header = ["sex", *"bcdefgh", "rings"]
    write_table(tmp_path / "abalone.csv.gz", header, (["MFI"[i % 3], *range(7), i] for i in range(4177)))
    table = uci(tmp_path, "abalone")
    assert table.names == ("sex_M", "sex_F", "sex_I", *"bcdefgh")
    assert torch.equal(table.features[:, :3].argmax(-1), torch.arange(4177) % 3)
    assert (table.features[:, :3].sum(-1) == 1).all()
    assert table.features[5, 3:].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert torch.equal(table.targets, torch.arange(4177).double())
    write_table(tmp_path / "abalone.csv.gz", header, (["X", *range(7), i] for i in range(4177)))
    with pytest.raises(DataError, match="sex of M, F and I"):
        uci(tmp_path, "abalone")


def test_regression_tables_that_are_not_what_they_say(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected one of abalone, .* got 'wine'"):
        uci(tmp_path, "wine")
    with pytest.raises(DataError, match=r"power_plant\.csv\.gz, and it is not there"):
        uci(tmp_path, "power_plant")
    cases: list[tuple[Callable[[list[list[str]]], object], str]] = [
        (lambda rows: rows.pop(), r"expected \(308, 7\) rows and columns, got \(307, 7\)"),
        (lambda rows: rows[5].pop(), "rows of one length"),
        (lambda rows: rows.clear(), "with a header and rows"),
        (lambda rows: rows[5].__setitem__(2, "n/a"), "expected numbers"),
        (lambda rows: rows[5].__setitem__(2, "nan"), "finite"),
    ]
    for change, said in cases:
        write_yacht(tmp_path, change)
        with pytest.raises(DataError, match=said):
            uci(tmp_path, "yacht_hydrodynamics")


def test_a_damaged_table_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    write_yacht(tmp_path)
    path = tmp_path / "yacht_hydrodynamics.csv.gz"
    whole, table = path.read_bytes(), uci(tmp_path, "yacht_hydrodynamics")
    for place in np.random.default_rng(0).integers(0, len(whole), 40).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 0x5A
        path.write_bytes(damaged)
        read, said = table, path.name
        try:
            read = uci(tmp_path, "yacht_hydrodynamics")
        except DataError as error:
            said = str(error)
        assert path.name in said
        assert torch.equal(read.features, table.features)
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match="copy it again"):
        uci(tmp_path, "yacht_hydrodynamics")


def test_tweets_and_how_many_called_them_what(tmp_path: Path) -> None:
    path = tmp_path / "hate_speech_davidson.csv.gz"
    header = ["", "count", "hate_speech", "offensive_language", "neither", "class", "tweet"]
    rows = [[i, 3, *np.roll([2, 1, 0], i % 3).tolist(), i % 3, f'line 1,\nline "{i}"'] for i in range(24_783)]
    write_table(path, header, rows)
    tweets = hate_speech(tmp_path)
    assert tweets.texts[7] == 'line 1,\nline "7"'
    assert tweets.counts[:2].tolist() == [[2, 1, 0], [0, 2, 1]]
    assert torch.equal(tweets.labels, torch.arange(24_783) % 3)
    assert torch.equal(majority(tweets.counts, seed=0), tweets.labels)
    for row, column, value, said in ((3, 5, 1, "most people chose"), (3, 5, 3, r"class 0\.\.2"), (3, 2, -1, "counts")):
        changed = [list(line) for line in rows]
        changed[row][column] = value
        write_table(path, header, changed)
        with pytest.raises(DataError, match=said):
            hate_speech(tmp_path)
    write_table(path, [*header[:-1], "text"], rows)
    with pytest.raises(DataError, match="no column tweet"):
        hate_speech(tmp_path)


def test_three_pathologists(tmp_path: Path) -> None:
    path = tmp_path / "chaoyang_pathologists.csv.gz"
    header = ["split", "file", "label", "pathologist_A", "pathologist_B", "pathologist_C"]
    rows = [["train" if i < 4103 else "test", f"{i}.JPG", *((i + j) % 4 for j in range(4))] for i in range(6160)]
    write_table(path, header, rows[::-1])
    for train, files in ((True, range(4102, -1, -1)), (False, range(6159, 4102, -1))):
        data = chaoyang(tmp_path, train=train)
        assert data.files == tuple(f"{i}.JPG" for i in files)
        assert torch.equal(data.labels, torch.tensor(files) % 4)
        assert torch.equal(data.annotators, (torch.tensor(files)[:, None] + torch.tensor([1, 2, 3])) % 4)
    rows[0][2] = 4
    write_table(path, header, rows)
    with pytest.raises(DataError, match=r"4103 rows of the train split with labels 0\.\.3"):
        chaoyang(tmp_path, train=True)


def test_one_persons_labels_of_cifar100(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 100, 50_000, dtype=np.uint8)
    np.savez_compressed(tmp_path / "cifar100n.npz", annotator=labels.astype(">i4"))
    assert torch.equal(cifar100n(tmp_path), torch.from_numpy(labels).long())
    np.savez_compressed(tmp_path / "cifar100n.npz", annotator=labels + 1)
    with pytest.raises(DataError, match=r"labels 0\.\.99"):
        cifar100n(tmp_path)


@pytest.mark.ci_slow
def test_every_real_table_reads_and_agrees_with_what_is_known_of_it(data_root: Path) -> None:
    for name, (rows, columns) in UCI.items():
        table = uci(data_root / "uci", name)
        assert table.features.shape == (rows, columns - 1 + 2 * (name == "abalone"))
        assert len(table.names) == table.features.shape[1]
    # The ranges that the sources state.
    for name, low, high in (("power_plant", 420.26, 495.76), ("abalone", 1, 29), ("boston_housing", 5, 50)):
        targets = uci(data_root / "uci", name).targets
        assert (targets.min().item(), targets.max().item()) == (low, high)
    tweets = hate_speech(data_root / "l2d")
    assert torch.bincount(tweets.labels).tolist() == [1430, 19190, 4163]
    assert tweets.counts.sum(-1).min() == 3
    parts = [chaoyang(data_root / "l2d", train=train) for train in (True, False)]
    labels, people = torch.cat([part.labels for part in parts]), torch.cat([part.annotators for part in parts])
    right = (people == labels.unsqueeze(-1)).double().mean(0)
    assert right.tolist() == pytest.approx([0.911, 0.878, 0.997], abs=1e-3)


@pytest.mark.ci_slow
def test_cifar100_training_images_meet_their_annotator(data_root: Path) -> None:
    right = cifar100n(data_root / "l2d") == cifar100(data_root, train=True).labels
    assert right.double().mean().item() == pytest.approx(0.598, abs=1e-3)


@pytest.mark.ci_slow
def test_cifar10_training_images_meet_their_annotators(data_root: Path) -> None:
    labels = cifar10(data_root, train=True).labels
    right = (cifar10n_annotators(data_root / "l2d") == labels.unsqueeze(-1)).double().mean(0)
    assert right.tolist() == pytest.approx([0.828, 0.819, 0.824], abs=1e-3)


def test_a_copy_is_a_copy(tmp_path: Path, data_root: Path) -> None:
    shutil.copy(data_root / "l2d" / "cifar10h_counts.npy", tmp_path)
    assert torch.equal(cifar10h_counts(tmp_path), cifar10h_counts(data_root / "l2d"))
