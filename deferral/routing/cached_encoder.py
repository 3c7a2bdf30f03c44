"""Vectors of a slow encoder, kept on disk."""

import hashlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from deferral.whole_files import written_whole

__all__ = ["CachedEncoder"]

_BLOCK = 512


class CachedEncoder:
    """A slow function from texts to vectors whose results are kept on disk, by the content of the text.

    `name` is the encoder's: vectors of different encoders must not meet in one folder.  A file that cannot be read is written
    again.  `Router(0.02, encoder=CachedEncoder(encode, "vectors/", "my encoder"))`
    """

    def __init__(self, encode: Callable[[list[str]], Any], folder: str | Path, name: str) -> None:
        self.encode = encode
        self.fingerprint: str | None = getattr(encode, "fingerprint", None)
        self.folder = Path(folder) / hashlib.sha256(name.encode()).hexdigest()[:16]

    def __call__(self, queries: list[str]) -> np.ndarray:
        """One row per text; only texts that are not on disk are encoded.  N -> (N, D)"""
        paths = [self.folder / f"{hashlib.sha256(query.encode('utf-8', 'replace')).hexdigest()}.npy" for query in queries]
        known = {path: _stored(path) for path in dict.fromkeys(paths)}
        missing = {path: query for path, query in zip(paths, queries, strict=True) if known[path] is None}
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
        # Block after block, so that whoever is stopped finds on disk what was done.
        for start in range(0, len(missing), _BLOCK):
            block = dict(islice(missing.items(), start, start + _BLOCK))
            vectors = np.asarray(self.encode(list(block.values())))
            if vectors.shape[:1] != (len(block),):
                came = len(vectors) if vectors.ndim else "none"
                raise ValueError(f"encoder: expected {len(block)} vectors, one per text, got {came}")
            for path, vector in zip(block, vectors, strict=True):
                # To a path `save` would add a suffix.
                with written_whole(path) as partial, partial.open("wb") as file:
                    np.save(file, vector)
                known[path] = vector
        found = [np.asarray(known[path]) for path in paths]
        if len(shapes := {vector.shape for vector in found}) > 1:
            raise ValueError(
                f"encoder: expected vectors of one length, got {' and '.join(map(str, sorted(shapes)))}; another encoder of this "
                f"name has filled {self.folder}: give each a name of its own"
            )
        return np.array(found)


def _stored(path: Path) -> np.ndarray | None:
    try:
        return np.load(path, allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None
