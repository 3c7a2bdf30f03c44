"""A table of rows in 20 splits, whose every row outside the test has honest costs: nobody is judged by rows it learned from.

Expert j learns from the j-th third of the training rows.  Were it asked there, its answers would look better than those it gives
elsewhere; so there stand the answers of experts that learned from the rest of that third, a fifth of it left out in turn.
"""

import time
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.cells import write_whole
from benchmarks.harness.running import Run
from benchmarks.harness.training import OutOfTime
from deferral.datasets import DataError, RegressionTable

__all__ = ["FOLDS", "SHARES", "Columns", "Splits", "experts_answers", "joined", "others_of_each_fold", "parts_of"]

SHARES = (0.5, 0.2, 0.1, 0.2)  # training, stage 2, calibration, test
FOLDS = 5
EXPERTS = 3


@dataclass(frozen=True)
class Columns:
    """Rows of one purpose in every split: their numbers (S, N), inputs (S, N, D), standardised targets, experts (S, N, 3)."""

    numbers: Tensor
    x: Tensor
    y: Tensor
    experts: Tensor


@dataclass(frozen=True)
class Splits:
    """The rows by purpose; `rows` counts those of the data set."""

    rows: int
    train: Columns
    stage2: Columns
    calibration: Columns
    test: Columns

    @staticmethod
    def read(run: Run, data: str, table: RegressionTable, count: int, *, inner: bool = False) -> "Splits":
        """The splits of a data set; `inner` splits the rows outside each test again, and leaves the test rows out."""
        features, target = table.features.numpy(), table.targets.numpy()
        parts: list[list[Columns]] = [[], [], [], []]
        for split in range(count):
            numbers = parts_of(len(target), split, inner=inner)
            answers = _kept_answers(run, f"{data}{'-inner' if inner else ''}-split{split}", features, target, numbers, split)
            run.display.epoch(f"{data}: experts", split + 1, count)
            mean, deviation = target[numbers[0]].mean(), target[numbers[0]].std()
            for part, rows in zip(parts, numbers, strict=True):
                x, y, experts = features[rows], (target[rows] - mean) / deviation, (answers[rows] - mean) / deviation
                floats = (torch.from_numpy(values).float() for values in (x, y, experts))
                part.append(Columns(torch.from_numpy(rows), *floats))
        return Splits(len(target), *(_stacked(part) for part in parts))


def parts_of(rows: int, split: int, *, inner: bool = False) -> list[np.ndarray]:
    """Row numbers for training, stage 2, calibration and test; `inner` shares out again what is not the split's test."""
    parts = _shared_out(np.arange(rows), split)
    return _shared_out(np.sort(np.concatenate(parts[:3])), 1000 + split) if inner else parts


def experts_answers(features: np.ndarray, target: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    """What three experts who learn from `rows` answer on every row, out of fold on those that they learned from.  -> (N, 3)"""
    from sklearn.ensemble import GradientBoostingRegressor

    def answers(learned_from: np.ndarray, asked: np.ndarray) -> np.ndarray:
        return GradientBoostingRegressor(random_state=0).fit(features[learned_from], target[learned_from]).predict(asked)

    scaled = (features[rows] - features[rows].mean(0)) / np.maximum(features[rows].std(0), 1e-9)
    direction = np.linalg.svd(scaled, full_matrices=False)[2][0]
    direction = direction * np.sign(direction[np.abs(direction).argmax()])  # the sign of a component is arbitrary
    columns = []
    for third in np.array_split(rows[np.argsort(scaled @ direction, kind="stable")], EXPERTS):
        column = answers(third, features)
        for fold in np.array_split(np.random.default_rng(seed).permutation(third), FOLDS):
            column[fold] = answers(np.setdiff1d(third, fold), features[fold])
        columns.append(column)
    return np.stack(columns, axis=-1)


def others_of_each_fold(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """The fold of each row (N,), and for each fold the rows of the others (FOLDS, M), of one length."""
    fold = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)) % FOLDS
    others = [(fold != number).nonzero().flatten() for number in range(FOLDS)]
    shortest = min(len(rows) for rows in others)
    return fold, torch.stack([rows[:shortest] for rows in others])


def joined(*parts: Columns) -> Columns:
    """The rows of several purposes."""
    return Columns(*(torch.cat(columns, dim=1) for columns in zip(*(vars(part).values() for part in parts), strict=True)))


def _shared_out(rows: np.ndarray, seed: int) -> list[np.ndarray]:
    ends = np.rint(np.cumsum(SHARES)[:-1] * len(rows)).astype(int)
    return np.split(np.random.default_rng(seed).permutation(rows), ends)


def _kept_answers(
    run: Run, name: str, features: np.ndarray, target: np.ndarray, numbers: list[np.ndarray], seed: int
) -> np.ndarray:
    """The experts' answers from the work folder, because boosting takes the longest."""
    # Answers of other rows or other folds must not be taken for these, nor those of another release than the cell will name.
    made_by = (FOLDS, seed, features.shape, version("scikit-learn"))
    made_of = sha256(repr(made_by).encode() + numbers[0].tobytes() + features.tobytes() + target.tobytes())
    path: Path = run.results.work / "experts" / f"{name}-{made_of.hexdigest()[:12]}.npy"
    with run.results.claim(f"experts-{name}", wait=True):
        if not path.is_file():
            if time.monotonic() > run.deadline:
                raise OutOfTime
            path.parent.mkdir(parents=True, exist_ok=True)
            with write_whole(path) as partial:
                np.save(partial, experts_answers(features, target, numbers[0], seed))
        try:
            answers = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DataError(f"{path}: expected the answers of experts ({error}); delete the file to make them again") from error
        if answers.shape != (len(target), EXPERTS) or not np.isfinite(answers).all():
            found = f"numbers for {len(target)} rows and {EXPERTS} experts, got shape {answers.shape}"
            raise DataError(f"{path}: expected finite {found}; delete the file to make them again")
        return answers


def _stacked(parts: list[Columns]) -> Columns:
    return Columns(*(torch.stack(columns) for columns in zip(*(vars(part).values() for part in parts), strict=True)))
