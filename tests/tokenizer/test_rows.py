"""Embedding rows follow the token's string: pairs of models with different vocabularies, row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekit_lr
from mergekit_lr.errors import CheckpointError

from .models import (
    TEXT,
    byte_level,
    read_tensors,
    reordered,
    sentence_piece,
    tokens_of,
    vocabulary,
    word_piece,
    write_model,
)

E, H = "model.embed_tokens.weight", "lm_head.weight"


def merge(tmp_path: Path, recipe: dict[str, Any], name: str = "out") -> Path:
    return mergekit_lr.merge(recipe, tmp_path / name, device="cpu").out


def linear(*models: Path, **keys: Any) -> dict[str, Any]:
    """An average with weights 1, 3, 9, ...: no two models can be confused."""
    listed = [{"model": str(m), "parameters": {"weight": 3.0**i}} for i, m in enumerate(models)]
    return {"merge_method": "linear", "base_model": str(models[0]), "models": listed, **keys}


def weighted(rows: list[Tensor]) -> Tensor:
    weights = [3.0**i for i in range(len(rows))]
    return sum(w * r.double() for w, r in zip(weights, rows, strict=True)) / sum(weights)


def expected_row(token: str, held: list[Tensor], vocabularies: list[dict[str, int]]) -> Tensor:
    """The rule in words of its own: each model's own row, else the base's, else the mean of those that have one."""
    owned = {i: held[i][v[token]] for i, v in enumerate(vocabularies) if v.get(token, 1 << 30) < len(held[i])}
    fallback = owned[0] if 0 in owned else torch.stack([r.double() for r in owned.values()]).mean(0)
    return weighted([owned.get(i, fallback) for i in range(len(held))])


def check_rows(out: Path, models: list[Path], vocabularies: list[dict[str, int]]) -> None:
    tensors, ids = read_tensors(out), tokens_of(out)
    config = json.loads((out / "config.json").read_text())
    assert max(ids.values()) < config["vocab_size"] == len(tensors[E])
    inputs = [read_tensors(m) for m in models]
    for name in {E, H} & tensors.keys():
        assert len(tensors[name]) == config["vocab_size"]
        held = [t.get(name, t[E]) for t in inputs]
        expected = torch.stack([expected_row(token, held, vocabularies) for token in ids])
        found = tensors[name][list(ids.values())].double()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def pair(tmp_path: Path, kind: str) -> tuple[list[Path], list[dict[str, int]]]:
    """Two models and what their tokenizers say, by the tokenizers themselves."""
    first = byte_level(TEXT["english"], 290)
    other = {
        "same": lambda: first,
        "subset": lambda: byte_level(TEXT["english"], 275),
        "superset": lambda: byte_level(TEXT["english"], 305),
        "other text": lambda: byte_level(TEXT["python"], 290),
        "other specials": lambda: byte_level(TEXT["english"], 290, ["<|stop|>", "<|pad|>"]),
        "other order": lambda: reordered(first),
        "word piece": lambda: word_piece(TEXT["english"], 80),
    }[kind]()
    vocabularies = [vocabulary(first), vocabulary(other)]
    folders = [
        write_model(tmp_path / f"m{i}", t, len(v), seed=i)
        for i, (t, v) in enumerate(zip((first, other), vocabularies, strict=True))
    ]
    return folders, vocabularies


KINDS = ("same", "subset", "superset", "other text", "other specials", "other order", "word piece")


@pytest.mark.parametrize("kind", KINDS)
def test_union(tmp_path: Path, kind: str) -> None:
    models, vocabularies = pair(tmp_path, kind)
    out = merge(tmp_path, linear(*models, tokenizer_source="union"))
    assert set(tokens_of(out)) == set(vocabularies[0]) | set(vocabularies[1])
    assert {t: i for t, i in tokens_of(out).items() if t in vocabularies[0]} == vocabularies[0]
    check_rows(out, models, vocabularies)
    verification = mergekit_lr.verify(out)
    assert not verification.problems


@pytest.mark.parametrize("kind", KINDS)
def test_base(tmp_path: Path, kind: str) -> None:
    models, vocabularies = pair(tmp_path, kind)
    out = merge(tmp_path, linear(*models, tokenizer_source="base"))
    assert tokens_of(out) == vocabularies[0]
    check_rows(out, models, vocabularies)


@pytest.mark.parametrize("kind", ["subset", "other text", "other order", "word piece"])
def test_tokenizer_of_the_other_model(tmp_path: Path, kind: str) -> None:
    models, vocabularies = pair(tmp_path, kind)
    out = merge(tmp_path, linear(*models, tokenizer_source=str(models[1])))
    assert tokens_of(out) == vocabularies[1]
    check_rows(out, models, vocabularies)


def sentence_pieces(tmp_path: Path) -> tuple[Path, Path, dict[str, int], dict[str, int]]:
    """A byte-level BPE model and a SentencePiece one that has only its tokenizer.model."""
    first = byte_level(TEXT["english"], 290)
    a = write_model(tmp_path / "bpe", first, len(vocabulary(first)), seed=0)
    pieces = sentence_piece(TEXT["english"], 310)
    b = write_model(tmp_path / "spm", pieces, 310, seed=1)
    return a, b, vocabulary(first), pieces_of(pieces)


def pieces_of(model: bytes) -> dict[str, int]:
    """What the sentencepiece library itself says."""
    import sentencepiece

    loaded = sentencepiece.SentencePieceProcessor(model_proto=model)
    return {loaded.id_to_piece(i): i for i in range(loaded.get_piece_size())}


def test_byte_level_against_sentencepiece(tmp_path: Path) -> None:
    a, b, byte_pairs, pieces = sentence_pieces(tmp_path)
    assert "▁the" in pieces and "Ġthe" in byte_pairs
    shared = set(byte_pairs) & set(pieces)
    assert 10 < len(shared) < 100
    plan = mergekit_lr.plan(linear(a, b, tokenizer_source="union"), device="cpu")
    assert plan.to_dict()["tokens"]["models"][str(b)]["own"] == len(pieces)
    assert plan.to_dict()["tokens"]["models"][str(a)]["own"] == len(byte_pairs)
    out = merge(tmp_path, linear(a, b, tokenizer_source="union"))
    assert set(tokens_of(out)) == set(byte_pairs) | set(pieces)
    check_rows(out, [a, b], [byte_pairs, pieces])
    kept = merge(tmp_path, linear(a, b, tokenizer_source="base"), "base")
    check_rows(kept, [a, b], [byte_pairs, pieces])
    [warning] = [w for w in read_report(kept)["warnings"] if "spell" in w]
    assert f"only {len(shared)} of its {len(pieces)}" in warning


def test_sentencepiece_first(tmp_path: Path) -> None:
    """The output's tokenizer is made from a tokenizer.model, which stays beside it for those who read that."""
    a, b, byte_pairs, pieces = sentence_pieces(tmp_path)
    kept = merge(tmp_path, linear(b, a, tokenizer_source="base"), "base")
    assert (kept / "tokenizer.model").read_bytes() == (b / "tokenizer.model").read_bytes()
    assert not (kept / "tokenizer.json").exists()
    check_rows(kept, [b, a], [pieces, byte_pairs])
    out = merge(tmp_path, linear(b, a, tokenizer_source="union"))
    added = json.loads((out / "added_tokens.json").read_text())
    assert set(added) == set(byte_pairs) - set(pieces) and min(added.values()) == 310
    check_rows(out, [b, a], [pieces, byte_pairs])


