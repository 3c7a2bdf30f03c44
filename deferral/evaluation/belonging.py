"""Whether files of outputs belong together, row by row, and the costs to them."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from deferral.errors import DataError
from deferral.evaluation.outputs import Outputs

__all__ = ["check_files", "rows_of"]


def check_files(
    outputs: list[Outputs],
    paths: Sequence[Path],
    prices: Mapping[str, float],
    abstain_cost: float | None,
    calibration_share: float,
) -> None:
    """DataError where the files do not belong together, or the costs and the share do not fit them."""
    first = outputs[0]
    names = [output.name for output in outputs]
    if len(set(names)) < len(names):
        raise DataError(f"files: expected different names, since a method is called like its file; got {', '.join(names)}")
    for output, path in zip(outputs[1:], paths[1:], strict=True):
        same = len(output.targets) == len(first.targets)
        if not same or _named_targets(output) != _named_targets(first):
            detail = "the targets differ" if same else f"{len(output.targets)} rows instead of {len(first.targets)}"
            raise DataError(f"{path}: expected the rows of {paths[0]} in the same order, but {detail}")
        if output.experts != first.experts:
            raise DataError(
                f"{path}: expected the experts of {paths[0]} ({', '.join(first.experts) or 'none'}), got "
                f"{', '.join(output.experts) or 'none'}"
            )
        if output.abstains != first.abstains:
            one, other = (path, paths[0]) if output.abstains else (paths[0], path)
            raise DataError(f"{path}: in {one} rows may abstain, in {other} not; compare files with the same actions")
    if strange := sorted(set(prices) - set(first.experts)):
        raise DataError(f"price of {strange[0]!r}: there is no such expert; the file has {', '.join(first.experts) or 'none'}")
    if any(not 0 <= price < float("inf") for price in prices.values()):
        raise DataError(f"prices (--price): expected numbers >= 0, got {dict(prices)}")
    if abstain_cost is not None and not first.abstains:
        raise DataError(
            f"the cost of abstaining, {abstain_cost:g}, fits no file: {paths[0]} has no score_abstain and no row abstains"
        )
    if first.abstains and (abstain_cost is None or not 0 <= abstain_cost < float("inf")):
        raise DataError(
            f"{paths[0]} abstains: expected the cost of abstaining (--abstain-cost), a number >= 0, got {abstain_cost}"
        )
    if not 0 <= calibration_share < 1:
        raise DataError(f"calibration share: expected a number in [0, 1), got {calibration_share}")
    if calibration_share and rows_of(calibration_share, len(first.targets)) < 1:
        raise DataError(f"calibration share: {calibration_share} of {len(first.targets)} rows is less than one row")
    if abstain_cost is not None and abstain_cost > 1 and first.labels is not None:
        raise DataError(f"the cost of abstaining, {abstain_cost:g}: expected at most 1, the cost of a wrong answer")
    for output, path in zip(outputs, paths, strict=True):
        _check_sizes(output, path)
    for earlier, later in combinations(range(len(outputs)), 2):
        _check_same_answers(outputs[later], paths[later], outputs[earlier], paths[earlier])


def rows_of(share: float, rows: int) -> int:
    """How many rows a share of them is."""
    # 0.29 * 100 is a little less than 29.
    return math.floor(share * rows + 1e-9)


def _check_same_answers(output: Outputs, path: Path, other: Outputs, other_path: Path) -> None:
    """DataError where an expert's answer to a row differs between two files; it may be missing in either."""
    experts = slice(1, 1 + len(output.experts))
    known = (output.mask & other.mask)[:, experts].numpy()
    one, two = _named_answers(output)[:, experts], _named_answers(other)[:, experts]
    if len(differ := np.argwhere((one != two) & known)):
        row, column = differ[0].tolist()
        raise DataError(
            f"{path}: row {row + 1}, column 'answer_{output.experts[column]}': expected {two[row, column].item()!r} as in "
            f"{other_path}, got {one[row, column].item()!r}; an expert gives one answer to a row, or two experts are meant"
        )


def _named_answers(output: Outputs) -> np.ndarray:
    """The answers as they are written; what is missing is anything.  (N, A)"""
    return np.array(output.labels)[output.answers.numpy()] if output.labels else output.answers.numpy()


def _check_sizes(output: Outputs, path: Path) -> None:
    """DataError where squared errors are too large to be added up: often a number that stands for a missing one."""
    if output.labels is not None:
        return
    asked = 1 + len(output.experts)
    errors = (output.answers[:, :asked] - output.targets.unsqueeze(-1)).square().where(output.mask[:, :asked], 0.0)
    # Of a resample, each of as many rows may be the largest.
    if (large := (errors > torch.finfo(errors.dtype).max / len(errors)).nonzero()).numel():
        row, column = large[0].tolist()
        name = ["answer", *(f"answer_{name}" for name in output.experts)][column]
        raise DataError(
            f"{path}: row {row + 1}, column {name!r}: {float(output.answers[row, column]):g} for the target "
            f"{float(output.targets[row]):g} is too far off to be squared; expected numbers of the data, and an empty cell where "
            "an expert's answer is missing"
        )


def _named_targets(output: Outputs) -> list[str] | list[float]:
    return [output.labels[index] for index in output.targets] if output.labels else output.targets.tolist()
