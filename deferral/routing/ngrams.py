"""Words, pairs of words and runs of five bytes of a text, as hashes: numpy alone.

Every n-gram is read off the prefix sums of one polynomial hash modulo 2^64: H[i] = sum_{j<i} byte_j P^j, and the run from i to
k hashes to (H[k] - H[i]) P^-i, wherever in the text it stands.  Karp and Rabin, "Efficient randomized pattern-matching
algorithms" (1987).
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

__all__ = ["BITS", "hashed_ngrams", "hashed_ngrams_of", "shortened"]

BITS = 20
HEAD, TAIL = 1500, 500  # characters of a query that are read: its beginning and its end
RUN = 5
_LONGEST = 4 * (HEAD + TAIL) + 8  # bytes
_P = 0x9E3779B97F4A7C15
_MIX, _PAIR = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_RUN_MIXED = np.uint64(RUN * 0xFF51AFD7ED558CCD % 2**64)
_SHIFT = np.uint64(64 - BITS)
_BUCKET = (1 << BITS) - 1
_NONE = np.empty(0, np.int32)
_TOGETHER = 2048  # bytes


def _powers(base: int) -> np.ndarray:
    factors = np.full(_LONGEST + 1, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


# Of a text that begins with the byte _START, which counts as 0 and as no letter: the prefix sums then need no 0 before them.
_POWER, _INVERSE = np.concatenate([np.zeros(1, np.uint64), _powers(_P)]), _powers(pow(_P, -1, 1 << 64)) * _MIX
_START = b"\xff"  # no text in UTF-8 has it
# Bytes above 127 belong to letters of other scripts.  A table of bytes is read in a tenth of the time of an array.
_LETTER = bytes(byte not in _START and (byte > 127 or chr(byte).isalnum()) for byte in range(256))
_ONE_MORE = bytes((byte + 1) % 256 for byte in range(256))


def shortened(query: str) -> str:
    """What of a query is read: all of it, or its beginning and its end."""
    return query if len(query) <= HEAD + TAIL else f"{query[:HEAD]} {query[-TAIL:]}"


def hashed_ngrams(query: str) -> np.ndarray:
    """The n-grams of a query, as buckets below 2^BITS; a blank query has none.  -> (M,) int64

    As they come, in no order, and again where they come again.
    """
    return _unsorted(_read(query))


def hashed_ngrams_of(queries: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The different n-grams of N queries, rising, those of query i from starts[i] to starts[i + 1].

    -> (M,) int32 buckets, (N + 1,) starts

    Short texts are hashed together, in a fraction of the time of each by itself; long ones are not, since all of it then
    stays in the processor's first cache.
    """
    texts = [_read(query) for query in queries]
    found: list[np.ndarray] = []
    sizes: list[int] = []
    group: list[bytes] = []
    length = 0
    for place, text in enumerate(texts):
        group.append(text)
        length += len(text)
        if place + 1 == len(texts) or length + len(texts[place + 1]) > _TOGETHER:
            if len(group) > 1:
                buckets, counts = _together(group)
            else:
                buckets = _alone(text)
                counts = [len(buckets)]
            found.append(buckets)
            sizes += counts
            group, length = [], 0
    return np.concatenate([_NONE, *found]), np.array([0, *accumulate(sizes)])


def _read(query: str) -> bytes:
    """What is hashed of a query; b"" where that has no n-grams."""
    if not query.strip():
        return b""
    # Lower case may be longer than the text (a dotted capital I, say).
    lowered = shortened(query).lower()[: HEAD + TAIL + 1]
    # The spaces at both ends make the edges of words come in pairs.
    text = f" {lowered} ".encode("utf-8", "replace")
    return text if len(text) > RUN or any(text.translate(_LETTER)) else b""


def _hashed(text: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where words begin, their hashes, and those of all runs.  -> (W,), (W,) uint64, (len(text) - RUN + 1,) uint64"""
    text = _START + text
    letter = np.frombuffer(text.translate(_LETTER), np.bool_)
    edges = (letter[1:] != letter[:-1]).nonzero()[0]
    prefix = np.add.accumulate(np.frombuffer(text.translate(_ONE_MORE), np.uint8) * _POWER[: len(text)])
    begins, at_edges = edges[::2], prefix.take(edges)
    words = (at_edges[1::2] - at_edges[::2]) * _INVERSE.take(begins)
    runs = (prefix[RUN:] - prefix[:-RUN]) * _INVERSE[: max(len(prefix) - RUN, 0)] + _RUN_MIXED
    return begins, words, runs


def _pairs(words: np.ndarray) -> np.ndarray:
    return words[:-1] * _PAIR + words[1:]


def _unsorted(text: bytes) -> np.ndarray:
    if not text:
        return _NONE
    _, words, runs = _hashed(text)
    hashes = np.concatenate((words, _pairs(words), runs))
    hashes >>= _SHIFT
    return hashes.view(np.int64)


def _alone(text: bytes) -> np.ndarray:
    """The buckets of one text."""
    buckets = _unsorted(text).astype(np.int32)
    buckets.sort()
    return _different(buckets)


def _together(texts: Sequence[bytes]) -> tuple[np.ndarray, list[int]]:
    """The buckets of several texts, one after the other, and how many each has."""
    begins, words, runs = _hashed(b"".join(texts))
    owner = np.arange(len(texts)).repeat([len(text) for text in texts])
    of_words = owner.take(begins)
    # Whatever reaches from one text into the next is no n-gram of either.
    next_too = of_words[:-1] == of_words[1:]
    inside = owner[: len(runs)] == owner[len(owner) - len(runs) :]
    hashes = np.concatenate((words, _pairs(words)[next_too], runs[inside])) >> _SHIFT
    owners = np.concatenate((of_words, of_words[:-1][next_too], owner[: len(runs)][inside]))
    keys = hashes.astype(np.int64) + (owners << BITS)
    keys.sort()
    keys = _different(keys)
    return (keys & _BUCKET).astype(np.int32), np.bincount(keys >> BITS, minlength=len(texts)).tolist()


def _different(rising: np.ndarray) -> np.ndarray:
    first = np.empty(len(rising), bool)
    first[:1] = True
    np.not_equal(rising[1:], rising[:-1], out=first[1:])
    return rising[first]