def read_report(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "merge_report.json").read_text())
    return report


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_tied_and_untied(tmp_path: Path, first: bool, second: bool) -> None:
    """A tied model's embeddings are its head; a head that would be lost is an error."""
    tokenizers = [byte_level(TEXT["english"], 290), byte_level(TEXT["python"], 285)]
    vocabularies = [vocabulary(t) for t in tokenizers]
    models = [
        write_model(tmp_path / f"m{i}", t, len(v), seed=i, tied=tied)
        for i, (t, v, tied) in enumerate(zip(tokenizers, vocabularies, (first, second), strict=True))
    ]
    recipe = linear(*models, tokenizer_source="union")
    if first and not second:
        with pytest.raises(CheckpointError, match="differs from the model's embeddings"):
            merge(tmp_path, recipe)
        return
    out = merge(tmp_path, recipe)
    assert (H in read_tensors(out)) is not first
    check_rows(out, models, vocabularies)


def test_three_models_average_what_the_base_lacks(tmp_path: Path) -> None:
    base, one, two = byte_level(TEXT["english"], 270), byte_level(TEXT["german"], 290), byte_level(TEXT["german"], 280)
    vocabularies = [vocabulary(t) for t in (base, one, two)]
    models = [write_model(tmp_path / f"m{i}", t, len(vocabularies[i]), seed=i) for i, t in enumerate((base, one, two))]
    shared = set(vocabularies[1]) & set(vocabularies[2]) - set(vocabularies[0])
    assert len(shared) > 5
    recipe = linear(*models, tokenizer_source="union")
    counts = mergekit_lr.plan(recipe, device="cpu").to_dict()["tokens"]["models"][str(models[0])]
    assert counts["averaged"] == len(shared)
    check_rows(merge(tmp_path, recipe), models, vocabularies)


def test_without_a_base_two_of_three_are_averaged_even_for_the_first(tmp_path: Path) -> None:
    """As in mergekit: only a base_model's row goes before the mean, not that of the first model listed."""
    tokenizers = [byte_level(TEXT["english"], 290), byte_level(TEXT["english"], 285), byte_level(TEXT["python"], 280)]
    vocabularies = [vocabulary(t) for t in tokenizers]
    models = [write_model(tmp_path / f"m{i}", t, len(vocabularies[i]), seed=i) for i, t in enumerate(tokenizers)]
    recipe = linear(*models, tokenizer_source="union")
    del recipe["base_model"]
    out = merge(tmp_path, recipe)
    token = next(iter(set(vocabularies[0]) & set(vocabularies[1]) - set(vocabularies[2])))
    rows = [read_tensors(m)[E][v[token]] for m, v in zip(models[:2], vocabularies[:2], strict=True)]
    expected = weighted([*rows, torch.stack(rows).double().mean(0)])
    torch.testing.assert_close(read_tensors(out)[E][tokens_of(out)[token]].double(), expected, rtol=1e-6, atol=1e-7)
