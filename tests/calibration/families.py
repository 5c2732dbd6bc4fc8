"""Tiny random models of every known family, as transformers itself writes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t

EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "base"
VOCABULARY = json.loads((EXAMPLE / "config.json").read_text())["vocab_size"]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LATENT: dict[str, Any] = {
    **SIZES,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
NARROW: dict[str, Any] = {**SIZES, "intermediate_size": 20, "num_experts_per_tok": 2}
QWEN: dict[str, Any] = {**SIZES, "intermediate_size": 48, "moe_intermediate_size": 20, "num_experts_per_tok": 3}

MAKERS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**NARROW, head_dim=8, num_local_experts=6)),
    "phimoe": lambda: t.PhimoeForCausalLM(t.PhimoeConfig(**NARROW, num_local_experts=6)),
    "minimax_m2": lambda: t.MiniMaxM2ForCausalLM(
        t.MiniMaxM2Config(**NARROW, head_dim=8, rotary_dim=8, num_local_experts=6)
    ),
    "qwen2_moe": lambda: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=20, num_experts=8)
    ),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**QWEN, head_dim=8, num_experts=8, norm_topk_prob=True, mlp_only_layers=[])
    ),
    "olmoe": lambda: t.OlmoeForCausalLM(t.OlmoeConfig(**NARROW, num_experts=6)),
    "deepseek_v2": lambda: t.DeepseekV2ForCausalLM(t.DeepseekV2Config(**LATENT, topk_method="group_limited_greedy")),
    "deepseek_v3": lambda: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**LATENT)),
    "glm4_moe": lambda: t.Glm4MoeForCausalLM(
        t.Glm4MoeConfig(**{k: v for k, v in LATENT.items() if "_rank" not in k and "qk_" not in k}, head_dim=8)
    ),
    "ernie4_5_moe": lambda: t.Ernie4_5_MoeForCausalLM(
        t.Ernie4_5_MoeConfig(**SIZES, intermediate_size=48, moe_intermediate_size=20, moe_num_experts=6, moe_k=2)
    ),
    "gpt_oss": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(**NARROW, head_dim=8, num_local_experts=6, sliding_window=16)
    ),
    "llama4_text": lambda: t.Llama4ForCausalLM(
        t.Llama4TextConfig(
            **{**NARROW, "num_experts_per_tok": 1},
            head_dim=8,
            intermediate_size_mlp=48,
            num_local_experts=4,
            attention_chunk_size=16,
        )
    ),
    "granitemoe": lambda: t.GraniteMoeForCausalLM(
        t.GraniteMoeConfig(**NARROW, num_local_experts=6, embedding_multiplier=2.0)
    ),
    "granitemoeshared": lambda: t.GraniteMoeSharedForCausalLM(
        t.GraniteMoeSharedConfig(**NARROW, shared_intermediate_size=24, num_local_experts=6)
    ),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, intermediate_size=48)),
}


def make_model(name: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of a family with the example tokenizer. Routers are wide enough for choices to differ."""
    torch.manual_seed(7)
    network = MAKERS[name]().to(dtype)
    for parameter in network.parameters():
        parameter.data *= 4 if parameter.dim() > 1 else 1
    for key, buffer in network.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.data.copy_(0.05 * torch.randn(buffer.shape))
    network.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / file, folder / file)
    return folder
