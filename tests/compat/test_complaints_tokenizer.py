"""What mergekit's users reported about tokenizers (its issues by number): right here, or refused clearly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mergekit_lr
from mergekit_lr.errors import CheckpointError

from ..tokenizer.models import (
    TEXT,
    byte_level,
    read_tensors,
    sentence_piece,
    tokens_of,
    vocabulary,
    write_model,
    write_tokenizer,
)
from ..tokenizer.test_functions import loaded
from ..tokenizer.test_rows import E, H, check_rows, linear, merge, pieces_of, read_report


def test_47_models_with_different_vocabulary_sizes(tmp_path: Path) -> None:
    """An enlarged vocabulary and a plain one under dare_ties: an error with the remedy, and then the right rows."""
    big, small = byte_level(TEXT["english"], 310), byte_level(TEXT["english"], 280)
    a = write_model(tmp_path / "big", big, len(vocabulary(big)), seed=0)
    b = write_model(tmp_path / "small", small, len(vocabulary(small)), seed=1)
    recipe: dict[str, Any] = {
        "merge_method": "dare_ties",
        "base_model": str(a),
        "models": [{"model": str(b), "parameters": {"weight": 1.0, "density": 1.0}}],
    }
    with pytest.raises(CheckpointError, match="add `tokenizer_source: union`"):
        merge(tmp_path, recipe)
    out = merge(tmp_path, recipe | {"tokenizer_source": "union"})
    ids, va, vb = tokens_of(out), vocabulary(big), vocabulary(small)
    found, of_a, of_b = read_tensors(out)[E], read_tensors(a)[E], read_tensors(b)[E]
    for token in va:  # one model at weight 1 gives its own rows, and the base's where it has none
        expected = of_b[vb[token]] if token in vb else of_a[va[token]]
        torch.testing.assert_close(found[ids[token]], expected, rtol=1e-5, atol=1e-7)


def test_139_special_tokens_of_one_model_and_slerp(tmp_path: Path) -> None:
    """A base with markers of its own keeps all of them under slerp."""
    marked = byte_level(TEXT["english"], 280, ["<|end|>", "<|im_start|>", "<|im_end|>"])
    plain = byte_level(TEXT["english"], 280, ["<|end|>"])
    a = write_model(tmp_path / "marked", marked, len(vocabulary(marked)), seed=0)
    b = write_model(tmp_path / "plain", plain, len(vocabulary(plain)), seed=1)
    recipe = {"merge_method": "slerp", "base_model": str(a), "models": [{"model": str(b)}], "parameters": {"t": 0.0}}
    for source in ("base", "union", str(a)):
        out = merge(tmp_path, recipe | {"tokenizer_source": source}, f"out-{source.rsplit('/', 1)[-1]}")
        assert tokens_of(out) == vocabulary(marked)
        torch.testing.assert_close(read_tensors(out)[H], read_tensors(a)[H], rtol=1e-6, atol=1e-7)


def test_342_tokens_beyond_the_last_row(tmp_path: Path) -> None:
    """A tokenizer may list tokens (infill markers) that its model has no rows for: another model's row, or left out."""
    infill = byte_level(TEXT["python"], 280, ["<|end|>", "<PRE>", "<SUF>"])
    without = len(vocabulary(infill)) - 2
    a = write_model(tmp_path / "code", infill, without, seed=0)
    b = write_model(tmp_path / "infill", infill, without + 2, seed=1)
    out = merge(tmp_path, linear(a, b, tokenizer_source="union"))
    ids = tokens_of(out)
    assert torch.equal(read_tensors(out)[E][ids["<PRE>"]], read_tensors(b)[E][without])
    check_rows(out, [a, b], [vocabulary(infill)] * 2)
    alone = merge(tmp_path, linear(a, tokenizer_source="base"), "alone")
    assert len(tokens_of(alone)) == len(read_tensors(alone)[E]) == without


