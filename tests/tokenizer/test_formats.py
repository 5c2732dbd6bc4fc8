"""Vocabularies are read from every kind of tokenizer, as data; damaged and hostile files are errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_lr
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError, RecipeError
from mergekit_lr.tokenizer.axes import vocabulary_rows, vocabulary_tensors
from mergekit_lr.tokenizer.vocabulary import read_folder

from .models import TEXT, byte_level, read_tensors, sentence_piece, tokens_of, vocabulary, word_piece, write_model
from .test_rows import E, H, check_rows, linear, merge, pieces_of


def folder_with(tmp_path: Path, files: dict[str, Any]) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_vocab_json_and_merges(tmp_path: Path) -> None:
    """The two files of GPT-2, with a token added."""
    content = json.loads(byte_level(TEXT["english"], 280, []).to_str())["model"]
    merges = "\n".join(m if isinstance(m, str) else " ".join(m) for m in content["merges"])
    files = {
        "vocab.json": content["vocab"],
        "merges.txt": f"#version: 0.2\n{merges}\n",
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "unk_token": "!", "eos_token": "<|end|>"},
    }
    folder = folder_with(tmp_path, files)
    found = read_folder(folder)
    assert found is not None
    assert dict(found.ids) == tokens_of(folder)
    assert found.core == content["vocab"].keys()
    assert found.named["eos_token"] == "<|end|>" and found.ids["<|end|>"] >= 280


def test_vocab_txt(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s"]
    config = {"tokenizer_class": "BertTokenizer"}
    found = read_folder(folder_with(tmp_path, {"vocab.txt": "\n".join(words), "tokenizer_config.json": config}))
    assert found is not None
    assert dict(found.ids) == {w: i for i, w in enumerate(words)}


def test_sentencepiece_model(tmp_path: Path) -> None:
    pieces = sentence_piece(TEXT["german"], 310)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    found = read_folder(folder_with(tmp_path, {"tokenizer.model": pieces, "tokenizer_config.json": config}))
    assert found is not None and dict(found.ids) == pieces_of(pieces)
    assert found.document is not None


def test_unigram_in_tokenizer_json(tmp_path: Path) -> None:
    entries = [["<unk>", 0.0], ["▁a", -1.0], ["b", -2.0]]
    content = {"model": {"type": "Unigram", "vocab": entries}, "added_tokens": [{"id": 3, "content": "<x>"}]}
    found = read_folder(folder_with(tmp_path, {"tokenizer.json": content}))
    assert found is not None
    assert dict(found.ids) == {"<unk>": 0, "▁a": 1, "b": 2, "<x>": 3}
    assert found.core == {"<unk>", "▁a", "b"}


DAMAGED: dict[str, Any] = {
    "two tokens of one id": {"model": {"vocab": {"a": 0, "b": 0}}},
    "an id that is none": {"model": {"vocab": {"a": "0"}}},
    "a negative id": {"model": {"vocab": {"a": -1}}},
    "no tokens": {"model": {"vocab": {}}},
    "a list of numbers": {"model": {"vocab": [1, 2]}},
    "an added token without id": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "x"}]},
    "a list": [],
    "no JSON": "{",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_tokenizer_json(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        read_folder(folder_with(tmp_path, {"tokenizer.json": DAMAGED[kind]}))


def test_code_of_a_model_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Own: pass\n"
    files = {"vocab.json": {"a": 0}, "tokenizer_config.json": config, "tokenization_own.py": code}
    with pytest.raises(CheckpointError, match="cannot read its tokenizer"):
        read_folder(folder_with(tmp_path, files))
    assert not marker.exists()


def model_of(shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
    infos = {n: TensorInfo(n, "F32", s, 0, 4 * int(torch.Size(s).numel())) for n, s in shapes.items()}
    return Checkpoint("m", None, None, infos, {}, ())


def test_which_tensors_count_tokens() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (100, 8),
        "bert.embeddings.position_embeddings.weight": (64, 8),
        "bert.embeddings.token_type_embeddings.weight": (2, 8),
        "bert.encoder.layer.0.output.dense.weight": (8, 32),
        "cls.predictions.bias": (100,),
        "cls.predictions.decoder.weight": (100, 8),
        "cls.predictions.transform.dense.bias": (8,),
        "final_logits_bias": (1, 100),
        "transformer.wte.weight": (100, 8),
        "transformer.wpe.weight": (64, 8),
        "model.layers.61.embed_tokens.weight": (100, 8),
        "model.layers.61.shared_head.head.weight": (100, 8),
        "visual.embeddings.embedding.weight": (49, 8),
        "classifier.output.weight": (3, 8),
    }
    found = vocabulary_tensors(model_of(shapes))
    assert set(found) == {n for n, s in shapes.items() if 100 in s}
    assert set(found.values()) == {100}
    with pytest.raises(CheckpointError, match="different numbers of rows"):
        vocabulary_rows(model_of({"a.embed_tokens.weight": (100, 8), "a.embed_tokens_per_layer.weight": (90, 8)}))


def test_slices_take_rows_by_token(tmp_path: Path) -> None:
    """The embeddings come from the first slice, the head from the last; tokens that only the other has from there."""
    tokenizers = [byte_level(TEXT["english"], 290), byte_level(TEXT["python"], 285)]
    va, vb = (vocabulary(t) for t in tokenizers)
    a, b = (
        write_model(tmp_path / f"m{i}", t, len(v), seed=i)
        for i, (t, v) in enumerate(zip(tokenizers, (va, vb), strict=True))
    )
    slices = [{"sources": [{"model": str(m), "layer_range": [0, n]}]} for m, n in ((a, 2), (b, 1))]
    out = merge(tmp_path, {"merge_method": "passthrough", "slices": slices, "tokenizer_source": "union"})
    ids, found = tokens_of(out), read_tensors(out)
    for name, first, second in ((E, (a, va), (b, vb)), (H, (b, vb), (a, va))):
        held = [read_tensors(m)[name] for m in (first[0], second[0])]
        for token, i in ids.items():
            expected = held[0][first[1][token]] if token in first[1] else held[1][second[1][token]]
            assert torch.equal(found[name][i], expected)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 3


@pytest.mark.parametrize("method", ["ties", "della_linear", "model_stock", "nuslerp", "karcher", "sce"])
def test_every_kind_of_method_sees_aligned_rows(tmp_path: Path, method: str) -> None:
    """A merge of models with different vocabularies is the merge of the same models resized by hand."""
    first, other = byte_level(TEXT["english"], 290), byte_level(TEXT["python"], 285)
    va, vb = vocabulary(first), vocabulary(other)
    base = write_model(tmp_path / "base", first, len(va), seed=0)
    tuned = [write_model(tmp_path / f"t{i}", other, len(vb), seed=i) for i in (1, 2)]
    recipe: dict[str, Any] = {"merge_method": method, "base_model": str(base)}
    if method in ("ties", "della_linear"):
        recipe["parameters"] = {"weight": 0.5, "density": 0.5}
    if method == "nuslerp":
        recipe["parameters"] = {"weight": 0.5}
    found = merge(tmp_path, recipe | {"models": [{"model": str(m)} for m in tuned], "tokenizer_source": "base"})
    from safetensors.torch import save_file

    # the same names at other places: random masks are drawn under the name that a recipe gives a model
    for folder in tuned:
        tensors = read_tensors(folder)
        for name in (E, H):
            of_base = read_tensors(base)[name]
            rows = [tensors[name][vb[t]] if t in vb else of_base[va[t]] for t in sorted(va, key=va.__getitem__)]
            tensors[name] = torch.stack(rows)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    by_hand = merge(tmp_path, recipe | {"models": [{"model": str(m)} for m in tuned]}, "by-hand")
    for name, tensor in read_tensors(by_hand).items():
        assert torch.equal(read_tensors(found)[name], tensor), name


def test_methods_that_cannot_move_rows_say_so(tmp_path: Path) -> None:
    tokenizers = [byte_level(TEXT["english"], 290), word_piece(TEXT["english"], 80)]
    a, b = (
        write_model(tmp_path / f"m{i}", t, len(vocabulary(t)), seed=i, named={"pad_token": "<|end|>"} if i == 0 else {})
        for i, t in enumerate(tokenizers)
    )
    pack = {"merge_method": "tall_masks", "base_model": str(a), "models": [{"model": str(b), "name": "b"}]}
    with pytest.raises(RecipeError, match="lays out its own output and cannot move rows"):
        merge(tmp_path, pack | {"tokenizer_source": "union", "parameters": {"lambda": 1.0}})
    curved = linear(a, b, tokenizer_source="union") | {"merge_method": "fisher"}
    for entry in curved["models"]:
        entry["parameters"] = {"curvature": str(tmp_path / "fisher.safetensors")}
    from safetensors.torch import save_file

    save_file({f"{n}.fisher": t.abs() for n, t in read_tensors(a).items()}, tmp_path / "fisher.safetensors")
    with pytest.raises(RecipeError, match="rows would not follow the tokens"):
        mergekit_lr.plan(curved, device="cpu")


def test_ids_without_a_token_between_others(tmp_path: Path) -> None:
    """A tokenizer that leaves ids unused keeps them; nothing can be numbered behind them, so union says no."""
    content = json.loads(byte_level(TEXT["english"], 290, []).to_str())
    gone = [t for t, i in content["model"]["vocab"].items() if i == 288]
    del content["model"]["vocab"][gone[0]]
    content["model"]["merges"] = [m for m in content["model"]["merges"] if "".join(m) != gone[0]]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(content))
    ids = vocabulary(tokenizer)
    rows = max(ids.values()) + 1
    models = [write_model(tmp_path / f"m{i}", tokenizer, rows, seed=i) for i in range(2)]
    out = merge(tmp_path, linear(*models, tokenizer_source="base"))
    check_rows(out, models, [ids, ids])
    assert len(read_tensors(out)[E]) == rows
    other = byte_level(TEXT["english"], 290, ["<|call|>"])
    more = write_model(tmp_path / "more", other, len(vocabulary(other)), seed=3)
    with pytest.raises(CheckpointError, match="leaves ids unused, and has 289 in use behind them"):
        merge(tmp_path, linear(models[0], more, tokenizer_source="union"), "union")
