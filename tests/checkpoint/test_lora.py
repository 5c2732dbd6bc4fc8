"""LoRA applied while reading, against PEFT's merge_and_unload and against the formula in float64."""

from __future__ import annotations

import json
import math
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergekit_lr.checkpoint.lora import AdaptedCheckpoint, block_rows
from mergekit_lr.checkpoint.open import open_model
from mergekit_lr.lazy import torch

from .adapters import big, hand_made, pair, whole
from .conftest import reference, seeded

Tensors = dict[str, Any]


def tiny(kind: str, tied: bool = False) -> Any:
    """An untrained model of a few thousand parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=True,
            tie_word_embeddings=tied,
        )
    )


def peft_case(folder: Path, kind: str, **settings: Any) -> tuple[Path, Path, Tensors]:
    """Base folder, adapter folder, and the state dict that PEFT makes of the two."""
    tied = settings.pop("tied", False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model

        model = tiny(kind, tied)
        model.save_pretrained(folder / "base")
        adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for number, (name, parameter) in enumerate(adapted.named_parameters()):
                if "lora_magnitude_vector" in name:
                    parameter.mul_(1 + 0.3 * seeded(number, *parameter.shape))
                elif parameter.requires_grad:
                    parameter.copy_(0.2 * seeded(number, *parameter.shape))
        adapted.save_pretrained(folder / "adapter")
        merged = adapted.merge_and_unload()
    return folder / "base", folder / "adapter", dict(merged.state_dict())


LLAMA = ["q_proj", "k_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 7, "target_modules": LLAMA},
    "all linear": {"r": 2, "target_modules": "all-linear"},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": LLAMA},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": LLAMA,
        "rank_pattern": {"k_proj": 3, "model.layers.1.self_attn.q_proj": 5},
        "alpha_pattern": {r"layers\.\d+\.mlp\.down_proj": 3, "^model.layers.0.self_attn.q_proj": 1},
    },
    "patterns with rslora": {
        "r": 4,
        "target_modules": LLAMA,
        "rank_pattern": {"q_proj": 2},
        "use_rslora": True,
    },
    "head": {"r": 3, "target_modules": ["lm_head", "q_proj"]},
    "embedding": {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "v_proj"]},
    "modules to save": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "a norm saved": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "bias of adapted modules": {"r": 2, "target_modules": ["q_proj"], "bias": "lora_only"},
    "all biases": {"r": 2, "target_modules": ["q_proj"], "bias": "all"},
    "bias in B": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "dora": {"r": 4, "lora_alpha": 3, "use_dora": True, "target_modules": [*LLAMA, "lm_head"]},
    "dora on embeddings": {"r": 3, "use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
    "gpt2": {"kind": "gpt2", "r": 3, "lora_alpha": 5, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"]},
    "gpt2, flag not set": {"kind": "gpt2", "r": 3, "target_modules": ["c_attn", "c_proj", "c_fc"]},
    "gpt2 dora": {"kind": "gpt2", "r": 3, "use_dora": True, "target_modules": ["c_attn", "c_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(case: str, tmp_path: Path) -> None:
    options = {"kind": "llama", **CASES[case]}
    base, adapter, merged = peft_case(tmp_path, **options)
    plain = load_file(base / "model.safetensors")
    with open_model(reference(base, adapter)) as checkpoint:
        assert isinstance(checkpoint, AdaptedCheckpoint)
        stored = set(plain)
        assert set(checkpoint.tensors) == stored
        changed = 0
        for name in stored:
            got, expected = whole(checkpoint, name), merged[name]
            assert got.dtype == torch.float32 and got.shape == expected.shape
            scale = expected.abs().max()
            assert (got - expected).abs().max() <= 2e-6 * scale, name
            different = not torch.equal(expected, plain[name])
            changed += different
            assert (name in checkpoint.updates) >= different
        assert changed >= 2  # the adapter does something, or the case proves nothing


def test_formula_in_float64(tmp_path: Path) -> None:
    base, adapter, _ = peft_case(tmp_path, "llama", r=4, lora_alpha=10, target_modules=["up_proj"])
    w = load_file(base / "model.safetensors")
    ab = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (ab[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    with open_model(reference(base, adapter)) as checkpoint:
        expected = w[f"{name}.weight"].double() + 10 / 4 * b @ a
        assert (whole(checkpoint, f"{name}.weight").double() - expected).abs().max() < 5e-7


def test_bfloat16_base_is_added_to_in_float32(tmp_path: Path) -> None:
    w = seeded(1, 6, 5, dtype=torch.bfloat16)
    a, b = seeded(2, 2, 5, dtype=torch.float16), seeded(3, 6, 2, dtype=torch.bfloat16)
    base, adapter = hand_made(
        tmp_path, {"m.weight": w}, {"m.lora_A.weight": a, "m.lora_B.weight": b}, r=2, lora_alpha=1
    )
    with open_model(reference(base, adapter)) as checkpoint:
        got = whole(checkpoint, "m.weight")
        assert got.dtype == torch.float32 and checkpoint.tensors["m.weight"].dtype == "BF16"
        expected = w.double() + 0.5 * b.double() @ a.double()
        assert (got.double() - expected).abs().max() < 1e-6
        assert not torch.equal(got, got.bfloat16().float())  # nothing was rounded to bf16 on the way


@pytest.mark.parametrize(
    ("rows", "columns", "settings"),
    [
        (700, 1000, {}),
        (3, 70_000, {"r": 64}),
        (5000, 70, {}),
        (300, 2001, {"use_dora": True}),
        (600, 900, {"transposed": True}),
        (600, 900, {"transposed": True, "use_dora": True}),
    ],
)
def test_bits_do_not_depend_on_range_or_threads(
    rows: int, columns: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    transposed = settings.pop("transposed", False)
    base, adapter = big(tmp_path, rows, columns, **settings)
    if transposed:  # the weight is stored in x out, as Conv1D has it
        save_file({"m.weight": seeded(3, columns, rows)}, base / "model.safetensors")
    with open_model(reference(base, adapter)) as checkpoint:
        n = checkpoint.tensors["m.weight"].numel
        assert n > 2 * block_rows(checkpoint.tensors["m.weight"].shape[1]) or rows == 3
        expected = checkpoint.read("m.weight", 0, n)
        cuts = [0, 1, 17, n // 7, n // 3, n // 3 + 1, n // 2, n - 513, n - 1, n]
        for start, stop in [*pairwise(cuts), (n // 3, n), (5, n // 2), (n // 7, n // 3), (4, 4)]:
            for buffer in (None, torch.empty(4 * n, dtype=torch.uint8)):
                assert torch.equal(checkpoint.read("m.weight", start, stop, buffer), expected[start:stop])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            with open_model(reference(base, adapter)) as checkpoint:
                assert torch.equal(checkpoint.read("m.weight", 0, n), expected)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 40), rank=st.integers(1, 5), seed=st.integers(0, 99), data=st.data()
)
def test_any_shape_and_range(
    rows: int, columns: int, rank: int, seed: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    a, b = pair(rows, columns, rank, seed)
    w = seeded(seed + 5, rows, columns)
    folder = tmp_path_factory.mktemp("l")
    base, adapter = hand_made(
        folder, {"m.weight": w}, {"m.lora_A.weight": a, "m.lora_B.weight": b}, r=rank, lora_alpha=3
    )
    start = data.draw(st.integers(0, rows * columns))
    stop = data.draw(st.integers(start, rows * columns))
    expected = (w.double() + 3 / rank * b.double() @ a.double()).reshape(-1)[start:stop]
    with open_model(reference(base, adapter)) as checkpoint:
        got = checkpoint.read("m.weight", start, stop)
    assert got.shape == expected.shape
    assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-5 * math.sqrt(rank))


# --- tied embeddings: what the adapter was trained as ---------------------------------------------------------------


def logits(model: Any, tokens: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_adapter_on_one_of_two_tied_tensors_gives_the_function_that_was_trained(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """The oracle is the forward pass of base and adapter, not PEFT's merge, which changes both tied tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base, adapter, _ = peft_case(tmp_path, "llama", tied=True, r=2, **options)
        trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
        tokens = torch.arange(20)[None]
        expected = logits(trained, tokens)
        assert "lm_head.weight" not in load_file(base / "model.safetensors")
        with open_model(reference(base, adapter)) as checkpoint:
            assert checkpoint.config is not None and checkpoint.config["tie_word_embeddings"] is False
            assert any("untied" in w for w in checkpoint.warnings)
            out = tmp_path / "out"
            out.mkdir()
            save_file(
                {n: whole(checkpoint, n) for n in checkpoint.tensors}, out / "model.safetensors", {"format": "pt"}
            )
            (out / "config.json").write_text(json.dumps(checkpoint.config))
        model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert torch.allclose(logits(model, tokens), expected, atol=2e-5)


