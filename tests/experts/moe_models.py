"""Tiny random mixtures of every family, made with transformers and saved as it saves them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

HIDDEN, WIDTH, VOCABULARY = 32, 16, 64

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_OWN_WIDTH: dict[str, Any] = {"intermediate_size": 24, "moe_intermediate_size": WIDTH}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": WIDTH, "num_local_experts": 8}),
    "qwen2_moe": ("Qwen2Moe", {**_OWN_WIDTH, "num_experts": 8, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3Moe", {**_OWN_WIDTH, "num_experts": 8, "norm_topk_prob": True, "head_dim": 8}),
    "olmoe": ("Olmoe", {"intermediate_size": WIDTH, "num_experts": 8}),
    "deepseek_v2": ("DeepseekV2", {**_OWN_WIDTH, **_LATENT, "n_routed_experts": 8, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3", {**_OWN_WIDTH, **_LATENT, "n_routed_experts": 16, "n_group": 2, "topk_group": 1}),
    "glm4_moe": (
        "Glm4Moe",
        {**_OWN_WIDTH, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8},
    ),
    "gpt_oss": ("GptOss", {"intermediate_size": WIDTH, "num_local_experts": 8, "head_dim": 8}),
    "granitemoe": ("GraniteMoe", {"intermediate_size": WIDTH, "num_local_experts": 8}),
    "phimoe": ("Phimoe", {"intermediate_size": WIDTH, "num_local_experts": 8}),
    "llama4_text": (
        "Llama4",
        {"intermediate_size": WIDTH, "intermediate_size_mlp": 24, "num_local_experts": 8, "head_dim": 8},
    ),
    "minimax_m2": ("MiniMaxM2", {"intermediate_size": WIDTH, "num_local_experts": 8, "head_dim": 8}),
    "ernie4_5_moe": ("Ernie4_5_Moe", {**_OWN_WIDTH, "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1}),
    "qwen3_next": (
        "Qwen3Next",
        {
            **_OWN_WIDTH,
            "num_experts": 8,
            "shared_expert_intermediate_size": 24,
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
}


def tiny(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A random model of a family, float32, two layers, 8 experts (16 in 2 groups for DeepSeek-V3), top 2."""
    stem, own = FAMILIES[family]
    name = f"{stem}TextConfig" if family == "llama4_text" else f"{stem}Config"
    top_k = {} if family in ("ernie4_5_moe",) else {"num_experts_per_tok": 1 if family == "llama4_text" else 2}
    config = getattr(transformers, name)(**{**_COMMON, **top_k, **own, **overrides})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # defaults leave fused experts uninitialised or all alike, and biases zero
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if "correction_bias" in n)):
            noise = torch.randn(tensor.shape, generator=generator) * 0.2
            tensor.copy_(noise + 1 if tensor.ndim == 1 and tensor.mean() > 0.5 else noise)
    return model
