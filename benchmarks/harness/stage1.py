"""The shared first stage: one network per (data, seed), and what it says of the rows it did not see.

All two-stage methods, Chow's rule and every head on frozen features start from these tables.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import ranks
from benchmarks.harness.cells import write_whole
from benchmarks.harness.images import CLASSES
from benchmarks.harness.networks import NETWORKS
from benchmarks.harness.running import Busy, Run
from benchmarks.harness.training import Recipe, outputs_of, train
from deferral.datasets import DataError, Images

__all__ = ["FirstStage", "Rows", "first_stage", "recipe_for", "rows_by_purpose"]

COLUMNS = ("numbers", "labels", "features", "scores")  # of the tables, in the order of Rows


@dataclass(frozen=True)
class Rows:
    """Some images seen through the network: their numbers in the data set, labels, features and log-probabilities."""

    numbers: Tensor
    labels: Tensor
    features: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> "Rows":
        return Rows(*(getattr(self, field.name)[rows] for field in fields(self)))

    @cached_property
    def answers(self) -> Tensor:
        """The network's own answers."""
        return self.scores.argmax(dim=-1)

    @cached_property
    def wrong(self) -> Tensor:
        """1 where the own answer is wrong."""
        return (self.answers != self.labels).float()

    @cached_property
    def inputs(self) -> Tensor:
        """What a head sees: the features, the log-odds of the top class, the five highest log-probabilities.

        The log-odds are Chow's signal, so that a second stage can do no worse than find it again.
        """
        log_p = self.scores.sort(dim=-1, descending=True).values
        odds = log_p[:, :1] - log_p[:, 1:].logsumexp(dim=-1, keepdim=True)
        return torch.cat([odds, log_p[:, :5], self.features], dim=-1)


@dataclass(frozen=True)
class FirstStage:
    """The rows that the network was not trained on, by purpose."""

    stage2: Rows
    calibration: Rows
    test: Rows
    speed: Mapping[str, float]


def rows_by_purpose(run: Run, total: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of training images for the predictor, the second stage and the thresholds, drawn with the seed."""
    preset = run.preset
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    sizes = [preset.predictor_rows, preset.stage2_rows, preset.calibration_rows]
    predictor, stage2, calibration = order[: sum(sizes)].split(sizes)
    return predictor, stage2, calibration


def first_stage(run: Run, data: str, seed: int) -> FirstStage:
    """The tables of the first stage; the network is trained, or resumed, where they are not there yet.

    Raises Busy while another process does that.
    """
    preset = run.preset
    # Tables of another recipe or other rows must not be taken for these.
    made_by = (preset.network[data], preset.predictor_rows, preset.stage2_rows, preset.calibration_rows, recipe_for(run, data))
    name = f"stage1-{run.preset_name}-{data}-seed{seed}-{hashlib.sha256(repr(made_by).encode()).hexdigest()[:8]}"
    path = run.results.work / f"{name}.npz"
    with run.claim(name) as mine:
        if not mine:
            raise Busy(name)
        if ranks.agree(not path.is_file()):
            _write_tables(run, data, seed, path)
        if ranks.first():
            path.with_suffix(".pt").unlink(missing_ok=True)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            parts = {
                part: Rows(*(torch.from_numpy(arrays[f"{part}_{column}"]) for column in COLUMNS))
                for part in ("stage2", "calibration", "test")
            }
            return FirstStage(**parts, speed=json.loads(str(arrays["speed"])))
    except (KeyError, ValueError, EOFError, BadZipFile) as error:
        raise DataError(f"{path}: expected the tables of a first stage ({error}); delete the file to make them again") from error


def _write_tables(run: Run, data: str, seed: int, path: Path) -> None:
    train_images, test_images = run.images(data)
    predictor, stage2, calibration = rows_by_purpose(run, len(train_images), seed)
    test = torch.arange(len(test_images))[: run.preset.test_rows]
    model, speed = train(
        lambda: NETWORKS[run.preset.network[data]](CLASSES[data]),
        train_images[predictor.to(run.device)],
        lambda scores, labels: F.cross_entropy(scores, labels, reduction="none"),
        recipe_for(run, data),
        path.with_suffix(".pt"),
        seed=seed,
        watch=run.watch(f"{data}: first stage, seed {seed}", run.recipe.epochs),
    )
    arrays = {"speed": np.asarray(json.dumps(speed))}
    sources: dict[str, tuple[Images, Tensor]] = {
        "stage2": (train_images, stage2),
        "calibration": (train_images, calibration),
        "test": (test_images, test),
    }
    for part, (images, numbers) in sources.items():
        chosen = images[numbers.to(run.device)]
        features, scores = outputs_of(model, chosen.images, bfloat16=run.bfloat16)
        for column, values in zip(COLUMNS, (numbers, chosen.labels, features, scores.log_softmax(-1)), strict=True):
            arrays[f"{part}_{column}"] = values.cpu().numpy()
    if ranks.first():
        with write_whole(path) as partial:
            np.savez(partial, **arrays)
    ranks.meet()


def recipe_for(run: Run, data: str) -> Recipe:
    """The run's recipe; SVHN is not augmented, as published."""
    return replace(run.recipe, augmented=data != "svhn")
