"""What the estimators take: answers, tables, predictors and splitters of every kind; and what they say of what they do not."""

import numpy as np
import pandas as pd
import polars
import pytest
import sklearn
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.dummy import DummyRegressor
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeClassifier
from sklearn.model_selection import (
    GridSearchCV,
    KFold,
    LeaveOneOut,
    ShuffleSplit,
    StratifiedKFold,
    TimeSeriesSplit,
)
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch import nn

from deferral.estimators import (
    AbstainingClassifier,
    AbstainingRegressor,
    DeferralClassifier,
    DeferralRegressor,
)
from deferral.estimators.answers import as_labels, as_numbers
from tests.test_estimators import half_known


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


@pytest.mark.slow
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


@pytest.mark.slow
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
    by_default = AbstainingClassifier().fit(csr_array(X), y)
    np.testing.assert_allclose(
        by_default.predict_proba(csr_array(X)), AbstainingClassifier().fit(X, y).predict_proba(X), atol=1e-4
    )
    numbers = DeferralRegressor(price=0.1).fit(csr_array(X), X[:, 0], expert_answers=X[:, [0]])
    np.testing.assert_allclose(
        numbers.estimator_.predict(csr_array(X)), DeferralRegressor().fit(X, X[:, 0], X[:, [0]]).estimator_.predict(X)
    )
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


def frozen(X: np.ndarray, y: np.ndarray) -> FrozenEstimator:
    return FrozenEstimator(LogisticRegression().fit(X, y))


@pytest.mark.parametrize("bad", ["a", None, [0.1, "a"], True])
def test_numbers_that_are_none_are_told_by_name(bad) -> None:
    X, y, answers = half_known(60, seed=0)
    for model in (AbstainingClassifier(cost=bad), AbstainingRegressor(cost=bad)):
        with pytest.raises(TypeError, match="cost: expected a number"):
            model.fit(X, y)
    if bad is not None:
        with pytest.raises(TypeError, match="l2: expected a number"):
            AbstainingClassifier(l2=bad).fit(X, y)
    if bad is not True:
        for model in (DeferralClassifier(price=bad), DeferralRegressor(alpha=bad)):
            with pytest.raises(TypeError, match=r"(price|alpha): expected a torch tensor, or numbers"):
                model.fit(X, y, answers)
    with pytest.raises(TypeError, match="estimator: expected a scikit-learn estimator, a torch module or None, got str"):
        AbstainingClassifier("logistic").fit(X, y)


def named(answers: np.ndarray, names: str = "ab") -> pd.DataFrame:
    return pd.DataFrame(answers, columns=list(names))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda X, y, a: AbstainingClassifier(cost=1.5).fit(X, y), r"cost: expected a number in \[0, 1\]"),
        (lambda X, y, a: AbstainingRegressor(cost=-1.0).fit(X, y), "cost: expected a non-negative"),
        (lambda X, y, a: AbstainingRegressor(l2=-1.0).fit(X, y), "l2: expected a finite number >= 0"),
        (lambda X, y, a: AbstainingRegressor(l2=np.inf).fit(X, y), "l2: expected a finite number >= 0.*got inf"),
        (lambda X, y, a: AbstainingRegressor().fit(X, y * 1e-310), "y: expected ordinary numbers, got at most 1e-310"),
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
        (
            lambda X, y, a: DeferralClassifier().fit(X, np.array(["no", "yes"])[y], np.where(a == 1, "Yes ", "no")),
            r"\d+ answers in column 0 are 'Yes ', which is the class 'yes' but for blanks or case",
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
        *(
            (
                lambda X, y, a, rows=rows: AbstainingClassifier().fit(X[:rows], np.arange(rows) % 2),
                rf"at least 5 rows of some class, one for each of the 5 folds, got {(rows + 1) // 2} \(n_samples={rows}\); pass",
            )
            for rows in (1, 2, 4, 8)
        ),
        (lambda X, y, a: AbstainingClassifier(frozen(X, y)).fit(X[:4], y[:4]), "cv: expected at least 5 rows of some class"),
        (lambda X, y, a: DeferralClassifier(cv=50).fit(X, y, a), "cv: expected at least 50 rows of some class"),
        (
            lambda X, y, a: DeferralRegressor().fit(X[:4], X[:4, 0], X[:4]),
            r"at least 5 rows, one for .* got 4 \(n_samples=4\)",
        ),
        (lambda X, y, a: AbstainingRegressor(cv=1).fit(X, X[:, 0]), "cv: expected at least 2 folds, or a splitter, got 1"),
        (lambda X, y, a: AbstainingClassifier().fit(X, y * 0), "y: the predictor cannot learn from the one class 0 alone"),
        (lambda X, y, a: AbstainingClassifier().fit(X, np.arange(60) == 7), "cannot learn from the one class False alone"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply", "ignore:The least populated class")
def test_bad_input(call, said: str) -> None:
    X, y, answers = half_known(60, seed=0)
    with pytest.raises(ValueError, match=said):
        call(X, y, answers)


def test_where_case_tells_classes_apart_it_may_do_so_for_answers() -> None:
    X, y, answers = half_known(60, seed=0)
    given = np.where(answers == 1, "YES", "yes")
    DeferralClassifier().fit(X, np.array(["yes", "Yes"])[y], given)
    with pytest.raises(ValueError, match="which is the class 'yes' but for blanks or case"):
        DeferralClassifier().fit(X, np.array(["no", "yes"])[y], given)


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
