"""What the scripts of the published tables promise of their problems."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.ensemble import GradientBoostingRegressor

from benchmarks import multi_expert, people, realizable, regression
from benchmarks.harness import simulated
from benchmarks.harness.asking import ALWAYS, METHODS, NEVER, Asked, Task
from benchmarks.harness.cells import Results
from benchmarks.harness.splits import Columns, Splits, experts_answers, parts_of
from benchmarks.harness.stage1 import Rows
from deferral.datasets import RegressionTable, uci
from tests.bench_tables import run


@pytest.mark.parametrize("kind", simulated.KINDS)
def test_simulated_experts_are_what_their_kind_says(kind: str) -> None:
    skills = torch.stack([matrix.diagonal() for matrix in simulated.confusions(kind, 10)])
    assert skills.shape == (20, 10)
    if kind == "specialised":
        assert ((skills == 1).sum(-1) == 2).all()
        assert (skills[:5].amax(0) == 1).all()  # five of them know everything together
    elif kind == "overlapping":
        assert ((skills == 1).sum(-1) == 5).all()
        assert len(torch.unique(skills, dim=0)) > 10
    else:
        assert (skills == skills[:, :1]).all()
        assert ((skills >= 0.5) & (skills <= 0.95)).all()
        assert (len(torch.unique(skills[:, 0])) == 1) == (kind == "equal")


def test_a_smaller_group_of_experts_is_the_beginning_of_a_larger_one() -> None:
    rows = Rows(torch.arange(50), torch.randint(10, (50,)), torch.zeros(50, 1), torch.zeros(50, 10))
    many = simulated.answers(rows, "random", 16, 10, seed=2)
    assert torch.equal(simulated.answers(rows, "random", 4, 10, seed=2), many[:, :4])
    right = (many == rows.labels.unsqueeze(-1)).float()
    assert len(torch.unique(right, dim=1).T) > 10  # each errs on its own rows


def test_one_linear_rule_decides_the_realizable_problem_without_error() -> None:
    for seed in range(3):
        sample = realizable.one_expert(2000, seed, 0)
        label, region = torch.randn(2, 30, generator=torch.Generator().manual_seed(seed))
        asks = sample.x @ region > 0
        assert 0.02 < asks.float().mean() < 0.98
        assert (sample.costs[asks, 0] == 0).all()
        assert torch.equal(sample.targets[~asks], (sample.x @ label > 0)[~asks].long())
        weights = torch.randn(10, 3, generator=torch.Generator().manual_seed(seed))
        routed = realizable.three_models(2000, seed, 0)
        assert routed.costs.gather(1, (routed.x @ weights).argmax(-1, keepdim=True)).sum() == 0
        assert routed.costs.mean(0).min() > 0.2


def test_a_split_is_a_partition_and_inner_splits_leave_its_test_rows_out() -> None:
    parts = parts_of(101, 3)
    assert [len(part) for part in parts] == [50, 21, 10, 20]
    assert sorted(np.concatenate(parts)) == list(range(101))
    inner = parts_of(101, 3, inner=True)
    assert sorted(np.concatenate(inner)) == sorted(np.concatenate(parts[:3]))
    assert [len(part) for part in inner] == [40, 17, 8, 16]


def test_as_many_test_rows_have_a_twin_as_the_page_says(data_root: Path) -> None:
    said = regression.__doc__ or ""
    for name, file in regression.DATA.items():
        table = uci(data_root / "uci", file)
        rows = np.column_stack([table.features.numpy(), table.targets.numpy()])
        same = np.unique(rows, axis=0, return_inverse=True)[1].ravel()
        shares = []
        for split in range(regression.PRESETS["laptop"].splits):
            *others, test = parts_of(len(rows), split)
            shares.append(np.isin(same[test], same[np.concatenate(others)]).mean())
        share = f"{100 * np.mean(shares):.1f}".lstrip("0")
        assert (f"{share}% of {name}" in said or f"{share}% of the test rows of {name}" in said) == (share != ".0")


def test_an_expert_knows_a_third_and_is_judged_there_by_what_it_did_not_learn_from() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(300, 3)) * [10, 0, 0]
    target = features[:, 0] + generator.normal(size=300)
    rows = parts_of(300, 0)[0]
    answers = experts_answers(features, target, rows, seed=0)
    thirds = np.array_split(rows[np.argsort(features[rows, 0])], 3)
    own = [[np.square(answers[third, j] - target[third]).mean() for j in range(3)] for third in thirds]
    # In the third that it was trained on each is by far the best; the sign of a component may reverse their order.
    order = np.argmin(own, axis=1)
    assert sorted(order) == [0, 1, 2]
    # Nobody foresees the noise, whose variance is 1.
    assert min(np.min(row) for row in own) > 0.8
    # Elsewhere stand the answers of the expert itself.
    expert = GradientBoostingRegressor(random_state=0).fit(features[thirds[0]], target[thirds[0]])
    others = np.setdiff1d(np.arange(300), thirds[0])
    np.testing.assert_allclose(answers[others, order[0]], expert.predict(features[others]))


def test_what_a_training_row_is_answered_does_not_depend_on_its_own_target() -> None:
    generator = torch.Generator().manual_seed(0)

    def columns(count: int) -> Columns:
        x = torch.randn(2, count, 3, generator=generator)
        return Columns(torch.arange(count).expand(2, count), x, torch.randn(2, count, generator=generator), x)

    train, *others = (columns(count) for count in (203, 20, 10, 10))
    moved = replace(train, y=train.y.clone())
    moved.y[:, 7] += 100
    before, after = (
        regression.Problem(Splits(243, rows, *others), regression.Size(2, 3, 3)).learning.own for rows in (train, moved)
    )
    assert torch.equal(before[:, 7], after[:, 7])
    assert (before != after).float().mean() > 0.7  # four of five predictors have learned from it


@pytest.mark.slow
def test_regression_on_a_set_whose_halves_belong_to_two_people(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(240, 2, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0])
    y = x[:, 0] * x[:, 1] + 0.1 * torch.randn(240, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(regression, "uci", lambda folder, name: RegressionTable(x, y, ("a", "b")))
    run(regression, "--data", "yacht", "--root", str(tmp_path), "--out", str(tmp_path))
    records = Results(tmp_path).read_all("regression")
    assert len(records) == 3 * 9 + 8
    costs = {(r["cell"]["cost"], r["cell"]["method"]): r["parts"][0]["cost"]["estimate"] for r in records}
    assert costs[regression.ABSTENTION, ALWAYS] == pytest.approx(0.1)
    assert costs["1 expert", NEVER] == costs["3 experts", NEVER]
    for setting in regression.COSTS:
        # Whoever keeps the same predictor's answers cannot be cheaper than hindsight.
        others = (NEVER, ALWAYS, "two-stage", regression.VARIANCE)
        assert all(costs[setting, regression.ORACLE] <= costs[setting, method] for method in others)
    never = next(r for r in records if r["cell"]["method"] == NEVER)["parts"][0]
    assert never["coverage"]["estimate"] == 1
    assert never["accepted_cost"]["estimate"] == pytest.approx(never["cost"]["estimate"])
    assert len(Results(tmp_path).samples(regression.Cell(**records[0]["cell"]))["cost0"]) <= 240


def tasks_of_two_halves(experts: int) -> Task:
    """The network is right on x > 0, expert 0 on x < 0; more experts are useless."""
    generator = torch.Generator().manual_seed(0)

    def asked(count: int) -> Asked:
        x = torch.randn(count, 2, generator=generator)
        labels = torch.randint(4, (count,), generator=generator)
        known = x[:, 0] > 0
        network = torch.where(known, labels, (labels + 1) % 4)
        scores = (3.0 * torch.nn.functional.one_hot(network, 4) + torch.randn(count, 4, generator=generator)).log_softmax(-1)
        answers = torch.stack([torch.where(known, (labels + 2) % 4, labels), *[(labels + 3) % 4] * (experts - 1)], dim=-1)
        return Asked(Rows(torch.arange(count), labels, torch.cat([x, scores], -1), scores), answers)

    return Task(asked(500), asked(300), asked(500), 0.05, 4, seed=0, steps=200)


@pytest.mark.parametrize("experts", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_every_method_learns_whom_to_ask_where_the_inputs_tell(experts: int) -> None:
    task = tasks_of_two_halves(experts)
    baselines = task.baselines()
    for name, method in METHODS.items():
        # The losses of one expert, and one method of each kind beside them.
        if (name in people.ONE_EXPERT) == (experts > 1) and name not in ("one-vs-all", "two-stage mu=2"):
            continue
        judged = method(task)
        assert judged.cost.mean() < 0.8 * min(baselines[NEVER].cost.mean(), baselines[ALWAYS].cost.mean()), name
        if experts > 1:
            assert judged.load[:, 0].mean() > 5 * judged.load[:, 1:].mean(), name


def test_the_docstrings_name_the_methods_that_are_trained_without_knowing_the_price() -> None:
    """Those whose natural threshold decides alike whatever the price is."""
    free = replace(tasks_of_two_halves(1), price=0.0, steps=5)
    dear = replace(free, price=0.9)
    alike = {name for name, method in METHODS.items() if torch.equal(method(free).natural_kept, method(dear).natural_kept)}
    for script, methods in ((multi_expert, multi_expert.METHODS), (people, people.LEARNED)):
        sentences = (script.__doc__ or "").replace("\n", " ").split(".  ")
        told = next(sentence for sentence in sentences if "without knowing the price" in sentence)
        assert {name for name in methods if name in told} == alike.intersection(methods)
