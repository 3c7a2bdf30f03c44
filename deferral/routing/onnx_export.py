"""A text encoder of the transformers library as a folder for onnxruntime, checked against torch before it is kept.

An export can run and return garbage: attention that was traced without a mask, a mask of ones, segments left out.  So the check
is on a batch with padding, and a model that fails it is not written.
"""

import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deferral.errors import DataError, installing
from deferral.routing.sentences import INT8, MAX_TOKENS, NOTE, PLAIN, TOKENS, OnnxEncoder, mean_pooled

__all__ = ["export"]

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Of different lengths, so that three of four rows are padded.
_PROBES = (
    "a",
    "Prove that the limit is prime.",
    "def f(x):\n    return x + 1  # what does this function return for x = 41, and what for x = -1?",
    "日本語のテキスト, письмо and a question of some length: " + "which of these two is the larger, and by how much? " * 4,
)
# The least cosine between a probe's vector here and in torch.
_LEAST = {PLAIN: 0.9999, INT8: 0.95}


class _Encoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).last_hidden_state


def export(source: str | Path, out: str | Path, *, int8: bool = False, max_tokens: int | None = None) -> float:
    """Write the folder `out` from the folder `source` of a BERT-like encoder; the least cosine of the parity check.

    `int8` quantises the weights, which is faster and moves the vectors a little; `max_tokens` of a text are read, by default 128
    or as many as the model takes.  DataError if `source` is no such folder, or
    if the vectors are not those of torch.
    """
    source, out = Path(source), Path(out)
    if out.exists():
        raise DataError(f"{out}: it is there already; remove it or name another folder")
    if not (source / TOKENS).is_file():
        raise DataError(f"{source / TOKENS}: it is missing; expected a folder of the transformers library with a fast tokenizer")
    _check_pooling(source)
    model = _model(source)
    positions = getattr(model.config, "max_position_embeddings", MAX_TOKENS)
    max_tokens = min(MAX_TOKENS, positions) if max_tokens is None else max_tokens
    if not 2 <= max_tokens <= positions:
        raise ValueError(f"max_tokens: expected 2 to {positions}, as many as the model takes, got {max_tokens}")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    # The temporary folder is closed to all others; what is kept is as open as any new folder.
    partial = temporary / "encoder"
    try:
        partial.mkdir()
        shutil.copyfile(source / TOKENS, partial / TOKENS)
        (partial / NOTE).write_text(json.dumps({"max_tokens": max_tokens, "pooling": "mean"}), encoding="utf-8")
        _write(model, partial / PLAIN)
        least = _checked(model, partial, PLAIN)
        if int8:
            _quantise(partial / PLAIN, partial / INT8)
            (partial / PLAIN).unlink()
            least = _checked(model, partial, INT8)
        os.rename(partial, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return least


def _check_pooling(source: Path) -> None:
    """DataError where sentence-transformers makes other vectors of the states than their mean at length 1."""
    modules, pooling = source / "modules.json", source / "1_Pooling" / "config.json"
    if modules.is_file():
        for module in _read(modules):
            kind = str(module["type"]).rpartition(".")[2]
            if kind not in ("Transformer", "Pooling", "Normalize"):
                raise DataError(
                    f"{modules}: the module {kind} cannot be exported; expected only Transformer, Pooling and Normalize"
                )
            if kind == "Pooling":
                pooling = source / module["path"] / "config.json"
    if pooling.is_file():
        config = _read(pooling)
        # Earlier versions of that library wrote a flag for each way.
        flags = [
            name.removeprefix("pooling_mode_") for name, on in config.items() if name.startswith("pooling_mode_") and on is True
        ]
        way = config.get("pooling_mode", flags or "mean")
        if way not in ("mean", ["mean"], ["mean_tokens"]):
            raise DataError(f"{pooling}: expected the mean of the tokens, which is what is exported; got {way}")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: expected JSON, {error}") from error


def _model(source: Path) -> Any:
    try:
        from deferral.torchvision_compat import import_torchvision

        # transformers imports torchvision wherever it is installed, with or without images.
        import_torchvision()
    except ImportError:
        pass
    try:
        from transformers import AutoModel
    except ModuleNotFoundError as error:
        raise ImportError(f"the export needs transformers: {installing('encoders-export')}") from error
    try:
        model = AutoModel.from_pretrained(str(source), local_files_only=True, attn_implementation="eager")
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: no model can be read from it, {error}") from error
    # A checkpoint may be stored in half precision, which NumPy and onnxruntime on a CPU do not take.
    return model.float().eval()


def _write(model: nn.Module, path: Path) -> None:
    rows = (torch.ones(3, 7, dtype=torch.int64), torch.ones(3, 7, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64))
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", min=2)}
    try:
        with warnings.catch_warnings():
            # The exporter warns of its own deprecations.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Encoder(model).eval(), rows, str(path), input_names=list(_INPUTS), output_names=["last_hidden_state"],
                dynamic_shapes=(sizes, sizes, sizes), external_data=False, dynamo=True, verbose=False,
            )  # fmt: skip
    except ModuleNotFoundError as error:
        raise ImportError(f"the export needs {error.name}: {installing('encoders-export')}") from error


def _quantise(plain: Path, path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # One scale for a whole matrix costs up to 0.08 of cosine on MiniLM, one a row 0.01.
    quantize_dynamic(str(plain), str(path), weight_type=QuantType.QInt8, per_channel=True)


def _checked(model: Any, folder: Path, name: str) -> float:
    encoder = OnnxEncoder(folder)
    given = encoder.inputs(_PROBES)
    with torch.no_grad():
        states = _Encoder(model)(*(torch.from_numpy(given[name]) for name in _INPUTS)).numpy()
    expected = mean_pooled(states, given["attention_mask"])
    together, alone = encoder(_PROBES), np.concatenate([encoder([probe]) for probe in _PROBES])
    least = float(min((expected * together).sum(1).min(), (expected * alone).sum(1).min()))
    if not least >= _LEAST[name]:
        raise DataError(
            f"{name}: its vectors are not those of torch, the least cosine of {len(_PROBES)} texts is {least:.4f} and should be "
            f"{_LEAST[name]} at least; nothing was written"
        )
    return least
