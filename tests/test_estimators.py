import warnings
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import polars
import pytest
import sklearn
import torch
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.dummy import DummyRegressor
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier, RandomForestRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeClassifier
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    KFold,
    LeaveOneOut,
    PredefinedSplit,
    ShuffleSplit,
    StratifiedKFold,
    TimeSeriesSplit,
    train_test_split,
)
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from deferral import decide, fit_offsets, pick
from deferral.datasets import uci
from deferral.errors import DataError
from deferral.estimators import (
    AbstainingClassifier,
    AbstainingRegressor,
    DeferralClassifier,
    DeferralRegressor,
    TrainingRowsWarning,
)
from deferral.estimators.answers import as_labels, as_numbers
from deferral.estimators.rejector import fit_cost_model, fit_cost_offsets

CLASSES = (AbstainingClassifier, DeferralClassifier, AbstainingRegressor, DeferralRegressor)
EVERY = [cls(l2=10.0) for cls in CLASSES]
EXPECTED_FAILURES = {
    AbstainingClassifier: {
        "check_classifiers_train": "predict marks abstentions, which are no column of predict_proba, whose argmax it compares"
    },
}


def checked_estimators() -> list:
    """The fast tests hold one regressor; the others, and those that choose their penalty, are slow."""
    slow = [DeferralClassifier(l2=10.0), *(cls() for cls in CLASSES)]
    return [DeferralRegressor(l2=10.0), *(pytest.param(estimator, marks=pytest.mark.slow) for estimator in slow)]


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
    assert fit_cost_offsets(truth, truth, mask, ones).tolist() == [0, 0]
    # Costs of asking that are stated 0.4 too high need an offset of 0.4 for asking.
    stated = truth + torch.tensor([0.0, 0.4])
    assert fit_cost_offsets(stated, costs, mask, ones).tolist() == pytest.approx([0, 0.4], abs=0.1)
    # On few rows the best threshold of right scores is noise: what it costs in truth.
    few = list(zip(truth.split(40), costs.split(40), strict=True))
    always = [pick(t, decide(-t, fit_offsets(-t, c, num_own=1))).mean() for t, c in few]
    guarded = [pick(t, decide(-t, fit_cost_offsets(t, c, mask[:40], ones[:40]))).mean() for t, c in few]
    assert sum(guarded) < sum(always)


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


@pytest.mark.ci_slow
def test_every_way_to_leave_an_answer_out_is_the_same() -> None:
    X, y, answers = half_known(200, seed=0)
    gaps = np.random.default_rng(0).random(answers.shape) < 0.3
    base = DeferralClassifier(l2=10.0).fit(X, y, np.where(gaps, -1, answers)).expected_cost(X)
    as_float = np.where(gaps, np.nan, answers)
    frame = pd.DataFrame(as_float).astype("Int64")
    listed = [
        [None if gap else int(answer) for gap, answer in zip(*pair, strict=True)] for pair in zip(gaps, answers, strict=True)
    ]
    masked = np.ma.array(answers, mask=gaps), np.ma.array(answers.astype(float), mask=gaps)
    for given in (as_float, frame, listed, *masked):
        np.testing.assert_array_equal(DeferralClassifier(l2=10.0).fit(X, y, given).expected_cost(X), base)
    words = np.array(["no", "yes"])
    texts = [[np.nan if answer is None else words[answer] for answer in row] for row in listed]
    for given in (texts, pd.DataFrame(texts), np.array(texts, dtype=object), np.ma.array(words[answers], mask=gaps)):
        np.testing.assert_array_equal(DeferralClassifier(l2=10.0).fit(X, words[y], given).expected_cost(X), base)


@pytest.mark.parametrize("missing", [pd.NA, pd.NaT, None, np.nan, float("nan")], ids=repr)
def test_a_missing_answer_among_objects(missing) -> None:
    for answers in (["no", missing], np.array(["no", missing], dtype=object)):
        labels, known = as_labels(answers, np.array(["no", "yes"]))
        assert known.tolist() == [[True], [False]]
        assert labels[0] == "no"
    numbers, known = as_numbers([[1.5, missing], [missing, 2]])
    assert known.tolist() == [[True, False], [False, True]]
    assert numbers[known].tolist() == [1.5, 2.0]


