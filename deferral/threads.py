"""Arithmetic over small arrays, which several threads only hold up."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

__all__ = ["one_thread", "one_torch_thread"]


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch's arithmetic in one thread.

    Several wait for each other after every small product: beside another busy process that takes ten times as long.
    """
    # Whoever only routes need not hold torch in memory: it is imported where something is learned.
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_thread() -> Iterator[None]:
    """All arithmetic in one thread, that of other libraries as well, for the same reason."""
    with one_torch_thread(), _pools(len(sys.modules)).limit(limits=1):
        yield


@lru_cache(1)
def _pools(modules: int) -> "ThreadpoolController":
    """The loaded libraries; finding them takes 5 ms, so they are looked for again only where the count of modules has changed."""
    # The core does without it.
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
