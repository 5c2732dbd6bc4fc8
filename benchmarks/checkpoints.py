"""Llama-shaped bf16 checkpoints of a given size, for the benchmarks.

Weights are N(0, 0.02^2) and a fine-tune is the base plus N(0, 0.002^2), so that task vectors
have the relative size that real fine-tunes have and nearly no entry ties with another by accident.
The tensors are made one at a time and written shard by shard: making a checkpoint needs one shard of memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

WEIGHT_SIGMA = 0.02
DELTA_SIGMA = 0.002


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama-architecture checkpoint; the default is 640.7 M parameters, 1.28 GB in bf16."""

    hidden: int = 2048
    intermediate: int = 5504
    layers: int = 12
    heads: int = 16
    vocabulary: int = 8192
    shards: int = 4

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes in layer order, embeddings first and the head last."""
        square, up = (self.hidden, self.hidden), (self.intermediate, self.hidden)
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            shapes[prefix + "input_layernorm.weight"] = (self.hidden,)
            for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
                shapes[prefix + f"self_attn.{projection}.weight"] = square
            shapes[prefix + "post_attention_layernorm.weight"] = (self.hidden,)
            shapes[prefix + "mlp.gate_proj.weight"] = up
            shapes[prefix + "mlp.up_proj.weight"] = up
            shapes[prefix + "mlp.down_proj.weight"] = (self.hidden, self.intermediate)
        shapes["model.norm.weight"] = (self.hidden,)
        shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        return shapes

    def parameters(self) -> int:
        """Number of parameters."""
        return sum(torch.Size(shape).numel() for shape in self.tensors().values())

    def config(self) -> dict[str, object]:
        """The config.json that belongs to these shapes."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def _shard_names(names: list[str], shards: int) -> dict[str, list[str]]:
    per_shard = -(-len(names) // shards)
    groups = [names[start : start + per_shard] for start in range(0, len(names), per_shard)]
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _tensor(name: str, shape: tuple[int, ...], delta_seed: int | None, position: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(position)
    weight = torch.randn(shape, generator=generator).mul_(WEIGHT_SIGMA)
    if name.endswith("norm.weight"):
        weight += 1.0
    if delta_seed is not None:
        generator.manual_seed(delta_seed * 1_000_003 + position)
        weight += torch.randn(shape, generator=generator).mul_(DELTA_SIGMA)
    return weight.to(torch.bfloat16)


def make_checkpoint(folder: Path, shape: LlamaShape, delta_seed: int | None = None) -> int:
    """Write a checkpoint into ``folder`` and return its tensor bytes; ``delta_seed=None`` makes the base.

    A finished folder of the same shape is reused: ``config.json`` is written last.
    """
    shapes = shape.tensors()
    total = 2 * shape.parameters()
    config = json.dumps(shape.config(), indent=2)
    marker = folder / "config.json"
    if marker.is_file() and marker.read_text() == config:
        return total
    folder.mkdir(parents=True, exist_ok=True)
    positions = {name: position for position, name in enumerate(shapes)}
    weight_map: dict[str, str] = {}
    for file_name, names in _shard_names(list(shapes), shape.shards).items():
        shard = {name: _tensor(name, shapes[name], delta_seed, positions[name]) for name in names}
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    marker.write_text(config)
    return total


def make_family(root: Path, shape: LlamaShape, fine_tunes: int) -> list[str]:
    """Make ``base`` and ``ft_1`` .. ``ft_n`` under ``root``; returns the folder names."""
    names = ["base", *(f"ft_{number}" for number in range(1, fine_tunes + 1))]
    for number, name in enumerate(names):
        make_checkpoint(root / name, shape, number or None)
    return names