def test_an_answer_outside_the_classes_is_wrong() -> None:
    labels, known = as_labels(np.array(["maybe", "no"]), np.array(["no", "yes"]))
    assert labels.tolist() == [["maybe"], ["no"]]
    assert known.all()
    # Empty text, and text that spells a missing number, are text.
    assert as_labels(np.array(["", "nan"]), np.array(["no", "yes"]))[1].all()
    X, y, _ = half_known(100, seed=0)
    model = DeferralClassifier().fit(X, y, np.r_[y[:1], np.full(99, 7)])
    assert (model.expected_cost(X)[:, 1] > 0.9).all()
    assert (model.decision(X) == 0).all()


@pytest.mark.ci_slow
def test_a_search_slices_the_answers_with_the_rows() -> None:
    X, y, answers = half_known(300, seed=0)
    grid = {"estimator__logisticregression__C": [1e-4, 1.0]}
    base = make_pipeline(StandardScaler(), LogisticRegression())
    folds = StratifiedKFold(3)
    by_hand = [
        np.mean(
            [
                DeferralClassifier(clone(base).set_params(logisticregression__C=c), l2=10.0)
                .fit(X[train], y[train], answers[train])
                .score(X[test], y[test], answers[test])
                for train, test in folds.split(X, y)
            ]
        )
        for c in (1e-4, 1.0)
    ]
    with sklearn.config_context(enable_metadata_routing=True):
        model = DeferralClassifier(base, l2=10.0).set_fit_request(expert_answers=True).set_score_request(expert_answers=True)
        search = GridSearchCV(model, grid, cv=folds).fit(X, y, expert_answers=answers)
    np.testing.assert_allclose(search.cv_results_["mean_test_score"], by_hand)
    unrouted = GridSearchCV(DeferralClassifier(base, l2=10.0), grid, cv=folds).fit(X, y, expert_answers=pd.DataFrame(answers))
    assert unrouted.best_estimator_.n_experts_ == 2


def test_frames_pipelines_sparse_tables_and_text() -> None:
    X, y, answers = half_known(150, seed=0)
    base = DeferralClassifier(LogisticRegression()).fit(X, y, answers)
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    by_name = DeferralClassifier(LogisticRegression()).fit(frame, pd.Series(y), pd.DataFrame(answers))
    assert by_name.feature_names_in_.tolist() == ["a", "b", "c"]
    np.testing.assert_allclose(by_name.expected_cost(frame), base.expected_cost(X))
    with pytest.raises(ValueError, match="feature names"):
        by_name.predict(frame[["b", "a", "c"]])

    # A base that selects by name would go on, and the second stage goes by place.
    by_column = make_pipeline(ColumnTransformer([("numbers", StandardScaler(), ["a", "b", "c"])]), LogisticRegression())
    selecting = AbstainingClassifier(by_column, cost=0.3).fit(frame, y)
    for ask in (selecting.decision, selecting.predict, selecting.expected_cost, selecting.predict_proba):
        with pytest.raises(ValueError, match="feature names"):
            ask(frame[["c", "b", "a"]])

    inside = make_pipeline(StandardScaler(), DeferralClassifier(LogisticRegression()))
    inside.fit(frame, y, deferralclassifier__expert_answers=answers)
    assert inside.predict(frame).shape == (150,)

    sparse = AbstainingClassifier(LogisticRegression()).fit(csr_array(X), y)
    assert sparse.cost_model_.mean.shape == (4,)  # log-odds, margin, two probabilities
    np.testing.assert_allclose(sparse.predict_proba(csr_array(X)), sparse.predict_proba(X))
    unmarked = np.where(np.arange(450).reshape(X.shape) % 7 == 0, np.nan, X)
    gaps = AbstainingClassifier(HistGradientBoostingClassifier(max_iter=5), l2=10.0).fit(unmarked, y)
    assert np.isfinite(gaps.expected_cost(unmarked)).all()

    words = ["good fine" if label else "bad poor" for label in y]
    reader = AbstainingClassifier(make_pipeline(TfidfVectorizer(), LogisticRegression()))
    for texts in (words, pd.Series(words)):
        assert reader.fit(texts, y).score(texts, y) == 1
    mixed = frame.assign(word=words)
    pick_numbers = make_pipeline(FunctionTransformer(lambda table: table[["a", "b"]]), LogisticRegression())
    assert AbstainingClassifier(pick_numbers).fit(mixed, y).cost_model_.mean.shape == (4,)


