"""Arithmetic over small arrays, which several threads only hold up."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from threadpoolctl import ThreadpoolController

__all__ = ["one_thread"]


@contextmanager
def one_thread() -> Iterator[None]:
    """All arithmetic in one thread, torch's as well.

    Several wait for each other after every small product: beside another busy process that takes ten times as long.
    """
    # Whoever only routes need not hold torch in memory: it is imported where something is learned.
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _pools(len(sys.modules)).limit(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


@lru_cache(1)
def _pools(modules: int) -> ThreadpoolController:
    """The loaded libraries; finding them takes 5 ms, so they are looked for again only where the count of modules has changed."""
    return ThreadpoolController()