def test_169_tokenizer_json_and_tokenizer_model(tmp_path: Path) -> None:
    """Models of two kinds of tokenizer share few strings; that is said, and union does not take forever."""
    first, pieces = byte_level(TEXT["english"], 290), sentence_piece(TEXT["english"], 310)
    a = write_model(tmp_path / "json", first, len(vocabulary(first)), seed=0)
    b = write_model(tmp_path / "model", pieces, 310, seed=1)
    with pytest.raises(CheckpointError, match="rows; add `tokenizer_source: union`"):
        merge(tmp_path, linear(a, b))
    out = merge(tmp_path, linear(a, b, tokenizer_source="base"))
    assert any("spell the same word differently" in w for w in read_report(out)["warnings"])
    check_rows(out, [a, b], [vocabulary(first), pieces_of(pieces)])


def test_169_a_vocabulary_of_a_hundred_thousand_is_aligned_in_seconds(tmp_path: Path) -> None:
    """The freeze was a loop over the vocabulary for every model; here the table is made of arrays."""
    import time

    from mergekit_lr.tokenizer.rows import Member, make_table
    from mergekit_lr.tokenizer.vocabulary import Vocabulary

    one = {f"t{i}": i for i in range(130_000)}
    other = {f"t{i}": 149_999 - i for i in range(20_000, 150_000)}
    members = [Member(n, Vocabulary(v, frozenset(v)), max(v.values()) + 1) for n, v in (("a", one), ("b", other))]
    tokens = one | {f"t{i}": i for i in range(130_000, 150_000)}
    began = time.process_time()
    table = make_table(tokens, members, "a", (), 150_000, padding_of="a")
    assert time.process_time() - began < 5
    assert table.counts("b") == {"own": 130_000, "from a": 20_000}


def test_425_padding_rows_stay(tmp_path: Path) -> None:
    """`tokenizer_source: base` with a padded vocabulary does not cut it."""
    tokenizer = byte_level(TEXT["english"], 290)
    models = [write_model(tmp_path / f"m{i}", tokenizer, 320, seed=i) for i in range(2)]
    out = merge(tmp_path, linear(*models, tokenizer_source="base"))
    plain = merge(tmp_path, linear(*models), "plain")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 320
    for name, tensor in read_tensors(plain).items():
        assert torch.equal(read_tensors(out)[name], tensor)


def test_614_one_model_is_padded(tmp_path: Path) -> None:
    """49160 rows against 50304 of the same tokens: both counts in the error, and the base's padding with a source."""
    tokenizer = byte_level(TEXT["english"], 290)
    n = len(vocabulary(tokenizer))
    a = write_model(tmp_path / "padded", tokenizer, 320, seed=0)
    b = write_model(tmp_path / "plain", tokenizer, n, seed=1)
    with pytest.raises(
        CheckpointError, match=rf"\[{n}, 16\] where .* \[320, 16\]; the vocabularies differ by {320 - n}"
    ):
        merge(tmp_path, linear(a, b))
    out = merge(tmp_path, linear(a, b, tokenizer_source="base"))
    assert torch.equal(read_tensors(out)[E][n:], read_tensors(a)[E][n:])
    check_rows(out, [a, b], [vocabulary(tokenizer)] * 2)


def test_202_files_that_disagree_about_an_id(tmp_path: Path) -> None:
    """Where tokenizer_config.json moves a token, tokenizer.json counts, and the user is told."""
    tokenizer = byte_level(TEXT["english"], 280, ["<|bos|>", "<|end|>"])
    ids = vocabulary(tokenizer)
    a = write_model(tmp_path / "a", tokenizer, len(ids), seed=0)
    b = Path(shutil.copytree(a, tmp_path / "b"))
    path = b / "tokenizer_config.json"
    config = json.loads(path.read_text())
    moved = {str(ids["<|bos|>"] - 30): {"content": "<|bos|>", "special": True}}
    path.write_text(json.dumps(config | {"added_tokens_decoder": moved}))
    out = merge(tmp_path, linear(a, b, tokenizer_source="union"))
    [warning] = [w for w in read_report(out)["warnings"] if "gives other ids" in w]
    assert f"'<|bos|>' ({ids['<|bos|>'] - 30}, not {ids['<|bos|>']})" in warning
    assert tokens_of(out)["<|bos|>"] == ids["<|bos|>"]


