import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.ensemble import RandomForestRegressor
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import (
    GroupKFold,
    PredefinedSplit,
    train_test_split,
)
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils.estimator_checks import check_estimator

from deferral import decide, fit_offsets, pick
from deferral.datasets import uci
from deferral.estimators import (
    AbstainingClassifier,
    AbstainingRegressor,
    DeferralClassifier,
    DeferralRegressor,
)
from deferral.estimators.rejector import fit_cost_model, fit_cost_offsets

CLASSES = (AbstainingClassifier, DeferralClassifier, AbstainingRegressor, DeferralRegressor)
EVERY = [cls(l2=10.0) for cls in CLASSES]
EXPECTED_FAILURES = {
    AbstainingClassifier: {
        "check_classifiers_train": "predict marks abstentions, which are no column of predict_proba, whose argmax it compares"
    },
}


def checked_estimators() -> list:
    """CI holds one regressor; the others, and those that choose their penalty, are slow."""
    slow = [DeferralClassifier(l2=10.0), *(cls() for cls in CLASSES)]
    one = pytest.param(DeferralRegressor(l2=10.0), marks=pytest.mark.ci_slow)
    return [one, *(pytest.param(estimator, marks=pytest.mark.slow) for estimator in slow)]


@pytest.mark.parametrize("estimator", checked_estimators(), ids=lambda e: f"{type(e).__name__}-{e.l2}")
def test_scikit_learns_own_checks(estimator) -> None:
    expected = EXPECTED_FAILURES.get(type(estimator), {})
    with warnings.catch_warnings():
        # Checks that are skipped, and those that feed classes too small for five folds.
        warnings.simplefilter("ignore")
        results = check_estimator(estimator, expected_failed_checks=expected)
    # What is expected to fail must fail.
    assert {result["check_name"] for result in results if result["status"] == "xfail"} == set(expected)


