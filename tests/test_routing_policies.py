import numpy as np
import pytest
import torch

from deferral.routing.encoders import NgramEncoder
from deferral.routing.held_out import held_out, judged
from deferral.routing.policies import Clusters, Factors, Features, Heads, Linear, Neighbours, Rejector, expert_means
from deferral.routing.policies.centres import nearest_centre, spherical_centres
from deferral.routing.vectors import Vectors, Wide

pytestmark = pytest.mark.ci_slow

EVERY = [Linear, Neighbours, Clusters, Heads, Factors]


def vectors_of(dense: np.ndarray, extra: np.ndarray | None = None) -> Vectors:
    dense = dense / np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), 1e-12)
    return Vectors(dense.astype(np.float32), np.zeros((len(dense), 1), np.float32) if extra is None else extra)


def problem(rows: int = 400, *, gaps: bool = False) -> tuple[Vectors, np.ndarray, np.ndarray, np.ndarray]:
    """Vectors, quality, weights, subject: experts 0 and 1 know two of four subjects each, expert 2 half of everything."""
    generator = np.random.default_rng(0)
    subject = generator.integers(0, 4, rows)
    vectors = vectors_of(np.eye(8)[2 * subject] + 0.2 * generator.normal(size=(rows, 8)))
    known = np.stack([subject < 2, subject >= 2, generator.random(rows) < 0.5], -1)
    weights = (generator.random(known.shape) < 0.6) if gaps else np.ones(known.shape)
    return vectors, known.astype(np.float32), weights.astype(np.float32), subject


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("make", EVERY)
def test_every_policy_learns_who_knows_what(make: type, gaps: bool) -> None:
    vectors, quality, weights, subject = problem(gaps=gaps)
    means = expert_means(quality, weights)
    estimate = means + make().fit(vectors, quality, weights, means).deviations(vectors)
    assert estimate.shape == quality.shape
    assert (estimate.argmax(1) == (subject >= 2)).mean() > 0.97


@pytest.mark.parametrize("make", EVERY)
def test_what_is_not_known_changes_nothing(make: type) -> None:
    vectors, quality, weights, _ = problem(150, gaps=True)
    means = expert_means(quality, weights)
    other = np.where(weights > 0, quality, 1 - quality)
    np.testing.assert_array_equal(expert_means(other, weights), means)
    one = make().fit(vectors, quality, weights, means).deviations(vectors)
    np.testing.assert_array_equal(make().fit(vectors, other, weights, means).deviations(vectors), one)


@pytest.mark.parametrize("make", EVERY)
def test_one_query_and_many_are_estimated_alike(make: type) -> None:
    vectors, quality, weights, _ = problem(150)
    policy = make().fit(vectors, quality, weights, expert_means(quality, weights))
    together = policy.deviations(vectors)
    alone = np.concatenate([policy.deviations(vectors.rows(np.array([row]))) for row in range(20)])
    np.testing.assert_allclose(alone, together[:20], atol=1e-5)


@pytest.mark.parametrize("make", EVERY)
def test_all_equal_qualities_and_single_outcomes_leave_the_means(make: type) -> None:
    vectors, quality, _, _ = problem(60)
    flat = np.full_like(quality, 0.7)
    weights = np.ones_like(quality)
    weights[1:, 2] = 0
    means = expert_means(flat, weights)
    np.testing.assert_allclose(means, 0.7, atol=1e-6)
    deviations = make().fit(vectors, flat, weights, means).deviations(vectors)
    assert np.abs(deviations).max() < 0.05


def test_means_are_shrunk_to_that_of_all_where_outcomes_are_missing() -> None:
    quality, weights = (
        np.array([[1.0, 1], [1, 0], [1, 0], [0, 0]], np.float32),
        np.array([[1.0, 1], [1, 0], [1, 0], [1, 0]], np.float32),
    )
    overall = 4 / 5
    np.testing.assert_allclose(expert_means(quality, weights), [(3 + 5 * overall) / 9, (1 + 5 * overall) / 6], rtol=1e-6)
    np.testing.assert_allclose(expert_means(quality, np.ones_like(weights)), quality.mean(0))


