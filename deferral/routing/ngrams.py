"""Words, pairs of words and runs of five bytes of a text, as hashes: numpy alone.

Every n-gram is read off the prefix sums of one polynomial hash modulo 2^64: H[i] = sum_{j<i} byte_j P^j, and the run from i to
k hashes to (H[k] - H[i]) P^-i, wherever in the text it stands.  Karp and Rabin, "Efficient randomized pattern-matching
algorithms" (1987).
"""

import numpy as np

__all__ = ["BITS", "hashed_ngrams", "shortened"]

BITS = 20
HEAD, TAIL = 1500, 500  # characters of a query that are read: its beginning and its end
RUN = 5
_LONGEST = 4 * (HEAD + TAIL) + 8  # bytes
_P = 0x9E3779B97F4A7C15
_MIX, _PAIR = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_RUN_MIXED = np.uint64(RUN * 0xFF51AFD7ED558CCD % 2**64)
_SHIFT = np.uint64(64 - BITS)


def _powers(base: int) -> np.ndarray:
    factors = np.full(_LONGEST + 1, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


_POWER, _INVERSE = _powers(_P), _powers(pow(_P, -1, 1 << 64)) * _MIX
_INVERSE_AFTER = _INVERSE[1:]
# Bytes above 127 belong to letters of other scripts.  A table of bytes is read in a tenth of the time of an array.
_LETTER = bytes(byte > 127 or chr(byte).isalnum() for byte in range(256))
_ONE_MORE = bytes((byte + 1) % 256 for byte in range(256))  # no text in UTF-8 has the byte 255


def shortened(query: str) -> str:
    """What of a query is read: all of it, or its beginning and its end."""
    return query if len(query) <= HEAD + TAIL else f"{query[:HEAD]} {query[-TAIL:]}"


def hashed_ngrams(query: str) -> np.ndarray:
    """The different n-grams of a query, as rising buckets below 2^BITS; a blank query has none.  -> (M,) int32

    One query at a time is several times faster than a concatenated batch: all of it stays in the processor's first cache.
    """
    # Lower case may be longer than the text (a dotted capital I, say).
    lowered = shortened(query).lower()[: HEAD + TAIL + 1]
    text = f" {lowered} ".encode("utf-8", "replace")
    # The spaces at both ends make the edges of words come in pairs.
    letter = np.frombuffer(text.translate(_LETTER), np.bool_)
    edges = (letter[1:] != letter[:-1]).nonzero()[0]  # one before the edge
    if (len(text) < RUN + 1 and not len(edges)) or not query.strip():
        return np.empty(0, np.int32)
    prefix = np.empty(len(text) + 1, np.uint64)
    prefix[0] = 0
    after = prefix[1:]
    np.add.accumulate(np.frombuffer(text.translate(_ONE_MORE), np.uint8) * _POWER[: len(text)], out=after)
    at_edges = after.take(edges)
    words = (at_edges[1::2] - at_edges[::2]) * _INVERSE_AFTER.take(edges[::2])
    pairs = words[:-1] * _PAIR + words[1:]
    runs = (prefix[RUN:] - prefix[:-RUN]) * _INVERSE[: max(len(prefix) - RUN, 0)] + _RUN_MIXED
    hashes = np.concatenate((words, pairs, runs))
    hashes >>= _SHIFT
    buckets = hashes.astype(np.int32)
    buckets.sort()
    first = np.empty(len(buckets), bool)
    first[:1] = True
    np.not_equal(buckets[1:], buckets[:-1], out=first[1:])
    return buckets[first]
