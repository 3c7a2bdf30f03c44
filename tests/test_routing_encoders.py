from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from deferral.routing import CachedEncoder
from deferral.routing.encoders import FunctionEncoder, NgramEncoder
from deferral.routing.ngrams import BITS, hashed_ngrams, hashed_ngrams_of
from deferral.routing.vectors import Wide, projection

TEXTS = [
    "What is the capital of France?",
    "What is the capital of Spain?",
    "def f(x):\n    return x + 1",
    "def g(y):\n    return y - 1",
    "Solve x^2 = 4 for x, not for y.",
    "Solve y^2 = 9 for y, not for x.",
    "",
    "日本語のテキスト 🎉",
]
_MIX, _PAIR, _P, _ALL = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53, 0x9E3779B97F4A7C15, (1 << 64) - 1


def by_definition(text: str) -> list[int]:
    """Words, pairs of words and runs of five bytes, hashed one by one with Python's integers."""

    def polynomial(part: bytes) -> int:
        return sum((byte + 1) * pow(_P, place, 1 << 64) for place, byte in enumerate(part)) & _ALL

    data = f" {text.lower()} ".encode()
    words: list[bytes] = []
    for byte, before in zip(data, b" " + data, strict=False):
        if byte > 127 or chr(byte).isalnum():
            words = [*words[:-1], words[-1] + bytes([byte])] if before > 127 or chr(before).isalnum() else [*words, bytes([byte])]
    hashes = [polynomial(word) for word in words]
    pairs = [(one * _PAIR + other) & _ALL for one, other in pairwise(hashes)]
    runs = [(polynomial(data[start : start + 5]) + 5) & _ALL for start in range(len(data) - 4)]
    return sorted({((value * _MIX) & _ALL) >> (64 - BITS) for value in (*hashes, *pairs, *runs)})


@pytest.mark.parametrize("text", [text for text in TEXTS if text])
def test_ngrams_are_those_of_the_definition(text: str) -> None:
    assert sorted(set(hashed_ngrams(text).tolist())) == by_definition(text)


@pytest.mark.parametrize(
    "texts", [[], [""], ["", "!", " "], [*TEXTS, "+++", "x", "++++ y"], ["a" * 2000, "b c", "d e"], TEXTS * 9]
)
def test_ngrams_of_many_are_those_of_each(texts: list[str]) -> None:
    buckets, starts = hashed_ngrams_of(texts)
    assert (starts[0], starts[-1], len(starts)) == (0, len(buckets), len(texts) + 1)
    for text, (begin, end) in zip(texts, pairwise(starts), strict=True):
        np.testing.assert_array_equal(buckets[begin:end], np.unique(hashed_ngrams(text)))


def test_where_a_word_stands_does_not_matter() -> None:
    assert set(hashed_ngrams("apple")) <= set(hashed_ngrams("the red apple fell"))


@pytest.mark.parametrize("text", ["", " ", "\n\t", "!", "\ud800", "x" * 100_000, "🎉" * 100_000, "İ" * 50_000, "\x00" * 10])
def test_any_text_has_ngrams(text: str) -> None:
    buckets, _ = hashed_ngrams_of([text])
    assert buckets.dtype == np.int32
    assert (np.diff(buckets) > 0).all()
    assert (len(buckets) == 0) or (buckets.min() >= 0 and buckets.max() < 1 << BITS)


def test_of_a_long_query_the_beginning_and_the_end_are_read() -> None:
    middle = hashed_ngrams("a" * 1500 + "secret" * 100 + "b" * 500)
    assert not set(hashed_ngrams("secret")) & set(middle)


def test_one_query_and_many_have_the_same_vectors() -> None:
    encoder = NgramEncoder(dimensions=4)
    fitted = encoder.fit(TEXTS)
    together = encoder(TEXTS)
    np.testing.assert_allclose(fitted.dense, together.dense, atol=1e-6)
    for row, text in enumerate(TEXTS):
        one = encoder([text])
        np.testing.assert_allclose(one.dense[0], together.dense[row], atol=1e-6)
        np.testing.assert_array_equal(one.extra[0], together.extra[row])
        np.testing.assert_allclose(one.wide.sparse().toarray()[0], together.wide.sparse()[row].toarray()[0], atol=1e-6)


def test_vectors_have_length_one_or_nothing_is_known() -> None:
    encoder = NgramEncoder(dimensions=4)
    encoder.fit(TEXTS)
    vectors = encoder([*TEXTS, "zzzzzz qqqqqq"])
    lengths = np.linalg.norm(vectors.dense, axis=1)
    # Blank, of another script that only one query has, unknown.
    np.testing.assert_allclose(lengths, [1, 1, 1, 1, 1, 1, 0, 0, 0], atol=1e-5)


def test_texts_alike_have_vectors_alike() -> None:
    dense = NgramEncoder(dimensions=4).fit(TEXTS).dense
    similarity = dense[:6] @ dense[:6].T - 2 * np.eye(6)
    np.testing.assert_array_equal(similarity.argmax(1), [1, 0, 3, 2, 5, 4])


def test_a_restored_encoder_is_the_same_to_the_bit() -> None:
    encoder = NgramEncoder(dimensions=4)
    encoder.fit(TEXTS)
    other = NgramEncoder().restore({name: array.copy() for name, array in encoder.arrays.items()})
    np.testing.assert_array_equal(encoder(TEXTS).dense, other(TEXTS).dense)


@pytest.mark.parametrize("texts", [["only one"], ["", ""], ["a b c"] * 5])
def test_logs_too_poor_for_vectors_give_finite_ones(texts: list[str]) -> None:
    encoder = NgramEncoder()
    vectors = encoder.fit(texts)
    assert np.isfinite(vectors.dense).all()
    assert np.isfinite(vectors.extra).all()
    assert len(encoder([])) == 0