@pytest.mark.parametrize("missing", [False, True])
def test_a_table_of_polars_is_the_table_of_pandas(missing: bool) -> None:
    X, y, answers = half_known(150, seed=0)
    base = HistGradientBoostingClassifier(max_iter=5)
    columns: dict[str, list] = {name: X[:, place].tolist() for place, name in enumerate("ab")}
    columns["sign"], columns["count"] = (X[:, 2] > 0).tolist(), list(range(150))
    if missing:
        for column in columns.values():
            column[7] = None
    by_pandas = DeferralClassifier(base, l2=10.0).fit(pd.DataFrame(columns).astype(float), y, answers)
    by_polars = DeferralClassifier(base, l2=10.0).fit(polars.DataFrame(columns), y, answers)
    assert by_polars.cost_model_.mean.shape == by_pandas.cost_model_.mean.shape
    np.testing.assert_allclose(
        by_polars.expected_cost(polars.DataFrame(columns)), by_pandas.expected_cost(pd.DataFrame(columns).astype(float))
    )


def test_bases_with_distances_or_bare_answers_or_unseen_classes() -> None:
    X, y, _ = half_known(150, seed=0)
    margins = AbstainingClassifier(RidgeClassifier(), cost=0.2).fit(X, y)
    assert not hasattr(margins, "predict_proba")
    assert 0 < margins.decision(X).mean() < 1
    three = y + (X[:, 2] > 1)
    for base in (RidgeClassifier(), RandomForestClassifier(10, random_state=0), KNeighborsClassifier(1)):
        assert AbstainingClassifier(base, cost=0.3).fit(X, three).score(X, three) > 0.5
    rare = y.copy()
    rare[0] = 2
    with pytest.warns(UserWarning, match="least populated class"):
        model = AbstainingClassifier(KNeighborsClassifier(3)).fit(X, rare)
    assert model.predict_proba(X).shape == (150, 3)


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
    with pytest.raises(ValueError, match=f"expected a {other.__name__}, got a {type(estimator).__name__}"):
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


def test_splitters() -> None:
    X, y, answers = half_known(120, seed=0)
    ordered = DeferralClassifier(LogisticRegression(), cv=TimeSeriesSplit(3)).fit(X, y, answers)
    assert ordered.predict(X).shape == (120,)
    counted, same = (AbstainingRegressor(LinearRegression(), cv=cv).fit(X, X[:, 0]) for cv in (3, np.int64(3)))
    np.testing.assert_array_equal(counted.predict(X), same.predict(X))
    one_by_one = AbstainingRegressor(LinearRegression(), cv=LeaveOneOut()).fit(X, X[:, 0])
    assert (one_by_one.decision(X) == 0).all()
    with pytest.raises(ValueError, match="at most one test part"):
        DeferralClassifier(cv=ShuffleSplit(3, random_state=0)).fit(X, y, answers)
    with pytest.raises(ValueError, match="two test parts"):
        DeferralClassifier(cv=ShuffleSplit(1, random_state=0)).fit(X, y, answers)
    seeded = KFold(4, shuffle=True, random_state=3)
    first, second = (AbstainingRegressor(cv=seeded).fit(X, X[:, 0] ** 2).expected_cost(X) for _ in range(2))
    assert np.array_equal(first, second)


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


def frozen(X: np.ndarray, y: np.ndarray) -> FrozenEstimator:
    return FrozenEstimator(LogisticRegression().fit(X, y))