def half_known(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y = x1 > 0, but for x0 < 0 half the labels are noise to the predictor; expert 1 knows y there, expert 2 nowhere."""
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(rows, 3))
    noisy = (X[:, 0] < 0) & (generator.random(rows) < 0.5)
    y = np.where(noisy, X[:, 1] <= 0, X[:, 1] > 0).astype(int)
    answers = np.stack([np.where(X[:, 0] < 0, y, 1 - y), generator.integers(0, 2, rows)], axis=-1)
    return X, y, answers


@pytest.fixture(scope="module")
def asked() -> DeferralClassifier:
    return DeferralClassifier(price=[0.1, 0.0]).fit(*half_known(600, seed=0))


def test_the_one_who_knows_is_asked_where_he_knows(asked) -> None:
    X, y, answers = half_known(3000, seed=1)
    clear = abs(X[:, 0]) > 0.3
    decision = asked.decision(X)
    assert ((decision == 1) == (X[:, 0] < 0))[clear].mean() > 0.95
    assert ((decision == 0) == (X[:, 0] > 0))[clear].mean() > 0.95
    assert np.array_equal(asked.predict(X) == asked.defer_label_, decision > 0)
    alone = asked.estimator_.score(X, y)
    assert asked.score(X, y, answers) > alone + 0.15


def test_the_score_is_one_minus_the_mean_cost(asked) -> None:
    X, y, answers = half_known(300, seed=2)
    gaps = np.random.default_rng(0).random(answers.shape) < 0.3
    given = np.where(gaps, -1, answers)
    cost, who = 0.0, asked.decision(X, available=~gaps)
    own = asked.estimator_.predict(X)
    predicted = asked.predict(X, given)
    for i, j in enumerate(who):
        answer = own[i] if j == 0 else given[i, j - 1]
        assert answer >= 0
        assert predicted[i] == answer
        cost += float(answer != y[i]) + [0.0, 0.1, 0.0][j]
    assert asked.score(X, y, given) == pytest.approx(1 - cost / 300)
    expected, decision = asked.expected_cost(X), asked.decision(X)
    costs = np.where(decision == 0, own != y, expected[np.arange(300), decision])
    assert asked.score(X, y) == pytest.approx(1 - costs.mean())


def test_the_decision_is_the_least_expected_cost_less_its_offset(asked) -> None:
    X, _, _ = half_known(200, seed=3)
    expected = asked.expected_cost(X)
    assert np.array_equal(asked.decision(X), (expected - asked.offsets_).argmin(-1))
    assert (expected >= [0, 0.1, 0]).all()
    assert (expected <= [1, 1.1, 1]).all()
    assert (asked.decision(X, available=np.array([False, False])) == 0).all()
    assert not (asked.decision(X, available=np.array([False, True])) == 1).any()
    few, y, answers = half_known(100, seed=4)
    one = DeferralClassifier(l2=10.0).fit(few, y, answers[:, 0])
    there = np.arange(200) % 2 == 0
    np.testing.assert_array_equal(one.decision(X, available=there), np.where(there, one.decision(X), 0))
    dearer = DeferralClassifier(price=[0.1, 0.0]).fit(*half_known(600, seed=0)).set_params(price=[0.3, 0.0])
    np.testing.assert_allclose(dearer.expected_cost(X) - expected, np.tile([0, 0.2, 0], (200, 1)), atol=1e-12)


def test_expected_costs_are_right_on_average_on_fresh_rows() -> None:
    model = DeferralClassifier(price=[0.1, 0.0], l2=10.0).fit(*half_known(3000, seed=1))
    X, y, answers = half_known(20_000, seed=4)
    wrong = np.column_stack([model.estimator_.predict(X), answers]) != y[:, None]
    np.testing.assert_allclose(model.expected_cost(X).mean(0), (wrong + np.array([0, 0.1, 0])).mean(0), atol=0.03)


def test_the_cost_model_reads_off_the_conditional_mean_of_a_discrete_x() -> None:
    """The optimum of the surrogate: softmax = [1 - E[c|x] / ceiling, E[c|x] / ceiling], for every action and ceiling."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.arange(5).repeat(400)
    errors = 3 * torch.rand(2000, 2, generator=generator, dtype=torch.float64) * torch.rand(5, 2, generator=generator)[cells]
    known = torch.rand(2000, 2, generator=generator) < 0.7
    fold = np.arange(2000) // 1000
    X = torch.nn.functional.one_hot(cells).double().numpy()
    model, unseen = fit_cost_model(X, errors.where(known, torch.nan), known, fold, ceiling=3.0, l2=0.0)

    def means(rows: torch.Tensor) -> torch.Tensor:
        kept = (errors * known)[rows], known[rows]
        return torch.stack([kept[0][cells[rows] == c].sum(0) / kept[1][cells[rows] == c].sum(0) for c in range(5)])

    torch.testing.assert_close(model(np.eye(5)), means(torch.arange(2000)), rtol=0, atol=1e-3)
    # What is expected of a row comes from the other fold alone.
    torch.testing.assert_close(unseen[:5], means(torch.arange(1000, 2000)), rtol=0, atol=1e-3)
    torch.testing.assert_close(unseen[1000:1005], means(torch.arange(1000)), rtol=0, atol=1e-3)
    assert torch.isfinite(model(np.array([[np.nan, 1e9, -1e9, 0, 0]]))).all()


def test_the_penalty() -> None:
    generator = np.random.default_rng(0)
    X, fold = generator.normal(size=(500, 20)), np.arange(500) % 5
    errors = torch.tensor(generator.random((500, 1)) < 1 / (1 + np.exp(2 * X[:, :1] + X[:, 1:2]))).double()
    known = torch.ones(500, 1, dtype=torch.bool)

    def unseen_loss(l2: float | None) -> float:
        _, expected = fit_cost_model(X, errors, known, fold, ceiling=1.0, l2=l2)
        return torch.nn.functional.binary_cross_entropy(expected, errors).item()

    # None takes the best of three, and the three differ.
    three = [unseen_loss(l2) for l2 in (1.0, 10.0, 100.0)]
    assert unseen_loss(None) == pytest.approx(min(three), abs=1e-4)
    assert max(three) > min(three) + 0.01
    # A strong one leaves the leading feature; a stronger one the mean.
    model, _ = fit_cost_model(X, errors, known, fold, ceiling=1.0, l2=1e4, leading=1)
    assert abs(model.weights[0, 0]) > 10 * abs(model.weights[1:, 0]).max()
    constant, _ = fit_cost_model(X, errors, known, fold, ceiling=1.0, l2=1e9)
    torch.testing.assert_close(constant(X), errors.mean().expand(500, 1), rtol=0, atol=1e-3)


def test_the_threshold_moves_only_for_more_than_one_standard_error() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(4000, 2, generator=generator, dtype=torch.float64)
    costs = (torch.rand(4000, 2, generator=generator, dtype=torch.float64) < truth).double()
    mask = torch.ones(4000, 2, dtype=torch.bool)
    ones = torch.ones(4000, dtype=torch.float64)
    fold = np.arange(4000) % 5
    assert fit_cost_offsets(truth, truth, mask, ones, fold).tolist() == [0, 0]
    # Costs of asking that are stated 0.4 too high need an offset of 0.4 for asking.
    stated = truth + torch.tensor([0.0, 0.4])
    assert fit_cost_offsets(stated, costs, mask, ones, fold).tolist() == pytest.approx([0, 0.4], abs=0.1)
    # One fold leaves none to judge by.
    assert fit_cost_offsets(stated, costs, mask, ones, 0 * fold).tolist() == [0, 0]
    # On few rows the best threshold of right scores is noise: what it costs in truth.
    few = list(zip(truth[:2000].split(40), costs[:2000].split(40), strict=True))
    always = [pick(t, decide(-t, fit_offsets(-t, c, num_own=1))).mean() for t, c in few]
    found = [fit_cost_offsets(t, c, mask[:40], ones[:40], fold[:40]) for t, c in few]
    guarded = [pick(t, decide(-t, offsets)).mean() for (t, _), offsets in zip(few, found, strict=True)]
    natural = [pick(t, decide(-t)).mean() for t, _ in few]
    assert sum(guarded) - sum(natural) < (sum(always) - sum(natural)) / 3
    # A saving of mean 0 exceeds one standard error in one of six cases.
    assert sum(bool(offsets.any()) for offsets in found) < len(few) / 5


def test_without_experts_it_is_the_predictor(asked) -> None:
    X, y, _ = half_known(200, seed=0)
    plain = DeferralClassifier(LogisticRegression()).fit(X, y)
    own = LogisticRegression().fit(X, y)
    assert np.array_equal(plain.predict(X), own.predict(X))
    assert plain.score(X, y) == pytest.approx(own.score(X, y))
    assert plain.expected_cost(X).shape == (200, 1)
    np.testing.assert_allclose(plain.predict_proba(X), own.predict_proba(X))


def test_abstaining_pays_where_the_predictor_cannot_know() -> None:
    X, y, _ = half_known(1000, seed=0)
    fresh, truth, _ = half_known(5000, seed=1)
    model = AbstainingClassifier(cost=0.2).fit(X, y)
    abstains = model.decision(fresh) == 1
    assert abstains[fresh[:, 0] < -0.3].mean() > 0.95
    assert abstains[fresh[:, 0] > 0.3].mean() < 0.2
    wrong = model.estimator_.predict(fresh) != truth
    assert model.score(fresh, truth) == pytest.approx(1 - np.where(abstains, 0.2, wrong).mean())
    assert (model.expected_cost(fresh)[:, 1] == 0.2).all()
    assert set(np.unique(model.predict(fresh))) == {-1, 0, 1}
    assert (AbstainingClassifier(cost=0.0).fit(X, y).predict(fresh) == -1).all()


def test_marks_never_collide_with_classes() -> None:
    X, y, _ = half_known(200, seed=0)
    signs = 2 * y - 1
    model = AbstainingClassifier(cost=0.3).fit(X, signs)
    assert model.abstain_label_ == -2
    assert set(np.unique(model.predict(X))) == {-2, -1, 1}
    for words in (np.array(["no", "yes"])[y], np.array(["no", "yes"], dtype=object)[y]):
        model = AbstainingClassifier(cost=0.3).fit(X, words)
        assert set(model.predict(X)) == {"abstain", "no", "yes"}
    assert set(AbstainingClassifier(cost=0.3, abstain_label=9).fit(X, y).predict(X)) == {0, 1, 9}
    with pytest.raises(ValueError, match="is a class"):
        AbstainingClassifier(abstain_label=1).fit(X, y)
    # A mark of another kind would turn 0 into "0".
    with pytest.raises(ValueError, match=r"abstain_label: expected a number .* got 'abstain'; pass None"):
        AbstainingClassifier(abstain_label="abstain").fit(X, y)
    with pytest.raises(ValueError, match=r"defer_label: expected text .* got -1; pass None"):
        DeferralClassifier(defer_label=-1).fit(X, np.array(["no", "yes"])[y])
    mixed = AbstainingClassifier(cost=0.3, abstain_label=-1).fit(X, np.array(["no", "yes"], dtype=object)[y])
    assert set(mixed.predict(X)) == {-1, "no", "yes"}
    with pytest.raises(ValueError, match="is a class"):
        DeferralClassifier().fit(X, np.array(["no", "defer"])[y])


def noisy_to_the_left(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y = x1 + noise of deviation 1 for x0 < 0, else 0.1; the expert errs by 0.3 everywhere."""
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(rows, 2))
    y = X[:, 1] + np.where(X[:, 0] < 0, 1.0, 0.1) * generator.normal(size=rows)
    return X, y, y + 0.3 * generator.choice([-1, 1], rows)


def test_the_regressor_abstains_iff_the_variance_exceeds_the_cost() -> None:
    X, y, _ = noisy_to_the_left(1500, seed=0)
    fresh, truth, _ = noisy_to_the_left(4000, seed=1)
    clear = abs(fresh[:, 0]) > 0.3
    model = AbstainingRegressor(LinearRegression(), cost=0.25).fit(X, y)
    assert (np.isnan(model.predict(fresh)) == (fresh[:, 0] < 0))[clear].mean() > 0.95
    assert model.y_scale_ == pytest.approx(y.std())
    errors = np.minimum((model.estimator_.predict(fresh) - truth) ** 2 / y.var(), 10)
    taken = np.where(model.decision(fresh) == 1, 0.25, errors)
    assert model.score(fresh, truth) == pytest.approx(1 - taken.mean())
    assert taken.mean() < min(0.25, errors.mean()) - 0.05
    assert model.expected_cost(fresh)[:, 0].mean() == pytest.approx(errors.mean(), rel=0.15)
    # No unit of y changes a decision.
    scaled = AbstainingRegressor(LinearRegression(), cost=0.25).fit(X, 1e6 * y)
    assert (scaled.decision(fresh) == model.decision(fresh)).mean() > 0.999


def test_a_constant_is_answered() -> None:
    X, _, _ = noisy_to_the_left(100, seed=0)
    # Its standard deviation is 3e-17.
    model = AbstainingRegressor().fit(X, np.full(100, 0.1))
    assert model.y_scale_ == 1
    assert (model.decision(X) == 0).all()
    assert AbstainingRegressor().fit(X, 1e-9 * X[:, 0]).y_scale_ == pytest.approx(1e-9 * X[:, 0].std())


@pytest.mark.parametrize("exponent", [531, -565])
def test_no_unit_of_y_is_too_large_or_small(exponent: int) -> None:
    """2^531 is 7e159, 2^-565 is 8e-171: their squares are no numbers."""
    X, y, expert = noisy_to_the_left(200, seed=0)
    model = DeferralRegressor(l2=10.0).fit(X, y, expert)
    far = DeferralRegressor(l2=10.0).fit(X, np.ldexp(y, exponent), np.ldexp(expert, exponent))
    assert np.ldexp(far.y_scale_, -exponent) == pytest.approx(model.y_scale_)
    np.testing.assert_allclose(far.expected_cost(X), model.expected_cost(X), rtol=1e-4, atol=1e-6)
    assert far.score(X, np.ldexp(y, exponent)) == pytest.approx(model.score(X, y), abs=1e-4)
    assert 0.9 < model.score(X, y) < 0.99


def test_the_regressor_asks_where_the_expert_errs_less() -> None:
    X, y, expert = noisy_to_the_left(1500, seed=0)
    fresh, truth, answers = noisy_to_the_left(4000, seed=1)
    given = np.where(np.random.default_rng(0).random(1500) < 0.3, np.nan, expert)
    model = DeferralRegressor(LinearRegression()).fit(X, y, given)
    clear = abs(fresh[:, 0]) > 0.3
    assert (np.isnan(model.predict(fresh)) == (fresh[:, 0] < 0))[clear].mean() > 0.95
    final = model.predict(fresh, answers)
    np.testing.assert_array_equal(final, np.where(model.decision(fresh) == 1, answers, model.estimator_.predict(fresh)))
    assert model.score(fresh, truth, answers) == pytest.approx(1 - ((final - truth) ** 2).mean() / y.var(), abs=1e-6)
    assert model.score(fresh, truth) == pytest.approx(model.score(fresh, truth, answers), abs=0.02)


@pytest.mark.slow
def test_prices_turned_after_fit_are_those_of_a_refit() -> None:
    """The threshold too: fitted at .45, it has an offset that at .1 would abstain on every row."""
    X, y, answers = half_known(600, seed=0)
    model = AbstainingClassifier(cost=0.45, l2=10.0).fit(X, y)
    assert model.offsets_[1] > 0.1
    refit = AbstainingClassifier(cost=0.1, l2=10.0).fit(X, y)
    state = dict(vars(model))
    model.cost = 0.1
    np.testing.assert_array_equal(model.offsets_, refit.offsets_)
    np.testing.assert_array_equal(model.decision(X), refit.decision(X))
    assert model.decision(X).mean() < 1
    model.cost = 0.45
    # Asking does not change it, and turning back brings back what fit found.
    assert state.keys() == vars(model).keys()
    assert all(vars(model)[name] is value for name, value in state.items())
    for change in ({"price": 0.3}, {"alpha": [0.5, 2.0]}, {"alpha": 1.2, "price": [0.1, 0.0]}):
        asks = DeferralRegressor(price=0.05, l2=10.0).fit(X, X[:, 0], answers)
        again = clone(asks).set_params(**change).fit(X, X[:, 0], answers)
        np.testing.assert_array_equal(asks.set_params(**change).decision(X), again.decision(X))
        np.testing.assert_array_equal(asks.offsets_, again.offsets_)


def test_prices_are_checked_after_fit_too() -> None:
    X, y, answers = half_known(60, seed=0)
    for model, name, wrong in (
        (AbstainingClassifier().fit(X, y), "cost", (2.0, -5.0, np.nan)),
        (AbstainingRegressor().fit(X, X[:, 0]), "cost", (-5.0, np.inf)),
        (DeferralClassifier().fit(X, y, answers), "price", (-1.0, [0.1], np.inf)),
        (DeferralRegressor().fit(X, y, answers), "alpha", (-1.0, [1.0, 1.0, 1.0])),
    ):
        for value in wrong:
            setattr(model, name, value)
            for ask in (model.decision, model.predict, model.expected_cost):
                with pytest.raises(ValueError, match=f"{name}: expected"):
                    ask(X)


@pytest.mark.slow
def test_a_row_of_weight_two_is_two_rows() -> None:
    X, y, answers = half_known(150, seed=0)
    generator = np.random.default_rng(0)
    answers = np.where(generator.random(answers.shape) < 0.2, -1, answers)
    weights, part = generator.integers(0, 4, 150), np.arange(150) % 3
    counts = part.repeat(weights)
    repeated = X.repeat(weights, axis=0), y.repeat(weights), answers.repeat(weights, axis=0)
    for model in (DeferralClassifier(price=0.1), DeferralRegressor(LinearRegression(), price=0.1, l2=10.0)):
        once = clone(model).set_params(cv=PredefinedSplit(part)).fit(X, y, answers, sample_weight=weights)
        often = clone(model).set_params(cv=PredefinedSplit(counts)).fit(*repeated)
        np.testing.assert_allclose(once.expected_cost(X), often.expected_cost(X), atol=1e-5)
        np.testing.assert_allclose(once.offsets_, often.offsets_, atol=1e-5)
        assert once.score(X, y, answers, sample_weight=weights) == pytest.approx(often.score(*repeated), abs=1e-6)
        assert abs(once.expected_cost(X) - clone(model).fit(X, y, answers).expected_cost(X)).max() > 0.01
    # A frozen predictor is not refitted, and its errors are weighted.
    base = FrozenEstimator(LogisticRegression().fit(*half_known(100, seed=5)[:2]))
    once = AbstainingClassifier(base, cv=PredefinedSplit(part), l2=10.0).fit(X, y, sample_weight=weights)
    often = AbstainingClassifier(base, cv=PredefinedSplit(counts), l2=10.0).fit(*repeated[:2])
    np.testing.assert_allclose(once.expected_cost(X), often.expected_cost(X), atol=1e-5)
    for wrong, said in ((-weights, "[Nn]egative"), (0 * weights, "positive|zero"), (weights[:-1], "shape|inconsistent")):
        with pytest.raises(ValueError, match=said):
            AbstainingClassifier().fit(X, y, sample_weight=wrong)
    with pytest.raises(TypeError, match="sample_weight"):
        AbstainingClassifier(KNeighborsClassifier()).fit(X, y, sample_weight=weights)


def test_groups_stay_together() -> None:
    """Every row four times, with coin flips for labels: who has seen a row's twin is never wrong, and knows nothing."""
    generator = np.random.default_rng(0)
    groups = np.arange(200).repeat(4)
    X, y = generator.normal(size=(200, 2))[groups], generator.integers(0, 2, 200)[groups]
    together = AbstainingClassifier(KNeighborsClassifier(1), cost=0.4, cv=GroupKFold(4)).fit(X, y, groups=groups)
    assert together.expected_cost(X)[:, 0].mean() == pytest.approx(0.5, abs=0.1)
    assert AbstainingClassifier(KNeighborsClassifier(1), cost=0.4).fit(X, y).expected_cost(X)[:, 0].mean() < 0.1
    with pytest.raises(ValueError, match="groups"):
        AbstainingClassifier(cv=GroupKFold(4)).fit(X, y)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("concrete_strength", marks=pytest.mark.ci_slow),
        pytest.param("airfoil_self_noise", marks=pytest.mark.slow),
        pytest.param("abalone", marks=pytest.mark.slow),
    ],
)
def test_on_real_tables_abstaining_is_cheaper_than_always_and_never(name: str, data_root: Path) -> None:
    """Half the rows to fit, half to judge; abstaining costs 0.7 of the predictor's mean error, in every split."""
    table = uci(data_root / "uci", name)
    X, y = table.features.numpy(), table.targets.numpy()
    saved = []
    for seed in range(3):
        train, test, y_train, y_test = train_test_split(X, y, train_size=0.5, random_state=seed)
        forest = RandomForestRegressor(30, random_state=0)
        alone = clone(forest).fit(train, y_train)
        error = ((alone.predict(test) - y_test) ** 2).mean() / y_train.var()
        model = AbstainingRegressor(forest, cost=0.7 * error).fit(train, y_train)
        saved.append(min(error, 0.7 * error) - (1 - model.score(test, y_test)))
    assert min(saved) > 0
