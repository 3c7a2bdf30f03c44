"""Sentence encoders in a local folder: through onnxruntime, or through sentence-transformers where that is installed.

`export` makes the folder that onnxruntime reads from one of the transformers library.  Nothing is downloaded, and nothing of
either folder is executed.
"""

import contextlib
import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from deferral.errors import DataError, installing

__all__ = [
    "INT8",
    "MAX_TOKENS",
    "NOTE",
    "PLAIN",
    "TOKENS",
    "OnnxEncoder",
    "TransformersEncoder",
    "mean_pooled",
    "sentence_encoder",
]

_BATCH = 64
MAX_TOKENS = 128
NOTE, PLAIN, INT8, TOKENS = "encoder.json", "model.onnx", "model_int8.onnx", "tokenizer.json"
_WEIGHTS, _SETTINGS = (".safetensors", ".bin"), (".json", ".txt", ".model")


def sentence_encoder(folder: str | Path) -> "OnnxEncoder | TransformersEncoder":
    """The encoder of a folder: by onnxruntime if it holds model.onnx or model_int8.onnx, else by sentence-transformers."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: expected the folder of a sentence encoder, there is none")
    if any((folder / name).is_file() for name in (PLAIN, INT8)):
        return OnnxEncoder(folder)
    return TransformersEncoder(folder)


class OnnxEncoder:
    """Mean-pooled vectors of length 1 by onnxruntime, from a folder with model.onnx or model_int8.onnx and tokenizer.json.

    `encoder.json` says how many tokens of a text are read (128 where there is none).  `OnnxEncoder(folder)(N texts) -> (N, D)`
    """

    def __init__(self, folder: str | Path, *, threads: int = 1) -> None:
        try:
            import onnxruntime
            from tokenizers import Tokenizer
        except ModuleNotFoundError as error:
            raise ImportError(f"encoders in ONNX need onnxruntime and tokenizers: {installing('encoders')}") from error
        folder = Path(folder)
        model = folder / (PLAIN if (folder / PLAIN).is_file() else INT8)
        for path in (model, folder / TOKENS):
            if not path.is_file():
                raise DataError(f"{path}: it is missing; expected the folder that `deferral route export-encoder` writes")
        try:
            note = json.loads((folder / NOTE).read_text(encoding="utf-8")) if (folder / NOTE).is_file() else {}
            self.max_tokens = int(note.get("max_tokens", MAX_TOKENS))
            self._tokenizer = Tokenizer.from_file(str(folder / TOKENS))
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # each of the three libraries raises its own
            raise DataError(f"{folder}: the encoder cannot be read, {type(error).__name__}: {error}") from error
        self._tokenizer.enable_truncation(self.max_tokens)
        self._tokenizer.enable_padding(pad_id=self._tokenizer.token_to_id("[PAD]") or 0)
        self._inputs = [one.name for one in self._session.get_inputs()]
        if strange := sorted(set(self._inputs) - {"input_ids", "attention_mask", "token_type_ids"}):
            raise DataError(f"{model}: expected a text encoder, which has no input {strange[0]!r}")
        self.fingerprint = fingerprint(model, folder / TOKENS, str(self.max_tokens))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D) float32, rows of length 1."""
        # Texts of about one length together: padding is computed too.
        order = np.argsort([len(text) for text in texts], kind="stable")
        parts = [
            self._batch([_encodable(texts[row]) for row in order[start : start + _BATCH]])
            for start in range(0, len(order), _BATCH)
        ]
        if not parts:
            return np.empty((0, 0), np.float32)
        vectors = np.concatenate(parts)
        result = np.empty_like(vectors)
        result[order] = vectors
        return result

    def _batch(self, texts: list[str]) -> np.ndarray:
        given = self.inputs(texts)
        states = self._session.run(None, {name: given[name] for name in self._inputs})[0]
        return mean_pooled(states, given["attention_mask"])

    def inputs(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """What the model reads: ids, mask and segments of the tokens.  N -> (N, T) int64, T at least 2"""
        rows = self._tokenizer.encode_batch(list(texts))
        given = {
            "input_ids": [row.ids for row in rows],
            "attention_mask": [row.attention_mask for row in rows],
            "token_type_ids": [row.type_ids for row in rows],
        }
        arrays = {name: np.array(values, np.int64).reshape(len(rows), -1) for name, values in given.items()}
        # A text of unknown characters alone may have no token at all, and then the arrays would have no columns.
        short = max(0, 2 - arrays["input_ids"].shape[1])
        return {name: np.pad(array, ((0, 0), (0, short))) for name, array in arrays.items()}


class TransformersEncoder:
    """The encoder of a folder as sentence-transformers runs it, on the CPU and from local files alone."""

    def __init__(self, folder: str | Path) -> None:
        from deferral.torchvision_compat import import_torchvision

        folder = Path(folder)
        try:
            with contextlib.suppress(ImportError):
                # sentence-transformers imports torchvision where there is one.
                import_torchvision()
            from sentence_transformers import SentenceTransformer
        except ModuleNotFoundError as error:
            if error.name != "sentence_transformers":
                raise
            raise ImportError(
                f"{folder} holds no {PLAIN}: make one with `deferral route export-encoder {folder} OUT` "
                f"({installing('encoders-export')}), or pip install sentence-transformers"
            ) from error
        files = [path for path in sorted(folder.rglob("*")) if path.suffix in (*_WEIGHTS, *_SETTINGS) and path.is_file()]
        if not any(path.suffix in _WEIGHTS for path in files):
            raise DataError(
                f"{folder}: it holds no weights; expected the folder of a sentence encoder, with .safetensors or .bin"
            )
        self._model: Any = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        # Equal weights with another tokenizer or pooling are another encoder.
        contents = (f"{path.relative_to(folder).as_posix()} {fingerprint(path)}\n" for path in files)
        self.fingerprint = fingerprint(*contents, "sentence-transformers")

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D) float32, rows of length 1."""
        encodable = [_encodable(text) for text in texts]
        vectors = self._model.encode(encodable, batch_size=_BATCH, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, np.float32)


def mean_pooled(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean of the states of the tokens that are no padding, at length 1.  (N, T, D), (N, T) -> (N, D) float32"""
    weights = mask[..., None].astype(np.float32)
    means = (states * weights).sum(1) / np.maximum(weights.sum(1), 1)
    return (means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def fingerprint(*parts: Path | str) -> str:
    """A name for the content of files and texts: the same encoder has the same, wherever it lies."""
    digest = sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else part.encode())
    return digest.hexdigest()[:16]


def _encodable(text: str) -> str:
    # A lone surrogate is no character; tokenizers in Rust refuse it.
    return text.encode("utf-8", "replace").decode()