@pytest.mark.parametrize("wide", [False, True])
def test_linear_is_ridge_regression_in_closed_form(wide: bool) -> None:
    generator = np.random.default_rng(0)
    rows, size, penalty = 60, 7, 2.0
    x = generator.normal(size=(rows, size)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    extra = generator.normal(size=(rows, 2)).astype(np.float32)
    vectors = Vectors(x, extra)
    if wide:
        starts = np.arange(0, rows * size + 1, size)
        vectors = Vectors(x[:, :2], extra, Wide(np.tile(np.arange(size), rows), x.ravel(), starts, size))
    quality = generator.random((rows, 2)).astype(np.float32)
    weights = (generator.random((rows, 2)) * (generator.random((rows, 2)) < 0.7)).astype(np.float32)
    means = expert_means(quality, weights)
    design = np.concatenate([np.full((rows, 1), 3.0), 0.1 * extra, x], axis=1)
    for expert in range(2):
        w = weights[:, expert, None]
        inner = design.T @ (w * design) + penalty * np.eye(size + 3)
        expected = design @ np.linalg.solve(inner, design.T @ (w[:, 0] * (quality[:, expert] - means[expert])))
        got = Linear(penalty=penalty).fit(vectors, quality, weights, means).deviations(vectors)[:, expert]
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("gaps", [False, True])
def test_neighbours_are_those_of_a_search_of_all_rows(gaps: bool) -> None:
    vectors, quality, weights, _ = problem(300, gaps=gaps)
    means = expert_means(quality, weights)
    policy = Neighbours(count=20, prior=0.3).fit(vectors, quality, weights, means)
    cosine = vectors.dense @ vectors.dense.T
    for row in range(5):
        best = np.argsort(-cosine[row])[:20]
        near = np.maximum(cosine[row, best], 0)[:, None] ** 3 * weights[best]
        expected = (near * (quality[best] - means)).sum(0) / (near.sum(0) + 0.3)
        deviation, alike = policy.look_up(vectors.rows(np.array([row])))
        np.testing.assert_allclose(deviation[0], expected, atol=1e-5)
        assert alike[0] == pytest.approx(np.sort(cosine[row])[-10:].mean(), abs=1e-5)
        rows, similarity = policy.nearest(vectors.rows(np.array([row])), 3)
        assert rows[0, 0] == row
        assert similarity[0, 0] == pytest.approx(1, abs=1e-5)


def test_neighbours_are_as_many_as_were_asked_for() -> None:
    vectors, quality, weights, _ = problem(120)
    fold = np.arange(120) % 2
    few = held_out([lambda: Neighbours(count=3, prior=2.0)], vectors, quality, weights, quality, fold)
    rest, rows = np.flatnonzero(fold), np.flatnonzero(fold == 0)
    means = expert_means(quality[rest], weights[rest])
    own = Neighbours(count=3, prior=2.0).fit(vectors.rows(rest), quality[rest], weights[rest], means)
    np.testing.assert_array_equal(few.deviations["neighbours"][rows], own.deviations(vectors.rows(rows)))
    for wrong in ({"count": 0}, {"count": 2.5}, {"prior": 0.0}):
        with pytest.raises(ValueError, match="expected a count of at least 1 and a prior above 0"):
            Neighbours(**wrong)


def test_neighbours_in_cells_are_nearly_those_of_all_rows() -> None:
    generator = np.random.default_rng(0)
    vectors = vectors_of(
        generator.normal(size=(40, 16))[generator.integers(0, 40, 6000)] + 0.4 * generator.normal(size=(6000, 16))
    )
    quality = np.zeros((6000, 1), np.float32)
    policy = Neighbours().fit(vectors, quality, np.ones_like(quality), np.zeros(1, np.float32))
    assert len(policy.arrays["centres"]) > 1
    queries = vectors.rows(np.arange(100))
    _, found = policy.nearest(queries, 10)
    best = np.sort(queries.dense @ vectors.dense.T, axis=1)[:, :-11:-1]
    assert (best - found).mean() < 0.01


def test_a_large_prior_leaves_the_mean() -> None:
    vectors, quality, weights, _ = problem(100)
    means = expert_means(quality, weights)
    for policy in (Neighbours(prior=1e9), Clusters(prior=1e9), Linear(penalty=1e9)):
        np.testing.assert_allclose(policy.fit(vectors, quality, weights, means).deviations(vectors), 0, atol=1e-5)


def test_centres_find_separate_groups() -> None:
    generator = np.random.default_rng(0)
    group = generator.integers(0, 5, 300)
    rows = vectors_of(np.eye(5)[group] + 0.02 * generator.normal(size=(300, 5))).dense
    member = nearest_centre(rows, spherical_centres(rows, 5, seed=0))
    assert len({(a, b) for a, b in zip(group.tolist(), member.tolist(), strict=True)}) == 5
    assert len(spherical_centres(rows[:3], 5, seed=0)) == 3
    assert np.isfinite(spherical_centres(np.zeros((10, 4), np.float32), 3, seed=0)).all()


def test_the_rejector_follows_the_price_of_an_error() -> None:
    vectors, _, weights, subject = problem(600)
    # Expert 2 knows everything, and is dear; expert 0 knows subjects 0 and 1, expert 1 nothing.
    quality = np.stack([subject < 2, np.zeros(600), np.ones(600)], -1).astype(np.float32)
    price = np.tile([[0.001, 0.002, 0.02]], (600, 1))
    ones = np.ones_like(weights)
    with pytest.raises(ValueError, match="price"):
        Rejector().fit(vectors, quality, ones, expert_means(quality, ones))
    rejector = Rejector().fit(vectors, quality, ones, expert_means(quality, ones), price=price)
    estimate = expert_means(quality, ones) + rejector.deviations(vectors)
    for error in (0.004, 0.03, 0.1):
        costs, chosen = 1 - quality + price / error, rejector.scores(vectors, price, error).argmax(1)
        paid = costs[np.arange(600), chosen].mean()
        assert paid - costs.min(1).mean() < 0.2 * (costs.mean(0).min() - costs.min(1).mean()) + 0.005
        # Its scores and the qualities that it expects say the same.
        np.testing.assert_array_equal(chosen, (estimate - price / error).argmax(1))
    # Prices are inputs: expert 2 at a hundredth of its price is asked where it was not worth it.
    assert (rejector.scores(vectors, price * [1, 1, 0.01], 0.01)[subject >= 2].argmax(1) == 2).mean() > 0.95


def test_features_are_ridge_regression_on_products() -> None:
    generator = np.random.default_rng(0)
    extra = generator.normal(size=(80, 2)).astype(np.float32)
    vectors = Vectors(np.ones((80, 1), np.float32), extra)
    quality = (0.5 + 0.1 * extra[:, :1] * extra[:, 1:]).astype(np.float32)
    means = expert_means(quality, np.ones_like(quality))
    sure = Features(penalty=1e-6).fit(vectors, quality, np.ones_like(quality), means)
    np.testing.assert_allclose(means + sure.deviations(vectors), quality, atol=1e-3)
    # A cell counted twice is the same as its row there twice.
    twice = np.where(np.arange(80) < 40, 2, 1)[:, None].astype(np.float32)
    rows = np.concatenate([np.arange(80), np.arange(40)])
    weighted = Features().fit(vectors, quality, twice, means, seed=0).deviations(vectors) * 1.0
    repeated = Features(penalty=0.3 * 80 / 120).fit(vectors.rows(rows), quality[rows], np.ones((120, 1), np.float32), means)
    np.testing.assert_allclose(weighted, repeated.deviations(vectors), atol=1e-4)


def test_the_same_seed_gives_the_same_policy_and_leaves_the_global_generator_alone() -> None:
    vectors, quality, weights, _ = problem(100)
    means = expert_means(quality, weights)
    before = torch.random.get_rng_state()
    one, other = (Heads().fit(vectors, quality, weights, means, seed=3).deviations(vectors) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_policies_take_the_vectors_of_the_embedded_encoder() -> None:
    texts = [f"{'integral of x' if i % 2 else 'capital of France'} number {i}" for i in range(80)]
    vectors = NgramEncoder(dimensions=8).fit(texts)
    quality = np.array([[i % 2, 1 - i % 2] for i in range(80)], np.float32)
    weights = np.ones_like(quality)
    for make in EVERY:
        means = expert_means(quality, weights)
        estimate = means + make().fit(vectors, quality, weights, means).deviations(vectors)
        np.testing.assert_array_equal(estimate.argmax(1), quality.argmax(1))


def test_an_expert_who_never_pays_proves_nothing_of_the_others() -> None:
    """Two on whom nothing is known beyond their means, and a dear one whose failures are foreseen."""
    generator = np.random.default_rng(0)
    rows, price = 2000, np.array([0.001, 0.004, 0.02])
    hard = np.arange(rows) % 2 == 1
    chance = np.stack([np.full(rows, 0.70), np.full(rows, 0.75), np.where(hard, 0.02, 0.65)], 1)
    quality = (generator.random((rows, 3)) < chance).astype(np.float32)
    means, paid, errors = np.tile(chance.mean(0), (rows, 1)), np.tile(price, (rows, 1)), np.array([0.03, 0.1, 0.3, 1.0])
    noise = np.stack([generator.normal(0, 0.05, rows), generator.normal(0, 0.05, rows), np.zeros(rows)], 1)
    everyone = judged(chance + noise, paid, means, paid, quality, errors)
    others = judged((chance + noise)[:, :2], paid[:, :2], means[:, :2], paid[:, :2], quality[:, :2], errors)
    assert not everyone.better[:3].any()
    np.testing.assert_array_equal(everyone.better, others.better)
    # Who is asked counts: the dear one where it alone is good.
    useful = chance + np.where(hard, -0.3, 0.3)[:, None] * np.array([0, 0, 1])
    answers = (generator.random((rows, 3)) < useful).astype(np.float32)
    assert judged(useful, paid, means, paid, answers, errors).better[2:].all()
