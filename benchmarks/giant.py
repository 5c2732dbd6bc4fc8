"""A model of 1T parameters as headers alone: 61 layers, 384 experts, its data one hole in every file.

Shapes are DeepSeek-V3's with more experts (hidden 7168, experts 2048 wide, latent attention), as the largest open
mixtures have them: 1.03e12 parameters, 2.05 TB in bf16, 69,000 tensors in some 460 files. On disk it takes about 10 MB.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

LAYERS, EXPERTS, HIDDEN, WIDTH, DENSE, VOCABULARY = 61, 384, 7168, 2048, 18432, 163840
HEADS, NOPE, ROPE, VALUE, Q_RANK, KV_RANK = 64, 128, 64, 128, 1536, 512
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE,
    "moe_intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.827,
    "hidden_act": "silu",
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "q_lora_rank": Q_RANK,
    "kv_lora_rank": KV_RANK,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def tensors(layers: int = LAYERS, experts: int = EXPERTS) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor, in the order of the layers."""
    yield "model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN)
    for i in range(layers):
        layer = f"model.layers.{i}."
        yield f"{layer}input_layernorm.weight", "BF16", (HIDDEN,)
        yield f"{layer}post_attention_layernorm.weight", "BF16", (HIDDEN,)
        attention = {
            "q_a_proj": (Q_RANK, HIDDEN),
            "q_a_layernorm": (Q_RANK,),
            "q_b_proj": (HEADS * (NOPE + ROPE), Q_RANK),
            "kv_a_proj_with_mqa": (KV_RANK + ROPE, HIDDEN),
            "kv_a_layernorm": (KV_RANK,),
            "kv_b_proj": (HEADS * (NOPE + VALUE), KV_RANK),
            "o_proj": (HIDDEN, HEADS * VALUE),
        }
        for name, shape in attention.items():
            yield f"{layer}self_attn.{name}.weight", "BF16", shape
        if i == 0:
            yield from gated(f"{layer}mlp.", DENSE)
            continue
        yield f"{layer}mlp.gate.weight", "BF16", (experts, HIDDEN)
        yield f"{layer}mlp.gate.e_score_correction_bias", "F32", (experts,)
        yield from gated(f"{layer}mlp.shared_experts.", WIDTH)
        for e in range(experts):
            yield from gated(f"{layer}mlp.experts.{e}.", WIDTH)
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (VOCABULARY, HIDDEN)


def gated(prefix: str, width: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Gate, up and down projection of one feed-forward network."""
    for name in ("gate_proj", "up_proj"):
        yield f"{prefix}{name}.weight", "BF16", (width, HIDDEN)
    yield f"{prefix}down_proj.weight", "BF16", (HIDDEN, width)


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    size = {"BF16": 2, "F32": 4}[dtype]
    for d in shape:
        size *= d
    return size


def shards(every: list[tuple[str, str, tuple[int, ...]]], most: int) -> list[list[tuple[str, str, tuple[int, ...]]]]:
    """The tensors in files of at most ``most`` bytes."""
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    used = 0
    for tensor in every:
        size = nbytes(tensor[1], tensor[2])
        if groups[-1] and used + size > most:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += size
    return groups


def header(group: list[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, int]:
    """The start of a file, up to its data, and the size of the whole file."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in group:
        size = nbytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + end


def write(folder: Path, *, layers: int = LAYERS, experts: int = EXPERTS, most: int = 5_000_000_000) -> int:
    """Write the model's headers, index and config; returns the bytes that its files claim to have."""
    folder.mkdir(parents=True)
    groups = shards(list(tensors(layers, experts)), most)
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        start, size = header(group)
        with (folder / name).open("wb") as file:
            file.write(start)
            file.truncate(size)
        weight_map |= dict.fromkeys((t[0] for t in group), name)
        total += size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {**CONFIG, "num_hidden_layers": layers, "n_routed_experts": experts}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return total