TIED = {"architectures": ["XForCausalLM"], "tie_word_embeddings": True, "vocab_size": 6}
EMBED = {"model.embed_tokens.weight": seeded(1, 6, 4)}


def test_equal_replacements_of_tied_tensors_stay_tied(tmp_path: Path) -> None:
    new = seeded(7, 6, 4)
    adapter = {"model.embed_tokens.weight": new, "lm_head.weight": new.clone()}
    with open_model(reference(*hand_made(tmp_path, EMBED, adapter, TIED))) as checkpoint:
        assert list(checkpoint.tensors) == ["model.embed_tokens.weight"]
        assert checkpoint.config == TIED and not checkpoint.warnings
        assert torch.equal(whole(checkpoint, "model.embed_tokens.weight"), new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["of one dtype", "of two dtypes"])
def test_different_replacements_of_tied_tensors_untie(tmp_path: Path, dtype: Any) -> None:
    embedding, head = (seeded(7, 6, 4), seeded(8, 6, 4)) if dtype == torch.float32 else (torch.ones(6, 4),) * 2
    adapter = {"model.embed_tokens.weight": embedding, "lm_head.weight": head.to(dtype)}
    with open_model(reference(*hand_made(tmp_path, EMBED, adapter, TIED))) as checkpoint:
        for name, tensor in adapter.items():
            assert torch.equal(whole(checkpoint, name), tensor)
        assert checkpoint.config == {**TIED, "tie_word_embeddings": False}


