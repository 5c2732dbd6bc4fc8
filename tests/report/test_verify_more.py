"""Adapters and bundles are verified too, and every verdict says what it rests on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import mergekit_lr
from mergekit_lr.lazy import torch
from mergekit_lr.report.verify import verify

from .conftest import edit_config

Model = Callable[..., Path]
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


def adapter(folder: Path, tensors: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A PEFT folder of one module: A is 4 x 32, B is 16 x 4."""
    folder.mkdir()
    found = {f"{MODULE}.lora_A.weight": torch.ones(4, 32), f"{MODULE}.lora_B.weight": torch.ones(16, 4)}
    found |= tensors or {}
    save_file({n: t for n, t in found.items() if t is not None}, folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").chmod(0o644)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_sound_adapter(tmp_path: Path) -> None:
    result = verify(adapter(tmp_path / "a"))
    assert (result.problems, result.warnings, result.kind) == ([], [], "adapter")
    assert result.tensors == 2 and result.bytes == 4 * (4 * 32 + 16 * 4) and result.scanned
    assert any("base model" in u for u in result.unchecked)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_that_peft_wrote(built: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(built / "llama")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True, rank_pattern={"v_proj": 2})
    get_peft_model(model, config).save_pretrained(tmp_path)
    result = verify(tmp_path)
    assert result.problems == [] and result.tensors == 2 * 2 * 3


SPOILT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another rank": ({}, {"r": 8}, "has rank 4, the configuration 8"),
    "no B": ({f"{MODULE}.lora_B.weight": None}, {}, "has not both of A and B"),
    "factors that do not multiply": ({f"{MODULE}.lora_B.weight": torch.ones(16, 3)}, {}, "do not multiply"),
    "a magnitude without DoRA": ({f"{MODULE}.lora_magnitude_vector": torch.ones(16)}, {}, "use_dora is False"),
    "DoRA without a magnitude": ({}, {"use_dora": True}, "use_dora is True"),
    "a short magnitude": (
        {f"{MODULE}.lora_magnitude_vector": torch.ones(15)}, {"use_dora": True}, "the wrong length",
    ),
    "not finite": ({f"{MODULE}.lora_B.weight": torch.full((16, 4), float("nan"))}, {}, "64 values that are NaN"),
    "another kind": ({}, {"peft_type": "IA3"}, "only LORA adapters"),
    "a setting that is not known": ({}, {"new_setting": 3}, "'new_setting' (3) is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_adapter(case: str, tmp_path: Path) -> None:
    tensors, changes, message = SPOILT[case]
    result = verify(adapter(tmp_path / "a", tensors, **changes))
    assert any(message in p for p in result.problems), result.problems


def test_files_of_an_adapter(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    (folder / "optimizer.pt").touch()
    assert any("optimizer.pt may be a pickle" in w for w in verify(folder).warnings)
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-1])
    assert any("its tensors end at byte" in p for p in verify(folder).problems)
    (folder / "adapter_model.safetensors").unlink()
    assert any("holds no adapter_model.safetensors" in p for p in verify(folder).problems)


def test_an_adapter_that_we_wrote_has_its_digests_checked(tmp_path: Path) -> None:
    sources = [
        adapter(tmp_path / n, {f"{MODULE}.lora_A.weight": torch.full((4, 32), v)}) for n, v in (("a", 1.0), ("b", 2.0))
    ]
    base = tmp_path / "base"
    base.mkdir()
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(16, 32)}, base / "model.safetensors")
    recipe = {
        "merge_method": "lora_merge", "base_model": str(base),
        "models": [{"model": f"{base}+{s}", "parameters": {"weight": 0.5}} for s in sources],
        "parameters": {"rank": 4},
    }  # fmt: skip
    mergekit_lr.merge(recipe, tmp_path / "out", device="cpu", threads=1)
    result = verify(tmp_path / "out")
    assert result.kind == "adapter" and result.problems == [] and result.digests_checked == result.tensors > 0
    path = tmp_path / "out" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert any("is not as it was written" in p for p in verify(tmp_path / "out").problems)


def test_it_says_what_it_checked_and_what_it_could_not(model: Model, tmp_path: Path) -> None:
    full = verify(model("llama"))
    assert "values that are not finite" in full.checked and "attention and MLP against config.json" in full.checked
    assert any(u.startswith("index against files (there is no index)") for u in full.unchecked)
    assert any(u.startswith("digests (there is no merge_report.json") for u in full.unchecked)
    lines = full.summary_lines()
    assert lines[-2].startswith("checked: headers; ") and lines[-1].startswith("not checked: index against files")
    headers_only = verify(tmp_path / "llama", weights=False)
    assert any(u == "values that are not finite (weights were not read)" for u in headers_only.unchecked)
    edit_config(tmp_path / "llama", model_type="brand_new")
    strange = verify(tmp_path / "llama")
    assert any("the layout of 'brand_new' is not known" in u for u in strange.unchecked)
    (tmp_path / "llama" / "config.json").unlink()
    bare = verify(tmp_path / "llama")
    assert any(u.startswith("sizes, layers and the head") and "no config.json" in u for u in bare.unchecked)
    assert json.loads(json.dumps(bare.to_dict()))["unchecked"] == bare.unchecked
    single = verify(tmp_path / "llama" / "model.safetensors")
    assert single.kind == "file" and not any("config.json" in c for c in single.checked)


def test_every_look_is_either_made_or_explained(built: Path) -> None:
    """No look is silently left out: the two lists together are the same for every model with a config."""
    looks = []
    for family in ("llama", "mixtral", "gpt2", "starcoder2"):
        result = verify(built / family, weights=False)
        looks.append({*result.checked, *(u.partition(" (")[0] for u in result.unchecked)})
    experts = {"experts, routers and shared experts against config.json"}
    assert looks[0] == looks[2] == looks[3] == looks[1] - experts and experts <= looks[1]


SHARED = {
    "qwen2_moe": ("shared_expert_intermediate_size", "shared_expert"),
    "deepseek_v3": ("n_shared_experts", "shared_experts"),
}


@pytest.mark.parametrize("family", SHARED)
def test_shared_experts_and_router_biases(family: str, tmp_path: Path) -> None:
    key, part = SHARED[family]
    config: dict[str, Any] = {
        "model_type": family, "num_hidden_layers": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 6, key: 12 if key.endswith("size") else 2,
    }  # fmt: skip
    block = "model.layers.0.mlp"
    tensors = {f"{block}.gate.weight": torch.ones(4, 8), f"{block}.gate.e_score_correction_bias": torch.ones(4)}
    tensors |= {f"{block}.experts.{e}.up_proj.weight": torch.ones(6, 8) for e in range(4)}
    tensors |= {f"{block}.{part}.up_proj.weight": torch.ones(12, 8)}

    def found(**changes: Any) -> list[str]:
        save_file(tensors | changes.pop("tensors", {}), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        return verify(tmp_path).problems

    assert found() == []
    assert any("12" in p and part in p for p in found(**{key: 3}))
    flat = f"{block}.gate.e_score_correction_bias"
    assert found(tensors={flat: torch.ones(1, 4)}) == []
    spoilt = {f"{block}.gate.e_score_correction_bias": torch.ones(3)}
    assert any("4 experts, but" in p and "correction_bias" in p for p in found(tensors=spoilt))
