"""What a recipe says of single tokens, padding, ids in configs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_lr
from mergekit_lr.errors import CheckpointError, RecipeError

from .models import TEXT, byte_level, read_tensors, tokens_of, vocabulary, write_model
from .test_rows import E, H, linear, merge, read_report, weighted


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[dict[str, int]]]:
    folder = tmp_path_factory.mktemp("two")
    tokenizers = [byte_level(TEXT["english"], 290), byte_level(TEXT["python"], 285, ["<|end|>", "<|pad|>"])]
    vocabularies = [vocabulary(t) for t in tokenizers]
    models = [write_model(folder / f"m{i}", t, len(vocabularies[i]), seed=i) for i, t in enumerate(tokenizers)]
    return models, vocabularies


def section(**keys: Any) -> dict[str, Any]:
    return {"tokenizer": {"source": "union", **keys}}


def test_rules_for_single_tokens(tmp_path: Path, two: tuple[list[Path], list[dict[str, int]]]) -> None:
    models, vocabularies = two
    a, b = (read_tensors(m) for m in models)
    shared = sorted(set(vocabularies[0]) & set(vocabularies[1]))
    only_a = sorted(set(vocabularies[0]) - set(vocabularies[1]))
    only_b = sorted(set(vocabularies[1]) - set(vocabularies[0]) - {"<|pad|>"})
    model_token = {"kind": "model_token", "model": str(models[1])}
    rules = {
        "<new>": {"source": {**model_token, "token": only_b[0]}},
        "<newer>": {"source": {**model_token, "token_id": 7}},
        "<zero>": {"source": {"kind": "zero"}},
        shared[0]: {"source": str(models[1]), "force": True},
        shared[1]: {"source": str(models[1])},
        shared[2]: {"source": {"kind": "zero"}, "force": True},
        only_a[0]: {"source": {"kind": "zero"}},
        only_b[1]: {"source": {"kind": "zero"}, "force": True},
    }
    out = merge(tmp_path, linear(*models, **section(tokens=rules)))
    ids, tensors = tokens_of(out), read_tensors(out)
    va, vb = vocabularies
    zero = torch.zeros(16)
    for name in (E, H):
        expected = {
            "<new>": [b[name][vb[only_b[0]]]] * 2,
            "<newer>": [b[name][7]] * 2,
            "<zero>": [zero] * 2,
            shared[0]: [b[name][vb[shared[0]]]] * 2,  # forced: both models get the second one's row
            shared[1]: [a[name][va[shared[1]]], b[name][vb[shared[1]]]],  # both have it, so the rule is not needed
            shared[2]: [zero] * 2,
            only_a[0]: [a[name][va[only_a[0]]], zero],  # the first keeps its own
            only_b[1]: [zero] * 2,
        }
        for token, rows in expected.items():
            found = tensors[name][ids[token]].double()
            torch.testing.assert_close(found, weighted(rows), rtol=1e-6, atol=1e-7, msg=f"{name} {token}")


def test_rules_that_cannot_be_kept(tmp_path: Path, two: tuple[list[Path], list[dict[str, int]]]) -> None:
    models, vocabularies = two
    missing = next(iter(set(vocabularies[1]) - set(vocabularies[0])))
    out_of_range = {"kind": "model_token", "model": str(models[0]), "token_id": 5000}
    for source in (str(models[0]), {"kind": "model_token", "model": str(models[0]), "token": "no such"}, out_of_range):
        with pytest.raises(CheckpointError, match="it has no embedding of"):
            merge(tmp_path, linear(*models, **section(tokens={missing: {"source": source, "force": True}})))
    with pytest.raises(RecipeError, match="is no model of this recipe"):
        merge(tmp_path, linear(*models, **section(tokens={missing: {"source": "./elsewhere"}})))
    assert not (tmp_path / "out").exists()


def test_a_token_that_nobody_knows_is_zero_and_said(
    tmp_path: Path, two: tuple[list[Path], list[dict[str, int]]]
) -> None:
    models, _ = two
    out = merge(tmp_path, linear(*models, **section(tokens={"<unknown>": {}})))
    assert float(read_tensors(out)[E][tokens_of(out)["<unknown>"]].abs().max()) == 0
    assert any("'<unknown>'" in w and "zeros" in w for w in read_report(out)["warnings"])


@pytest.mark.parametrize("multiple", [None, 1, 64])
def test_padding(tmp_path: Path, multiple: int | None) -> None:
    """Padding rows stay as they are; with pad_to_multiple_of they are the mean of the rows of each model."""
    tokenizer = byte_level(TEXT["english"], 290)
    ids = vocabulary(tokenizer)
    models = [write_model(tmp_path / f"m{i}", tokenizer, rows, seed=i) for i, rows in enumerate((320, 300))]
    keys = {"source": "base"} | ({"pad_to_multiple_of": multiple} if multiple else {})
    out = merge(tmp_path, linear(*models, tokenizer=keys))
    a, b = (read_tensors(m) for m in models)
    found = read_tensors(out)
    n = len(ids)
    assert len(found[E]) == {None: 320, 1: n, 64: 320}[multiple]
    for name in (E, H):
        torch.testing.assert_close(found[name][:n].double(), weighted([a[name][:n], b[name][:n]]), rtol=1e-6, atol=1e-7)
        if multiple is None:
            own = weighted([a[name][n:300], b[name][n:]])
            torch.testing.assert_close(found[name][n:300].double(), own, rtol=1e-6, atol=1e-7)
            assert torch.equal(found[name][300:], a[name][300:])
        elif multiple == 64:
            mean = weighted([a[name][:n].double().mean(0), b[name][:n].double().mean(0)])
            torch.testing.assert_close(found[name][n:].double(), mean.expand(320 - n, -1), rtol=1e-5, atol=1e-6)


def test_one_padded_model_is_not_touched_by_its_own_tokenizer(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", byte_level(TEXT["english"], 290), 320, seed=0)
    recipe = {"merge_method": "passthrough", "models": [{"model": str(model)}], "tokenizer_source": "base"}
    out = merge(tmp_path, recipe)
    for name, tensor in read_tensors(model).items():
        assert torch.equal(read_tensors(out)[name], tensor)


def test_ids_of_special_tokens_follow_the_token(tmp_path: Path) -> None:
    first = byte_level(TEXT["english"], 290, ["<|bos|>", "<|end|>", "<|image|>"])
    other = byte_level(TEXT["python"], 280, ["<|image|>", "<|stop|>", "<|bos|>"])
    va, vb = vocabulary(first), vocabulary(other)
    ids = {"bos_token_id": va["<|bos|>"], "eos_token_id": [va["<|end|>"]], "image_token_id": va["<|image|>"]}
    a = write_model(tmp_path / "a", first, len(va), seed=0, config={**ids, "pad_token_id": va["Ġcat"]})
    (a / "generation_config.json").write_text(json.dumps({**ids, "suppress_tokens": [va["<|end|>"], va["t"]]}))
    named = {"bos_token": "<|bos|>", "eos_token": "<|stop|>"}
    theirs = {"bos_token_id": vb["<|bos|>"], "eos_token_id": vb["<|stop|>"]}
    b = write_model(tmp_path / "b", other, len(vb), seed=1, config=theirs, named=named)

    def read(out: Path, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((out / name).read_text())
        return found

    union = merge(tmp_path, linear(a, b, tokenizer_source="union"), "union")
    for name in ("config.json", "generation_config.json"):
        assert {k: read(union, name)[k] for k in ids} == ids

    out = merge(tmp_path, linear(a, b, tokenizer_source=str(b)))
    for name in ("config.json", "generation_config.json"):
        found = read(out, name)
        assert found["bos_token_id"] == vb["<|bos|>"]
        assert found["eos_token_id"] == vb["<|stop|>"]  # what the tokenizer in the output calls so
        assert found["image_token_id"] == vb["<|image|>"]
    assert read(out, "generation_config.json")["suppress_tokens"] == [vb["t"]]
    assert read(out, "config.json")["pad_token_id"] is None  # no token of the output
    told = [w for w in read_report(out)["warnings"] if "is dropped" in w]
    assert len(told) == 2 and "pad_token_id" in told[0] and "suppress_tokens" in told[1]


def test_tokens_without_an_embedding_are_left_out(tmp_path: Path) -> None:
    """A tokenizer may know more tokens than the model has rows; the output's does not."""
    tokenizer = byte_level(TEXT["english"], 290, ["<|end|>", "<|pad|>"])
    ids = vocabulary(tokenizer)
    rows = len(ids) - 1
    model = write_model(tmp_path / "m", tokenizer, rows, seed=0, named={"pad_token": "<|pad|>"})
    out = merge(tmp_path, linear(model, tokenizer_source="base"))
    assert tokens_of(out) == {t: i for t, i in ids.items() if i < rows}
    assert any("'<|pad|>'" in w and "left out" in w for w in read_report(out)["warnings"])
    few = merge(tmp_path, linear(write_model(tmp_path / "few", tokenizer, 275, seed=0), tokenizer_source="base"), "cut")
    assert tokens_of(few) == {t: i for t, i in ids.items() if i < 275}


