"""A world of three subjects and three experts, and a router that has learned from it."""

from functools import cache

import numpy as np

from deferral.routing import Router, log_of_table
from deferral.routing.policies import Clusters, Linear, Neighbours

QUICK = (Linear, Neighbours, Clusters)
SUBJECTS = {
    "maths": ["integral", "derivative", "equation", "polynomial", "matrix", "theorem", "sum", "root", "prime", "limit"],
    "history": ["emperor", "treaty", "revolution", "century", "dynasty", "war", "parliament", "colony", "crown", "empire"],
    "code": ["function", "return", "loop", "array", "pointer", "compile", "string", "class", "import", "variable"],
}


def queries(rows: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    generator = np.random.default_rng(seed)
    subject = generator.integers(0, 3, rows)
    words = list(SUBJECTS.values())
    texts = [f"{' '.join(generator.choice(words[kind], 6))} {number}" for number, kind in enumerate(subject)]
    return texts, subject


def world(rows: int, seed: int = 0) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """small knows history, coder code, large everything but is dear; nobody is right in a tenth of the cases."""
    texts, subject = queries(rows, seed)
    chance = np.where(np.stack([subject == 1, subject == 2, subject >= 0], -1), 0.9, 0.2)
    quality = (np.random.default_rng(seed + 100).random(chance.shape) < chance).astype(float)
    return texts, subject, quality, np.tile([[0.001, 0.002, 0.02]], (rows, 1))


EXPERTS = ["small", "coder", "large"]


@cache
def router() -> Router:
    texts, _, quality, price = world(600)
    return Router(0.1, policies=QUICK).fit(log_of_table(texts, EXPERTS, quality, price))
