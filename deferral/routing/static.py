"""The static mix: whom to ask without looking at the query.  What a router must beat."""

import hashlib
from collections.abc import Sequence

import numpy as np

from deferral.routing.evaluation import hull

__all__ = [
    "EXPLORE",
    "chances",
    "draw_of",
    "drawn_from",
    "draws",
    "explored",
    "fingerprints",
    "mix_at_error",
    "mix_at_price",
    "mix_at_quality",
]


# After the salt, what the draws of exploration are keyed by.
EXPLORE = "explore"


def mix_at_error(quality: np.ndarray, price: np.ndarray, mask: np.ndarray, error: float) -> np.ndarray:
    """The single expert of the lowest mean cost, the cheaper of two equals.  (E,), (E,), (E,) bool -> (E,) probabilities"""
    cost = np.where(mask, 1 - quality + price / error, np.inf)
    chosen = np.lexsort((price, cost))[0]
    return np.eye(len(cost))[chosen]


def mix_at_price(quality: np.ndarray, price: np.ndarray, mask: np.ndarray, most: float) -> np.ndarray:
    """The mix of the highest mean quality whose mean price is at most `most`.  -> (E,); ValueError if none is that cheap"""
    members, corners = _corners(quality, price, mask)
    if most < corners[0, 0] * (1 - 1e-9):
        raise ValueError(
            f"budget: the cheapest expert costs ${1000 * corners[0, 0]:.4g} per 1,000 queries; got ${1000 * most:.4g}"
        )
    return _between(members, corners[:, 0], most, len(quality))


def mix_at_quality(quality: np.ndarray, price: np.ndarray, mask: np.ndarray, least: float) -> np.ndarray:
    """The cheapest mix whose mean quality is at least `least`; that of the best quality if none is that good.  -> (E,)"""
    members, corners = _corners(quality, price, mask)
    return _between(members, corners[:, 1], least, len(quality))


def drawn_from(mix: np.ndarray, queries: Sequence[str], salt: str) -> np.ndarray:
    """The expert of each query that its draw picks from the mix.  (E,), N -> (N,)"""
    members = np.flatnonzero(mix)
    if len(members) == 1:
        return np.full(len(queries), members[0])
    return np.minimum(np.searchsorted(np.cumsum(mix), draws(queries, salt), side="right"), members[-1])


def explored(mask: np.ndarray, share: float, queries: Sequence[str], salt: str) -> np.ndarray:
    """Whom a share of the queries, above 0, is given to: anyone of the mask, and -1 for the others.  (E,) bool, N -> (N,)"""
    allowed, drawn = np.flatnonzero(mask), draws(queries, salt + EXPLORE)
    picked = allowed[np.minimum((drawn / share * len(allowed)).astype(int), len(allowed) - 1)]
    return np.where(drawn < share, picked, -1)


def chances(usual: np.ndarray, mask: np.ndarray, share: float) -> np.ndarray:
    """Of the decisions with exploration, from those without it.  (..., E), (E,) bool -> (..., E)"""
    return (1 - share) * usual + share * mask / mask.sum()


def draws(queries: Sequence[str], salt: str) -> np.ndarray:
    """A number in [0, 1) for each query: the same for the same query and salt, on every machine.  -> (N,)"""
    return fingerprints(queries, salt) / 2**64 * (1 - 2**-53)


def draw_of(query: str, salt: str) -> float:
    """The same of one query."""
    return int.from_bytes(_digest(query, salt.encode()), "big") / 2**64 * (1 - 2**-53)


def fingerprints(queries: Sequence[str], salt: str = "") -> np.ndarray:
    """A number of 64 bits that stands for each query.  -> (N,) uint64"""
    key = salt.encode()
    return np.frombuffer(b"".join([_digest(query, key) for query in queries]), ">u8").astype(np.uint64)


def _digest(query: str, key: bytes) -> bytes:
    return hashlib.blake2b(query.encode("utf-8", "replace"), digest_size=8, key=key).digest()


def _corners(quality: np.ndarray, price: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    allowed = np.flatnonzero(mask)
    points = np.stack([price[allowed], quality[allowed]], -1)
    corners = hull(points)
    members = [allowed[int((points == corner).all(1).argmax())] for corner in corners]
    return np.array(members), corners


def _between(members: np.ndarray, values: np.ndarray, wanted: float, size: int) -> np.ndarray:
    """Probabilities on two neighbouring corners whose mean value is the wanted one.  The values rise."""
    mix = np.zeros(size)
    place = int(np.searchsorted(values, wanted))
    if place == 0 or place == len(values):
        mix[members[min(place, len(values) - 1)]] = 1.0
        return mix
    share = (wanted - values[place - 1]) / (values[place] - values[place - 1])
    mix[members[place - 1]], mix[members[place]] = 1 - share, share
    return mix