def test_sparse_rows_times_a_matrix() -> None:
    wide = Wide(np.array([0, 2, 1]), np.array([1.0, 2.0, 3.0], np.float32), np.array([0, 2, 2, 3]), 3)
    dense = np.array([[1.0, 0, 2], [0, 0, 0], [0, 3, 0]])
    matrix = np.arange(6.0).reshape(3, 2)
    np.testing.assert_allclose(wide.times(matrix), dense @ matrix)
    np.testing.assert_allclose(wide.rows(np.array([0])).times(matrix), dense[:1] @ matrix)


def test_the_reduction_keeps_what_the_leading_singular_vectors_keep() -> None:
    generator = np.random.default_rng(0)
    dense = generator.normal(size=(120, 40)) @ (0.8 ** np.arange(40)[:, None] * generator.normal(size=(40, 300)))
    directions = projection(csr_matrix(dense, dtype=np.float32), 8, seed=0)
    np.testing.assert_allclose(directions.T @ directions, np.eye(8), atol=1e-5)
    exact = np.linalg.svd(dense, compute_uv=False)
    assert np.square(dense @ directions).sum() == pytest.approx(np.square(exact[:8]).sum(), rel=0.01)
    # The first column has the most of it, and so on.
    np.testing.assert_allclose(np.linalg.norm(dense @ directions, axis=0)[:3], exact[:3], rtol=0.01)


def test_one_direction_that_all_rows_share_hides_no_other() -> None:
    generator = np.random.default_rng(0)
    rows = 30 * generator.random((200, 1)) * generator.normal(size=50) + generator.normal(size=(200, 6)) @ np.eye(6, 50)
    directions = projection(csr_matrix(rows, dtype=np.float32), 7, seed=0)
    np.testing.assert_allclose(np.linalg.norm(np.eye(6, 50) @ directions, axis=1), 1, atol=0.01)


def test_an_encoder_of_ones_own() -> None:
    encoder = FunctionEncoder(lambda texts: [[len(text), text.count("x"), 1] for text in texts])
    vectors = encoder.fit(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors.dense, axis=1), 1, atol=1e-5)
    for bad, message in (
        (lambda texts: [1.0] * len(texts), r"expected an array of shape \(8, D\)"),
        (lambda texts: [[np.nan]] * len(texts), "query 1"),
        (lambda texts: [[1.0]], "got"),
    ):
        with pytest.raises(ValueError, match=message):
            FunctionEncoder(bad).fit(TEXTS)
    with pytest.raises(ValueError, match="not fitted"):
        NgramEncoder()(["x"])


def test_a_fit_encodes_every_text_once() -> None:
    seen: list[str] = []

    def encode(texts: list[str]) -> np.ndarray:
        seen.extend(texts)
        return np.array([[len(text), text.count("o"), 1.0] for text in texts])

    encoder = FunctionEncoder(encode)
    fitted = encoder.fit(TEXTS)
    assert seen == list(TEXTS)
    again = encoder(TEXTS)
    np.testing.assert_array_equal(fitted.dense, again.dense)
    np.testing.assert_array_equal(fitted.extra, again.extra)


def test_a_cached_encoder_encodes_every_text_once(tmp_path: Path) -> None:
    seen: list[str] = []

    def encode(texts: list[str]) -> np.ndarray:
        seen.extend(texts)
        return np.array([[len(text), 1.0] for text in texts])

    first = CachedEncoder(encode, tmp_path, "lengths")(["a", "bb", "a"])
    again = CachedEncoder(encode, tmp_path, "lengths")(["bb", "ccc"])
    np.testing.assert_array_equal(first, [[1, 1], [2, 1], [1, 1]])
    np.testing.assert_array_equal(again, [[2, 1], [3, 1]])
    assert seen == ["a", "bb", "ccc"]
    CachedEncoder(encode, tmp_path, "another")(["a"])
    assert seen[-1] == "a"
    for stored in tmp_path.rglob("*.npy"):
        stored.write_bytes(stored.read_bytes()[:30])
    np.testing.assert_array_equal(CachedEncoder(encode, tmp_path, "lengths")(["bb"]), [[2, 1]])
    assert not list(tmp_path.rglob("*partial*"))
    with pytest.raises(ValueError, match="expected 2 vectors"):
        CachedEncoder(lambda texts: np.ones((1, 2)), tmp_path, "broken")(["a", "b"])
    with pytest.raises(ValueError, match="expected 2 vectors, one per text, got none"):
        CachedEncoder(lambda texts: None, tmp_path, "broken")(["a", "b"])
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\); another encoder of this name has filled"):
        CachedEncoder(lambda texts: np.ones((len(texts), 3)), tmp_path, "lengths")(["bb", "new"])


def test_a_cached_encoder_that_is_stopped_keeps_what_was_done(tmp_path: Path) -> None:
    texts = [f"query {number}" for number in range(1_100)]
    counts: list[int] = []

    def stopped(some: list[str]) -> np.ndarray:
        if len(counts) == 2:
            raise KeyboardInterrupt
        counts.append(len(some))
        return np.array([[float(text.split()[1])] for text in some])

    with pytest.raises(KeyboardInterrupt):
        CachedEncoder(stopped, tmp_path, "numbers")(texts)
    done = sum(counts)
    assert 0 < done < len(texts)
    counts.clear()

    def rest(some: list[str]) -> np.ndarray:
        counts.append(len(some))
        return np.array([[float(text.split()[1])] for text in some])

    vectors = CachedEncoder(rest, tmp_path, "numbers")(texts)
    assert sum(counts) == len(texts) - done
    np.testing.assert_array_equal(vectors[:, 0], np.arange(len(texts)))