def test_a_tokenizer_from_elsewhere(tmp_path: Path, two: tuple[list[Path], list[dict[str, int]]]) -> None:
    """A folder with nothing but a tokenizer is enough for a source."""
    models, vocabularies = two
    tokenizer = byte_level(TEXT["english"], 280)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    out = merge(tmp_path, linear(*models, tokenizer_source=str(folder)))
    assert tokens_of(out) == vocabulary(tokenizer)
    from .test_rows import check_rows

    check_rows(out, models, vocabularies)


def test_refusals(tmp_path: Path, two: tuple[list[Path], list[dict[str, int]]]) -> None:
    models, vocabularies = two
    with pytest.raises(CheckpointError, match=r"the vocabularies differ by 4 rows; add `tokenizer_source: union`"):
        merge(tmp_path, linear(*models))
    bare = write_model(tmp_path / "bare", None, 77, seed=3)
    with pytest.raises(CheckpointError, match="its 77 rows of embeddings cannot be told apart without one"):
        merge(tmp_path, linear(models[0], bare, tokenizer_source="union"))
    alike = write_model(tmp_path / "alike", None, len(vocabularies[0]), seed=3)
    out = merge(tmp_path, linear(models[0], alike, tokenizer_source="union"))
    assert any("its rows are taken to be those of" in w for w in read_report(out)["warnings"])


def test_same_ids_other_order_is_refused_with_counts(tmp_path: Path) -> None:
    from .models import reordered

    tokenizer = byte_level(TEXT["english"], 290)
    n = len(vocabulary(tokenizer))
    models = [write_model(tmp_path / f"m{i}", t, n, seed=i) for i, t in enumerate((tokenizer, reordered(tokenizer)))]
    with pytest.raises(CheckpointError, match=r"290 tokens have other ids than in .*; add `tokenizer_source: union`"):
        merge(tmp_path, linear(*models))


def test_pieces_budget_and_restart_give_the_same_bytes(
    tmp_path: Path, two: tuple[list[Path], list[dict[str, int]]]
) -> None:
    models, _ = two
    recipe = linear(*models, tokenizer={"source": "union", "pad_to_multiple_of": 128})
    whole = read_report(merge(tmp_path, recipe))["tensors"]
    small = mergekit_lr.merge(recipe, tmp_path / "small", device="cpu", threads=2, max_memory="8MiB", shard_size="20KB")
    assert [t["digest"] for t in small.report["tensors"]] == [t["digest"] for t in whole]