def named(answers: np.ndarray, names: str = "ab") -> pd.DataFrame:
    return pd.DataFrame(answers, columns=list(names))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda X, y, a: AbstainingClassifier(cost=1.5).fit(X, y), r"cost: expected a number in \[0, 1\]"),
        (lambda X, y, a: AbstainingRegressor(cost=-1.0).fit(X, y), "cost: expected a non-negative"),
        (lambda X, y, a: AbstainingRegressor(l2=-1.0).fit(X, y), "l2: expected a non-negative"),
        (lambda X, y, a: DeferralClassifier(price=[0.1]).fit(X, y, a), r"price: .* one per expert \(2\)"),
        (lambda X, y, a: DeferralClassifier(alpha=-1.0).fit(X, y, a), "alpha: .* non-negative"),
        (lambda X, y, a: DeferralClassifier().fit(X, y, a[:-1]), "inconsistent numbers of samples"),
        (lambda X, y, a: DeferralClassifier().fit(X, y, a[:, None]), r"one column per expert"),
        (lambda X, y, a: DeferralClassifier().fit(X, y, np.full_like(a, -1)), r"an answer in every column, got none in \[0, 1\]"),
        (
            lambda X, y, a: AbstainingClassifier(cv=[(range(60), range(30)), (range(60), range(30, 60))]).fit(X, y),
            "no row in the train",
        ),
        (lambda X, y, a: AbstainingClassifier().fit(X, y).score(X, y, [1.0, 2.0]), "sample_weight"),
        (
            lambda X, y, a: DeferralClassifier().fit(X, y, a).score(X, y, a, -np.ones(60)),
            "Negative values in data passed to `sample_weight`",
        ),
        (
            lambda X, y, a: DeferralClassifier().fit(X, y, a).score(X, y.astype(str), a),
            "none of its labels, such as '[01]', is a class",
        ),
        (
            lambda X, y, a: AbstainingClassifier(frozen(X, y)).fit(X, y.astype(str)),
            r"is a class of the predictor, such as \[0, 1\]",
        ),
        (
            lambda X, y, a: DeferralClassifier().fit(X, y, named(a)).predict(X, named(a, "ba")),
            r"the columns \['a', 'b'\] as in fit",
        ),
        (lambda X, y, a: DeferralClassifier().fit(X, y, a + 7), r"none of the \d+ answers in column 0 is a class, such as"),
        (lambda X, y, a: DeferralClassifier().fit(X, y, a + 0.5), r"expected labels such as \[0, 1\]"),
        (lambda X, y, a: DeferralClassifier().fit(X, y, a.astype(str)), r"expected labels such as \[0, 1\]"),
        (lambda X, y, a: DeferralClassifier().fit(X, y.astype(str), a), r"expected labels such as \['0', '1'\]"),
        (lambda X, y, a: DeferralClassifier().fit(X, y, a).predict(X, a[:, :1]), "as in fit"),
        (lambda X, y, a: DeferralClassifier().fit(X, y, a).decision(X, a), "available: expected bool"),
        (lambda X, y, a: DeferralRegressor().fit(X, y, a.astype(str)), "as in fit|expected numbers|could not convert"),
        (lambda X, y, a: DeferralRegressor().fit(X, y, a * np.inf), "finite numbers"),
        (lambda X, y, a: AbstainingClassifier(DummyRegressor()).fit(X, y), "expected a classifier"),
        (lambda X, y, a: AbstainingRegressor(nn.Linear(3, 2)).fit(X, y), "one number per row"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
def test_bad_input(call, said: str) -> None:
    X, y, answers = half_known(60, seed=0)
    with pytest.raises(ValueError, match=said):
        call(X, y, answers)


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


class BySign:
    """Two folds by the sign of the first feature."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def get_n_splits(self, X=None, y=None, groups=None) -> int:
        return 2

    def split(self, X, y=None, groups=None):
        self.seen.append(X)
        first, second = (np.flatnonzero((X[:, 0] > 0) == sign) for sign in (False, True))
        yield first, second
        yield second, first


def test_a_splitter_sees_the_rows() -> None:
    X, y, _ = half_known(120, seed=0)
    folds = BySign()
    AbstainingClassifier(cost=0.3, cv=folds).fit(X, y)
    assert folds.seen
    for seen in folds.seen:
        np.testing.assert_array_equal(seen, X)


def test_an_expert_of_whom_the_second_stage_sees_no_answer_is_named() -> None:
    X, y = np.random.default_rng(0).normal(size=(200, 3)), np.arange(200) % 5
    answers = np.where(np.arange(200) < 20, y, -1)
    weights = 1.0 * (np.arange(200) >= 20)
    with pytest.raises(ValueError, match="an answer in every column on the rows"):
        DeferralClassifier().fit(X, y, np.where(answers < 0, np.nan, answers)[:, None], sample_weight=weights)


class OtherOrder(LogisticRegression):
    """Keeps its classes the other way round."""

    def fit(self, X, y, sample_weight=None):
        super().fit(X, y, sample_weight)
        self.classes_, self.coef_, self.intercept_ = self.classes_[::-1], -self.coef_, -self.intercept_
        return self

    def predict(self, X):
        return super().predict(X).reshape(-1, 1)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_predictor_that_orders_its_classes_otherwise_and_answers_in_a_column(frozen: bool) -> None:
    generator = np.random.default_rng(0)
    X = generator.normal(size=(400, 2))
    y = np.where(X[:, 0] + 0.3 * generator.normal(size=400) > 0, "yes", "no")
    base = FrozenEstimator(OtherOrder().fit(X[:200], y[:200])) if frozen else OtherOrder()
    fitted = AbstainingClassifier(base, cost=0.2, l2=10.0).fit(X[200:], y[200:])
    assert fitted.classes_.tolist() == ["no", "yes"]
    likeliest = fitted.classes_[fitted.predict_proba(X).argmax(axis=1)]
    assert (likeliest == y).mean() > 0.85
    assert set(fitted.predict(X)) == {"no", "yes", "abstain"}
