"""Predictors that are used as they are, torch modules among them, and estimators in files."""

import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.ensemble import RandomForestRegressor
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
)
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from deferral.errors import DataError
from deferral.estimators import (
    AbstainingClassifier,
    AbstainingRegressor,
    DeferralClassifier,
    DeferralRegressor,
    TrainingRowsWarning,
)
from tests.test_estimators import EVERY, half_known


def test_a_frozen_predictor_on_its_own_training_rows_warns() -> None:
    X, y, answers = half_known(200, seed=0)
    memory = KNeighborsClassifier(1).fit(X, y)
    with pytest.warns(TrainingRowsWarning, match="look like its training rows") as caught:
        model = DeferralClassifier(FrozenEstimator(memory), price=0.1).fit(X, y, answers)
    assert caught[0].filename == __file__
    fresh = half_known(200, seed=1)
    assert (model.decision(fresh[0]) == 0).all()
    held_out = DeferralClassifier(FrozenEstimator(memory), price=0.1).fit(*fresh)
    assert held_out.estimator_.estimator is memory
    # Rows that count nothing are not there, and give no warning.
    many = half_known(3000, seed=2)
    whole = [np.concatenate(parts) for parts in zip(many, fresh, strict=True)]
    weights = np.repeat([0.0, 1.0], [3000, 200])
    seen_most = KNeighborsClassifier(1).fit(*many[:2])
    DeferralClassifier(FrozenEstimator(seen_most), price=0.1).fit(*whole, sample_weight=weights)
    assert (held_out.decision(X) == 1).mean() > 0.3
    # Fitted here, the same predictor is cross-fitted: its perfect training rows are never used.
    assert (DeferralClassifier(KNeighborsClassifier(1), price=0.1).fit(X, y, answers).decision(X) == 1).mean() > 0.3


def steep(rows: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(rows, 5))
    return X, X[:, 0] + noise * generator.normal(size=rows)


@pytest.mark.slow
def test_rows_look_seen_by_what_a_clone_would_make_of_them() -> None:
    """A forest halves its error on rows it has seen without coming near 0; a linear model may come near 0 on fresh ones."""
    forest = RandomForestRegressor(20, random_state=0)
    seen, fresh = steep(400, 0.9, seed=0), steep(400, 0.9, seed=1)
    with pytest.warns(TrainingRowsWarning, match=r"mean error on these 400 rows is 0\.0[6-9]"):
        AbstainingRegressor(FrozenEstimator(clone(forest).fit(*seen))).fit(*seen)
    # Warnings are errors here.
    AbstainingRegressor(FrozenEstimator(clone(forest).fit(*seen))).fit(*fresh)
    AbstainingRegressor(FrozenEstimator(clone(forest).fit(*steep(4000, 0.9, seed=2)))).fit(*fresh)
    for noise in (0.03, 0.0):
        line = LinearRegression().fit(*steep(400, noise, seed=0))
        good = AbstainingRegressor(FrozenEstimator(line)).fit(*steep(400, noise, seed=1))
        assert good.expected_cost(fresh[0])[:, 0].mean() < 0.005


def test_without_clones_only_an_error_near_zero_is_noticed() -> None:
    X, y = steep(100, 0.0, seed=0)
    module = nn.Linear(5, 1)
    with torch.no_grad():
        module.weight.copy_(torch.eye(5)[:1])
        module.bias.zero_()
    with pytest.warns(TrainingRowsWarning, match="can be ignored") as caught:
        AbstainingRegressor(module).fit(X, y)
    assert caught[0].filename == __file__
    AbstainingRegressor(module).fit(X, y + 0.1 * np.sign(X[:, 1]))
    # One label alone: a clone cannot be fitted, and the caller is not troubled by that.
    sure = FrozenEstimator(LogisticRegression().fit(X, y > 0))
    with pytest.warns(TrainingRowsWarning, match="can be ignored"):
        AbstainingClassifier(sure).fit(X[y > 0.5], y[y > 0.5] > 0)


def linear_module(model: LogisticRegression) -> nn.Module:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(np.concatenate([-model.coef_, model.coef_]) / 2))
        module.bias.copy_(torch.tensor(np.concatenate([-model.intercept_, model.intercept_]) / 2))
    return module


