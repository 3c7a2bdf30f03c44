"""Sentence encoders, on a tiny one that is made here from a configuration."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from deferral.datasets import DataError
from deferral.routing import CachedEncoder, Router, log_of_table
from deferral.routing.sentences import OnnxEncoder, TransformersEncoder, mean_pooled, sentence_encoder
from tests.routing_world import EXPERTS, QUICK, world

TEXTS = ["emperor treaty war", "return loop array pointer", "", "日本語 🎉", "\ud800", "integral " * 300]


def test_the_mean_is_over_tokens_that_are_no_padding() -> None:
    states = np.array([[[3.0, 0.0], [3.0, 8.0], [99.0, 99.0]]], np.float32)
    np.testing.assert_allclose(mean_pooled(states, np.array([[1, 1, 0]])), [[0.6, 0.8]], atol=1e-6)
    assert np.isfinite(mean_pooled(states, np.array([[0, 0, 0]]))).all()


def test_a_folder_without_onnx_needs_sentence_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match="deferral route export-encoder"):
        sentence_encoder(tmp_path)
    with pytest.raises(DataError, match="there is none"):
        sentence_encoder(tmp_path / "nowhere")
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(DataError, match=r"tokenizer.json: it is missing"):
        sentence_encoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="the encoder cannot be read"):
        sentence_encoder(tmp_path)


def test_an_encoder_is_known_by_its_weights_tokenizer_and_pooling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=lambda *given, **options: None))
    with pytest.raises(DataError, match="it holds no weights"):
        sentence_encoder(tmp_path)
    (tmp_path / "one" / "1_Pooling").mkdir(parents=True)
    names = ("pytorch_model.bin", "tokenizer.json", "vocab.txt", "spiece.model", "1_Pooling/config.json", "model.safetensors")
    for name in names:
        (tmp_path / "one" / name).write_text(name)
    known = sentence_encoder(tmp_path / "one").fingerprint
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("of no weight")
    assert sentence_encoder(tmp_path / "moved").fingerprint == known
    for name in names:
        other = shutil.copytree(tmp_path / "one", tmp_path / name.replace("/", "-"))
        (other / name).write_text("another")
        assert sentence_encoder(other).fingerprint != known
    (tmp_path / "moved" / "1_Pooling").rename(tmp_path / "moved" / "2_Pooling")
    assert sentence_encoder(tmp_path / "moved").fingerprint != known


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights, and a tokenizer of the words of a few sentences."""
    import torch

    from deferral.torchvision_compat import import_torchvision

    import_torchvision()
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    # Training a vocabulary breaks ties by chance.
    letters = [chr(code) for code in range(33, 127)]
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    known += sorted({word for text in world(200)[0] for word in text.lower().split()} - {*letters})
    vocabulary = {word: number for number, word in enumerate(known)}
    words = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    # Attention that is far from even, so that a mask left out is seen.
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, initializer_range=0.3, **sizes)
    BertModel(config).save_pretrained(folder)
    words.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def exported(source: Path) -> Path:
    from deferral.routing.onnx_export import export

    assert export(source, source.parent / "onnx", max_tokens=32) > 0.9999
    return source.parent / "onnx"


@pytest.mark.ci_slow
def test_the_folder_of_an_export_is_as_open_as_any_other(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "any").mkdir()
    assert exported.stat().st_mode == (tmp_path / "any").stat().st_mode
    assert not list(exported.parent.glob(".*"))
    assert os.access(exported / "model.onnx", os.R_OK)


@pytest.mark.slow
def test_a_checkpoint_in_half_precision_is_exported(source: Path, tmp_path: Path) -> None:
    import torch
    from transformers import BertModel

    from deferral.routing.onnx_export import export

    shutil.copytree(source, tmp_path / "half")
    BertModel.from_pretrained(source).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert export(tmp_path / "half", tmp_path / "onnx") > 0.9999


_LEGACY = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


@pytest.mark.parametrize(
    ("pooling", "module", "message"),
    [
        (_LEGACY, "Normalize", "no model can be read"),
        ({"pooling_mode": "mean"}, "Normalize", "no model can be read"),
        (
            _LEGACY | {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
            "Normalize",
            "expected the mean .*'cls_token'",
        ),
        (_LEGACY | {"pooling_mode_max_tokens": True}, "Normalize", "expected the mean of the tokens"),
        ({"pooling_mode": "cls"}, "Normalize", r"config\.json: expected the mean of the tokens, .* got cls"),
        (_LEGACY, "Dense", r"modules\.json: the module Dense cannot be exported"),
    ],
)
def test_an_encoder_of_other_pooling_is_not_exported(tmp_path: Path, pooling: dict, module: str, message: str) -> None:
    from deferral.routing.onnx_export import export

    kinds = [
        "sentence_transformers.models.Transformer",
        "sentence_transformers.models.Pooling",
        f"sentence_transformers.models.{module}",
    ]
    modules = [{"idx": place, "path": f"{place}_Pooling" if place else "", "type": kind} for place, kind in enumerate(kinds)]
    (tmp_path / "in" / "1_Pooling").mkdir(parents=True)
    for name, content in (("modules.json", modules), ("tokenizer.json", {}), ("1_Pooling/config.json", pooling)):
        (tmp_path / "in" / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        export(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "modules.json").unlink()
    if module != "Dense":
        with pytest.raises(DataError, match=message):
            export(tmp_path / "in", tmp_path / "out")


@pytest.mark.ci_slow
def test_vectors_are_those_of_torch_alone_and_beside_longer_texts(source: Path, exported: Path) -> None:
    import torch
    from transformers import BertModel

    encoder = OnnxEncoder(exported)
    together = encoder(TEXTS)
    assert together.dtype == np.float32
    # This tokenizer has no token for nothing.
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), [1, 1, 0, 1, 1, 1], atol=1e-5)
    model = BertModel.from_pretrained(source, attn_implementation="eager").eval()
    for row, text in enumerate(TEXTS):
        np.testing.assert_allclose(encoder([text])[0], together[row], atol=1e-5)
        given = encoder.inputs([text.encode("utf-8", "replace").decode()])
        assert given["input_ids"].shape[1] <= 32
        with torch.no_grad():
            states = model(*(torch.from_numpy(given[name]) for name in ("input_ids", "attention_mask"))).last_hidden_state
        np.testing.assert_allclose(mean_pooled(states.numpy(), given["attention_mask"])[0], together[row], atol=1e-5)
    assert encoder([]).shape[0] == 0