def test_ensured_tying_changes_the_shared_tensor(tmp_path: Path) -> None:
    factors = {
        "model.embed_tokens.lora_embedding_A": seeded(2, 2, 6),
        "model.embed_tokens.lora_embedding_B": seeded(3, 4, 2),
    }
    with open_model(reference(*hand_made(tmp_path, EMBED, factors, TIED, ensure_weight_tying=True))) as checkpoint:
        assert list(checkpoint.tensors) == ["model.embed_tokens.weight"] and checkpoint.config == TIED


def test_grown_vocabulary(tmp_path: Path) -> None:
    new = seeded(7, 9, 4)
    adapter = {"model.embed_tokens.weight": new, "lm_head.weight": new.clone()}
    with open_model(reference(*hand_made(tmp_path, EMBED, adapter, TIED))) as checkpoint:
        assert checkpoint.config == {**TIED, "vocab_size": 9}
        assert checkpoint.tensors["model.embed_tokens.weight"].shape == (9, 4)
        assert any("from 6 to 9 rows" in w for w in checkpoint.warnings)
        assert torch.equal(whole(checkpoint, "model.embed_tokens.weight"), new)


def test_lora_on_a_saved_base_layer(tmp_path: Path) -> None:
    """PEFT stores a targeted, resized embedding as base_layer.weight beside its factors."""
    new, a, b = seeded(7, 9, 4), seeded(2, 2, 9), seeded(3, 4, 2)
    adapter = {
        "model.embed_tokens.base_layer.weight": new,
        "model.embed_tokens.lora_embedding_A": a,
        "model.embed_tokens.lora_embedding_B": b,
    }
    with open_model(reference(*hand_made(tmp_path, EMBED, adapter, TIED))) as checkpoint:
        got = whole(checkpoint, "model.embed_tokens.weight")
        assert torch.allclose(got, new + (b @ a).T, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_merge_reads_the_adapted_model(threads: int, tmp_path: Path) -> None:
    from mergekit_lr import merge

    base, adapter = big(tmp_path, 900, 700)
    weighted = [{"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}}]
    recipe = {"merge_method": "linear", "models": weighted, "out_dtype": "float32"}
    merge(recipe, tmp_path / "out", device="cpu", threads=threads)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    with open_model(reference(base, adapter)) as checkpoint:
        assert torch.equal(merged["m.weight"], whole(checkpoint, "m.weight"))