def test_a_torch_module_is_a_frozen_predictor() -> None:
    X, y, answers = half_known(300, seed=0)
    X = X.astype(np.float32)
    fitted = LogisticRegression().fit(*half_known(200, seed=5)[:2])
    module = nn.Sequential(nn.Dropout(0.5), linear_module(fitted)).train()
    with_module = DeferralClassifier(module).fit(X, y, answers)
    with_frozen = DeferralClassifier(FrozenEstimator(fitted)).fit(X, y, answers)
    np.testing.assert_allclose(with_module.expected_cost(X), with_frozen.expected_cost(X), atol=1e-4)
    assert module.training
    assert module[0].training
    tensors = DeferralClassifier(module).fit(torch.tensor(X), y, answers)
    np.testing.assert_allclose(tensors.expected_cost(torch.tensor(X)), with_module.expected_cost(X), atol=1e-12)
    assert GridSearchCV(AbstainingClassifier(module), {"l2": [1.0, 9.0]}, cv=2).fit(X, y).best_estimator_.predict(X).shape == (
        300,
    )

    class Flat(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :2]

    assert AbstainingClassifier(Flat()).fit(X.reshape(300, 1, 3, 1), y).cost_model_.mean.shape == (4,)

    class Last(nn.Module):
        def forward(self, sequences: torch.Tensor) -> torch.Tensor:
            return sequences[:, -1, :2]

    sequences = torch.tensor(X).reshape(300, 1, 3)
    reader = AbstainingClassifier(Last()).fit(sequences, y)
    longer = torch.cat([torch.zeros(300, 4, 3), sequences], dim=1)
    np.testing.assert_array_equal(reader.expected_cost(longer), reader.expected_cost(sequences))
    regressor = AbstainingRegressor(nn.Linear(3, 1), cost=0.5).fit(X, X[:, 0] * 2)
    assert regressor.predict(X).shape == (300,)
    with pytest.raises(ValueError, match=r"labels in 0\.\.1"):
        AbstainingClassifier(module).fit(X, y + 1)
    with pytest.raises(ValueError, match="2 columns and y 3 labels"):
        AbstainingClassifier(module).fit(X, np.array(["a", "b", "c"])[np.arange(300) % 3])


@pytest.mark.parametrize("estimator", EVERY, ids=lambda e: type(e).__name__)
def test_saved_and_loaded_it_decides_the_same_and_holds_no_pickle(estimator, tmp_path: Path) -> None:
    X, y, answers = half_known(100, seed=0)
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    extra = (answers,) if "Deferral" in type(estimator).__name__ else ()
    model = clone(estimator).fit(frame, y, *extra)
    model.save(tmp_path / "model.skops")
    again = type(estimator).load(tmp_path / "model.skops")
    np.testing.assert_array_equal(again.expected_cost(frame), model.expected_cost(frame))
    np.testing.assert_array_equal(again.predict(frame), model.predict(frame))
    price = {"price": 0.3} if extra else {"cost": 0.05}
    np.testing.assert_array_equal(again.set_params(**price).offsets_, clone(again).fit(frame, y, *extra).offsets_)
    assert {Path(name).suffix for name in zipfile.ZipFile(tmp_path / "model.skops").namelist()} == {".json", ".npy"}
    other = AbstainingRegressor if type(estimator) is DeferralRegressor else DeferralRegressor
    with pytest.raises(ValueError, match=f"expected an estimator of the class {other.__name__}, got {type(estimator).__name__}"):
        other.load(tmp_path / "model.skops")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x05\x06" + b"\0" * 18])
def test_a_file_that_holds_no_estimator_is_said_so(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "team").write_bytes(content)
    with pytest.raises(DataError, match=r"team: expected a file that save\(\) wrote"):
        DeferralClassifier.load(tmp_path / "team")


def test_a_module_that_returns_more_than_scores_is_named() -> None:
    class Pair(nn.Linear):
        def forward(self, rows: torch.Tensor):
            return super().forward(rows), None

    X = np.random.default_rng(0).normal(size=(60, 2))
    with pytest.raises(TypeError, match="returns a tensor of scores, got tuple"):
        AbstainingClassifier(Pair(2, 2), cost=0.1).fit(X, (X[:, 0] > 0).astype(int))


class Unknown(LogisticRegression):
    """A type that skops has never heard of."""


def test_what_is_not_trusted_is_named_and_a_module_is_handed_over(tmp_path: Path) -> None:
    X, y, _ = half_known(100, seed=0)
    path = tmp_path / "model.skops"
    model = AbstainingClassifier(Unknown()).fit(X, y)
    model.save(path)
    name = f"{Unknown.__module__}.Unknown"
    with pytest.raises(ValueError, match=rf"not trusted: \['{name}'\]"):
        AbstainingClassifier.load(path)
    np.testing.assert_array_equal(AbstainingClassifier.load(path, trusted=[name]).predict(X), model.predict(X))
    with pytest.raises(ValueError, match="holds its own predictor"):
        AbstainingClassifier.load(path, trusted=[name], module=nn.Linear(3, 2))

    model = AbstainingClassifier(FrozenEstimator(LogisticRegression().fit(X, y))).fit(X, y)
    model.save(path)
    np.testing.assert_array_equal(AbstainingClassifier.load(path).predict(X), model.predict(X))

    module = linear_module(LogisticRegression().fit(X, y))
    model = AbstainingClassifier(module).fit(X, y)
    model.save(path)
    assert model.estimator is module
    np.testing.assert_array_equal(AbstainingClassifier.load(path, module=module).predict(X), model.predict(X))
    with pytest.raises(ValueError, match="pass it"):
        AbstainingClassifier.load(path)
    with pytest.raises(ValueError, match="other weights"):
        AbstainingClassifier.load(path, module=nn.Linear(3, 2))
