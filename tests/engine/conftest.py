"""Small checkpoints that a merge can be checked against by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

Maker = Callable[..., Path]

SHAPES = {
    "model.embed_tokens.weight": (96, 64),
    "model.layers.0.mlp.up_proj.weight": (300, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.1.mlp.up_proj.weight": (300, 64),
    "model.layers.1.input_layernorm.weight": (64,),
    "model.norm.weight": (64,),
    "lm_head.weight": (96, 64),
}


def draw(
    seed: int, dtype: torch.dtype = torch.bfloat16, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: (torch.randn(s, generator=g) * 0.05).to(dtype) for n, s in shapes.items()}


@pytest.fixture
def random_tensors() -> Callable[..., dict[str, Tensor]]:
    """``random_tensors(seed, dtype=..., shapes=...)``: normal values of scale 0.05."""
    return draw


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    """``make(name, tensors, config=..., shards=...)`` writes a model folder and returns its path."""

    def write(name: str, tensors: dict[str, Tensor], config: dict[str, object] | None = None, shards: int = 1) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama", "torch_dtype": "bfloat16"}))
        names = list(tensors)
        parts = [names[i::shards] for i in range(shards)]
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            return folder
        weight_map = {}
        for i, part in enumerate(parts):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            save_file({n: tensors[n] for n in part}, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write


@pytest.fixture
def load() -> Callable[[Path], dict[str, Tensor]]:
    """Every tensor of a folder, through the reference library."""
    return read_all


def read_all(folder: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    out: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as f:
            out |= {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118 - not a dict
    return out