def test_185_tokenizer_model_stays_under_union(tmp_path: Path) -> None:
    """Programs that read tokenizer.model find it, and the new tokens in added_tokens.json beside it."""
    pieces = sentence_piece(TEXT["english"], 310)
    a = write_model(tmp_path / "a", pieces, 310, seed=0)
    b = write_model(tmp_path / "b", pieces, 311, seed=1)
    (b / "added_tokens.json").write_text(json.dumps({"<|call|>": 310}))
    out = merge(tmp_path, linear(a, b, tokenizer_source="union"))
    assert (out / "tokenizer.model").read_bytes() == pieces
    assert json.loads((out / "added_tokens.json").read_text()) == {"<|call|>": 310}
    assert tokens_of(out)["<|call|>"] == 310
    assert torch.equal(read_tensors(out)[E][310], read_tensors(b)[E][310])


def test_469_tokenizer_json_keeps_its_format(tmp_path: Path) -> None:
    """Adding tokens does not write the rest of tokenizer.json anew: older loaders know one format of merges only."""
    first = byte_level(TEXT["english"], 290)
    a = write_model(tmp_path / "a", first, len(vocabulary(first)), seed=0)
    path = a / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    path.write_text(json.dumps(content))
    other = byte_level(TEXT["english"], 290, ["<|end|>", "<|call|>"])
    b = write_model(tmp_path / "b", other, len(vocabulary(other)), seed=1)
    out = merge(tmp_path, linear(a, b, tokenizer_source="union", chat_template="chatml"))
    found = json.loads((out / "tokenizer.json").read_text())
    assert found["model"] == content["model"]
    assert found["added_tokens"][:-1] == content["added_tokens"]
    assert set(tokens_of(out)) == set(vocabulary(other)) | set(vocabulary(first))
    loaded(out)


def test_275_generation_config_is_written_with_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_level(TEXT["english"], 280)
    model = write_model(tmp_path / "m", tokenizer, len(vocabulary(tokenizer)), seed=0)
    (model / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 3}')
    for keys in ({"tokenizer_source": "base"}, {"tokenizer": {"source": "union"}}, {"chat_template": "chatml"}):
        out = merge(tmp_path, linear(model, **keys), next(iter(keys)))
        assert json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.6, "eos_token_id": 3}


def test_367_the_chat_template_is_not_lost(tmp_path: Path) -> None:
    tokenizer = byte_level(TEXT["english"], 280)
    model = write_model(tmp_path / "m", tokenizer, len(vocabulary(tokenizer)), seed=0)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    for keys in ({}, {"tokenizer_source": "union"}, {"chat_template": "auto"}):
        out = merge(tmp_path, linear(model, **keys), f"out{len(keys)}{''.join(keys)}")
        assert (out / "chat_template.jinja").read_text() == "{{ messages }}"


def adapter(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file({f"base_model.model.{n}": t for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    return folder


def test_548_a_lora_applied_by_passthrough_keeps_a_tokenizer(tmp_path: Path) -> None:
    """The base's, or the adapter's own where it was trained with new tokens."""
    plain = byte_level(TEXT["english"], 280)
    n = len(vocabulary(plain))
    model = write_model(tmp_path / "m", plain, n, seed=0)
    q = "model.layers.0.self_attn.q_proj"
    factors = {f"{q}.lora_A.weight": torch.ones(2, 16), f"{q}.lora_B.weight": torch.ones(16, 2)}
    lora = adapter(tmp_path / "lora", factors)
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{model}+{lora}"}]}
    assert tokens_of(merge(tmp_path, recipe)) == vocabulary(plain)

    grown = byte_level(TEXT["english"], 280, ["<|end|>", "<|call|>"])
    rows = {E: torch.ones(n + 1, 16), H: torch.full((n + 1, 16), 2.0)}
    trained = adapter(tmp_path / "trained", factors | rows)
    write_tokenizer(trained, grown, {})
    for keys in ({}, {"tokenizer_source": "base"}):
        both = {"merge_method": "passthrough", "models": [{"model": f"{model}+{trained}"}], **keys}
        out = merge(tmp_path, both, f"grown{len(keys)}")
        assert tokens_of(out) == vocabulary(grown)
        assert torch.equal(read_tensors(out)[H], rows[H])
    mixed = linear(model, Path(f"{model}+{trained}"), tokenizer_source="union")
    found = merge(tmp_path, mixed, "mixed")
    assert torch.equal(read_tensors(found)[H][tokens_of(found)["<|call|>"]], rows[H][0])
    assert not mergekit_lr.verify(found).problems
