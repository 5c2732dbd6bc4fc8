"""What a model is, against what it was built as."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch
from mergekit_lr.report.inspect import human_bytes, inspect

from .conftest import FAMILIES

Model = Callable[..., Path]


@pytest.mark.parametrize("family", FAMILIES)
def test_facts(family: str, built: Path) -> None:
    found = inspect(built / family)
    tensors = load_file(built / family / "model.safetensors")
    assert found.parameters == sum(t.numel() for t in tensors.values())
    assert found.bytes == sum(t.nbytes for t in tensors.values()) and found.bytes_by_dtype == {"F32": found.bytes}
    assert (found.layers, found.hidden_size, found.vocab_size) == (2, 32, 64)
    assert found.tied == (family in ("gemma2", "starcoder2", "gpt2"))
    moe = family in ("mixtral", "qwen3_moe", "olmoe")
    assert (found.experts, found.experts_per_token) == ((4, 2) if moe else (None, None))
    assert found.model_type == family and found.warnings == []
    assert found.files == [
        {"file": "model.safetensors", "bytes": (built / family / "model.safetensors").stat().st_size}
    ]
    assert json.loads(json.dumps(found.to_dict()))["tensors"] == len(tensors)


def test_summary(built: Path) -> None:
    lines = inspect(str(built / "qwen3_moe")).summary_lines()
    text = "\n".join(lines)
    for part in (
        "Qwen3MoeForCausalLM / qwen3_moe",
        "layers        2",
        "experts       4 a layer, 2 per token",
        "vocabulary    64",
    ):
        assert part in text


def test_contradictions_are_warnings(model: Model) -> None:
    found = inspect(model(vocab_size=99))
    assert any("vocab_size 99" in w for w in found.warnings)
    assert any(line.startswith("warning ") for line in found.summary_lines())


def test_raw_state_dict(tmp_path: Path) -> None:
    save_file(
        {"fc.weight": torch.zeros(3, 2), "fc.bias": torch.zeros(3, dtype=torch.float16)}, tmp_path / "m.safetensors"
    )
    found = inspect(ModelReference.parse(str(tmp_path / "m.safetensors")))
    assert (found.parameters, found.architecture, found.layers, found.vocab_size) == (9, None, None, None)
    assert found.bytes_by_dtype == {"F32": 24, "F16": 6} and not found.tied
    assert found.largest[0] == {"name": "fc.weight", "dtype": "F32", "shape": [3, 2], "bytes": 24}
    assert "raw state dict, no config" in "\n".join(found.summary_lines())


def test_adapter(built: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    factors = {
        f"base_model.model.{name}.lora_A.weight": torch.zeros(3, 32),
        f"base_model.model.{name}.lora_B.weight": torch.zeros(48, 3),
    }
    save_file(factors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3, "lora_alpha": 3}')
    found = inspect(f"{built / 'llama'}+{tmp_path}")
    assert found.adapter == {"folder": tmp_path.name, "rank": 3, "changed": 1, "parameters": 240}
    assert any("LoRA, rank 3, changes 1 tensors" in line for line in found.summary_lines())


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        inspect(tmp_path / "none")


def test_human_bytes() -> None:
    shown = [human_bytes(n) for n in (0, 999, 1000, 1_340_000_000, 2 * 10**12)]
    assert shown == ["0 B", "999 B", "1 kB", "1.34 GB", "2 TB"]
