"""The small checkpoints that the recorded values were made from, the same to the bit on every machine.

Values come from PCG64's raw 64-bit outputs, whose stream NumPy guarantees (``standard_normal``'s it does not): four
16-bit pieces of one output are added, centred and scaled in float64, then rounded once.

Three families, each in a folder of its own with the model names that the recipes use:

``float32``, ``bfloat16``  a three-layer Llama-shaped model (``base``, fine-tunes ``ft_a`` .. ``ft_c`` and ``near_a``,
    ``near_b``, which hardly differ from the base), as Hugging Face folders. ``base`` and ``ft_b`` are sharded.
``raw``  single ``.safetensors`` files with tensors of rank 0 to 4, an integer buffer, and the degenerate cases:
    identical inputs, opposite task vectors, a zero task vector, all-zero tensors.

Needs torch, NumPy and safetensors only, so that mergekit's environment can run it too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 8, 12, 3, 2, 1, 16
WEIGHT_SIGMA, DELTA_SIGMA = 0.5, 0.1
NEAR_SIGMA = 1e-4  # small enough for slerp's linear branch, sce's uniform weights and model_stock's clamped norms
FAMILIES = ("float32", "bfloat16", "raw")
SHARDED = ("base", "ft_b")

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def bell(shape: tuple[int, ...], label: str) -> torch.Tensor:
    """Float64 values of mean 0 and variance 1, near normal (a sum of four uniforms), seeded by ``label``."""
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little")
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.random.PCG64(seed).random_raw(count)
    pieces = raw[:, None] >> np.array([0, 16, 32, 48], dtype=np.uint64) & np.uint64(0xFFFF)
    centred = pieces.astype(np.float64).sum(axis=1) - 4 * 32767.5
    return torch.from_numpy(centred / (65536.0 / np.sqrt(3.0))).reshape(shape)


def llama_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the three-layer model."""
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            prefix + "self_attn.k_proj.weight": (kv, HIDDEN),
            prefix + "self_attn.v_proj.weight": (kv, HIDDEN),
            prefix + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            prefix + "post_attention_layernorm.weight": (HIDDEN,),
            prefix + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            prefix + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            prefix + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


RAW_SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "one": (1,),
    "vector": (37,),
    "matrix": (12, 9),
    "conv1d": (4, 3, 5),
    "conv2d": (3, 2, 3, 3),
    "identical": (6, 5),
    "opposite": (5, 6),
    "unchanged_in_a": (7, 4),
    "zeros": (3, 4),
    "zero_base": (4, 4),
}


def _on_grid(values: torch.Tensor) -> torch.Tensor:
    """Multiples of 2^-18: sums and differences of a few of them are exact in float32."""
    return torch.round(values * 2.0**18) / 2.0**18


def _weights(shapes: Mapping[str, tuple[int, ...]], model: str) -> dict[str, torch.Tensor]:
    weights = {name: _on_grid(bell(shape, f"base/{name}") * WEIGHT_SIGMA) for name, shape in shapes.items()}
    if model != "base":
        sigma = NEAR_SIGMA if model.startswith("near") else DELTA_SIGMA
        for name, shape in shapes.items():
            weights[name] = weights[name] + _on_grid(bell(shape, f"{model}/{name}") * sigma)
    return weights


def llama(model: str) -> dict[str, torch.Tensor]:
    """One model of the Llama families, in float64."""
    return _weights(llama_shapes(), model)


def raw(model: str) -> dict[str, torch.Tensor]:
    """One model of the raw family, in float64 but for the integer buffer."""
    weights = _weights(RAW_SHAPES, model)
    base = _weights(RAW_SHAPES, "base")
    weights["identical"] = base["identical"]
    if model == "ft_b":
        weights["opposite"] = 2 * base["opposite"] - _weights(RAW_SHAPES, "ft_a")["opposite"]
    if model == "ft_a":
        weights["unchanged_in_a"] = base["unchanged_in_a"]
    weights["zeros"] = torch.zeros_like(weights["zeros"])
    if model == "base":
        weights["zero_base"] = torch.zeros_like(weights["zero_base"])
    return weights | {"position_ids": torch.arange(9)}


def models(family: str) -> list[str]:
    """The model names of a family."""
    return ["base", "ft_a", "ft_b", "ft_c"] + ([] if family == "raw" else ["near_a", "near_b"])


def tensors(family: str, model: str) -> dict[str, torch.Tensor]:
    """One model's tensors in the family's dtype, as they lie on disk."""
    if family == "raw":
        loaded = raw(model)
        return {name: t.float().contiguous() if t.is_floating_point() else t for name, t in loaded.items()}
    dtype = torch.bfloat16 if family == "bfloat16" else torch.float32
    return {name: tensor.to(dtype) for name, tensor in llama(model).items()}


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes and bytes, in name order."""
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(f"{name} {state[name].dtype} {tuple(state[name].shape)}\n".encode())
        total.update(state[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _save_folder(state: dict[str, torch.Tensor], folder: Path, dtype: str, shards: int) -> None:
    folder.mkdir()
    names = list(state)
    step = -(-len(names) // shards)
    groups = [names[start : start + step] for start in range(0, len(names), step)]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        if len(groups) == 1:
            file_name = "model.safetensors"
        save_file({name: state[name] for name in group}, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file_name)
    if len(groups) > 1:
        size = sum(t.numel() * t.element_size() for t in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": dtype}, indent=1))


def write_family(family: str, root: Path) -> None:
    """Write the models of ``family`` into ``root``, named as the recipes name them."""
    root.mkdir(parents=True, exist_ok=True)
    for model in models(family):
        state = tensors(family, model)
        if family == "raw":
            save_file(state, root / f"{model}.safetensors", metadata={"format": "pt"})
        else:
            _save_folder(state, root / model, family, shards=2 if model in SHARDED else 1)
