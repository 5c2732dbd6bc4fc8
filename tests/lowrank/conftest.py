"""Adapters of a few modules on a base of a few tensors, written as PEFT writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lr.checkpoint.open import open_model
from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.lowrank.adapters import read_whole

Tensors = dict[str, torch.Tensor]
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
SHAPES = {EMBED: (30, 12), Q: (16, 12), DOWN: (12, 20), NORM: (12,), "lm_head.weight": (30, 12)}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 30,
    "tie_word_embeddings": False,
    "num_hidden_layers": 2,
}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_base(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir()
    tensors = {n: normal(i, *s).to(dtype) for i, (n, s) in enumerate(SHAPES.items())}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def make_adapter(
    folder: Path,
    seed: int,
    rank: int = 3,
    weights: tuple[str, ...] = (Q, DOWN),
    saved: Tensors | None = None,
    size: float = 0.1,
    **settings: Any,
) -> Path:
    """LoRA on ``weights``, and ``saved`` whole."""
    folder.mkdir()
    tensors: Tensors = {}
    for i, weight in enumerate(weights):
        rows, columns = SHAPES[weight]
        path = "base_model.model." + weight.removesuffix(".weight")
        tensors[f"{path}.lora_A.weight"] = size * normal(seed * 100 + 2 * i, rank, columns)
        tensors[f"{path}.lora_B.weight"] = size * normal(seed * 100 + 2 * i + 1, rows, rank)
        if settings.get("use_dora"):
            tensors[f"{path}.lora_magnitude_vector"] = 1 + normal(seed * 100 + 50 + i, rows).abs()
    tensors |= {f"base_model.model.{n}": t for n, t in (saved or {}).items()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "base", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def tensors_of(reference: str | Path) -> Tensors:
    """Every tensor as the package reads it, an adapter applied."""
    with open_model(ModelReference.parse(str(reference))) as checkpoint:
        return {n: read_whole(checkpoint, n) for n in checkpoint.tensors}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """``adapter(name, seed, rank, ...)`` writes an adapter and returns its folder."""
    return lambda name, *a, **k: make_adapter(tmp_path / name, *a, **k)