@pytest.mark.ci_slow
@pytest.mark.slow
def test_sentence_transformers_and_onnxruntime_agree(source: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import BertTokenizerFast

    from deferral.routing.onnx_export import export

    shutil.copytree(source, tmp_path / "whole")
    # Both read the tokenizer's file; only with its settings beside it do both put the same tokens around a text.
    BertTokenizerFast(tokenizer_object=Tokenizer.from_file(str(source / "tokenizer.json"))).save_pretrained(tmp_path / "whole")
    export(tmp_path / "whole", tmp_path / "onnx", max_tokens=64)
    one, other = sentence_encoder(tmp_path / "whole"), sentence_encoder(tmp_path / "onnx")
    assert isinstance(one, TransformersEncoder)
    np.testing.assert_allclose(one(TEXTS), other(TEXTS), atol=1e-5)
    assert one.fingerprint == sentence_encoder(tmp_path / "whole").fingerprint
    assert one.fingerprint != other.fingerprint


@pytest.mark.ci_slow
def test_an_export_that_ignores_the_mask_is_refused_and_nothing_is_written(
    source: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    from deferral.routing import onnx_export

    def blind(model: object, path: Path) -> None:
        """The good graph, with a mask of ones in the place of the one it is given."""
        graph = onnx.load(exported / "model.onnx")
        for node in graph.graph.node:
            node.input[:] = ["ones" if name == "attention_mask" else name for name in node.input]
        shape = onnx.helper.make_node("Shape", ["input_ids"], ["size"])
        one = onnx.helper.make_tensor("one", onnx.TensorProto.INT64, [1], [1])
        ones = onnx.helper.make_node("ConstantOfShape", ["size"], ["ones"], value=one)
        graph.graph.node.insert(0, ones)
        graph.graph.node.insert(0, shape)
        onnx.save(graph, path)

    monkeypatch.setattr(onnx_export, "_write", blind)
    with pytest.raises(DataError, match="its vectors are not those of torch"):
        onnx_export.export(source, source.parent / "blind")
    assert not (source.parent / "blind").exists()
    assert not list(source.parent.glob(".*partial"))
    with pytest.raises(DataError, match="it is there already"):
        onnx_export.export(source, exported)
    with pytest.raises(ValueError, match="max_tokens: expected 2 to 64"):
        onnx_export.export(source, source.parent / "long", max_tokens=100)


@pytest.mark.ci_slow
def test_int8_vectors_are_near(source: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deferral.routing import onnx_export

    monkeypatch.setattr(onnx_export, "_write", lambda model, path: shutil.copy(exported / "model.onnx", path))
    assert onnx_export.export(source, source.parent / "int8", int8=True, max_tokens=32) > 0.95
    assert sorted(path.name for path in (source.parent / "int8").iterdir()) == [
        "encoder.json", "model_int8.onnx", "tokenizer.json",
    ]  # fmt: skip
    known = [text for text in TEXTS if text]
    assert (OnnxEncoder(source.parent / "int8")(known) * OnnxEncoder(exported)(known)).sum(1).min() > 0.95


@pytest.mark.ci_slow
def test_a_router_is_loaded_by_naming_the_folder_of_its_encoder(source: Path, exported: Path, tmp_path: Path) -> None:
    texts, _, quality, price = world(200)
    router = Router(0.1, encoder=exported, policies=QUICK).fit(log_of_table(texts, EXPERTS, quality, price))
    router.save(tmp_path / "router")
    # Wherever the folder lies, and through a cache.
    moved = shutil.copytree(exported, tmp_path / "moved")
    cached = CachedEncoder(sentence_encoder(moved), tmp_path / "vectors", "tiny")
    for encoder in (moved, cached, cached):
        back = Router.load(tmp_path / "router", encoder=encoder)
        np.testing.assert_array_equal(back.route_batch(texts).actions, router.route_batch(texts).actions)
    (moved / "encoder.json").write_text(json.dumps({"max_tokens": 8}))
    with pytest.raises(ValueError, match="this router was fitted with encoder"):
        Router.load(tmp_path / "router", encoder=moved)
    with pytest.raises(ValueError, match="the sentence encoder's folder"):
        Router.load(tmp_path / "router")
