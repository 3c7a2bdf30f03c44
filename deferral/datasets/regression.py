"""Regression tables of the UCI repository, by name."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deferral.datasets.files import existing, numbers, read_columns
from deferral.errors import DataError

__all__ = ["UCI", "RegressionTable", "uci"]

# Rows, and columns of the file with the target, of every regression table.
UCI = {
    "abalone": (4177, 9),
    "airfoil_self_noise": (1503, 6),
    "boston_housing": (506, 14),
    "concrete_strength": (1030, 9),
    "energy_efficiency": (768, 9),
    "naval_propulsion_plant": (11934, 17),
    "power_plant": (9568, 5),
    "wine_quality_red": (1599, 12),
    "yacht_hydrodynamics": (308, 7),
}


@dataclass(frozen=True)
class RegressionTable:
    """Features (N, d) and targets (N,) in float64 as in the source, not scaled, and a name per feature."""

    features: Tensor
    targets: Tensor
    names: tuple[str, ...]


def uci(folder: Path | str, name: str) -> RegressionTable:
    """A regression table by its name, one of `UCI`; abalone's sex becomes three columns M, F, I of 0 and 1.

    `folder` holds `<name>.csv.gz` with a header, the target in the last column.  Standardise features and targets with the
    training rows' mean and deviation, without the features that are constant (naval_propulsion_plant has two).  Some rows occur
    again exactly (wine_quality_red 240, power_plant 41, concrete_strength 25), so that random splits share them.
    """
    if name not in UCI:
        raise ValueError(f"name: expected one of {', '.join(UCI)}, got {name!r}")
    path = existing(Path(folder) / f"{name}.csv.gz", "UCI", "folder")
    columns = read_columns(path)
    shape = (len(next(iter(columns.values()), [])), len(columns))
    if shape != UCI[name]:
        raise DataError(f"{path}: expected {UCI[name]} rows and columns, got {shape}; copy it again")
    if name == "abalone":
        sexes = columns.pop("sex", [])
        if set(sexes) != set("MFI"):
            raise DataError(f"{path}: expected a column sex of M, F and I, got {sorted(set(sexes))}; copy it again")
        columns = {f"sex_{sex}": [str(int(s == sex)) for s in sexes] for sex in "MFI"} | columns
    *features, targets = (numbers(path, column, torch.float64) for column in columns.values())
    return RegressionTable(features=torch.stack(features, dim=-1), targets=targets, names=tuple(columns)[:-1])
