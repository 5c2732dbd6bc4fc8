"""Checkpoints of architectures whose code transformers does not have: names as their repositories on the Hub use them.

The names are facts of those files; sizes and weights are made up. ``#`` stands for each of `LAYERS` layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LAYERS = 4

#: name -> (config, tensors: what they are called and their sizes)
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "baichuan": (
        {"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "num_hidden_layers": LAYERS},
        {
            "model.embed_tokens.weight": (16, 8),
            "model.layers.#.self_attn.W_pack.weight": (24, 8),
            "model.layers.#.self_attn.o_proj.weight": (8, 8),
            "model.layers.#.mlp.gate_proj.weight": (12, 8),
            "model.layers.#.input_layernorm.weight": (8,),
            "model.norm.weight": (8,),
            "lm_head.weight": (16, 8),
        },
    ),
    "chatglm": (
        {"model_type": "chatglm", "architectures": ["ChatGLMModel"], "num_layers": LAYERS},
        {
            "transformer.embedding.word_embeddings.weight": (16, 8),
            "transformer.rotary_pos_emb.inv_freq": (4,),
            "transformer.encoder.layers.#.self_attention.query_key_value.weight": (24, 8),
            "transformer.encoder.layers.#.self_attention.query_key_value.bias": (24,),
            "transformer.encoder.layers.#.mlp.dense_h_to_4h.weight": (12, 8),
            "transformer.encoder.final_layernorm.weight": (8,),
            "transformer.output_layer.weight": (16, 8),
        },
    ),
    "exaone": (
        {"model_type": "exaone", "architectures": ["ExaoneForCausalLM"], "num_layers": LAYERS},
        {
            "transformer.wte.weight": (16, 8),
            "transformer.h.#.attn.attention.q_proj.weight": (8, 8),
            "transformer.h.#.mlp.c_fc_0.weight": (12, 8),
            "transformer.h.#.ln_1.weight": (8,),
            "transformer.ln_f.weight": (8,),
            "lm_head.weight": (16, 8),
        },
    ),
    "internlm2": (
        {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "num_hidden_layers": LAYERS},
        {
            "model.tok_embeddings.weight": (16, 8),
            "model.layers.#.attention.wqkv.weight": (24, 8),
            "model.layers.#.feed_forward.w1.weight": (12, 8),
            "model.layers.#.attention_norm.weight": (8,),
            "model.norm.weight": (8,),
            "output.weight": (16, 8),
        },
    ),
    "jais": (
        {"model_type": "jais", "architectures": ["JAISLMHeadModel"], "n_layer": LAYERS},
        {
            "transformer.wte.weight": (16, 8),
            "transformer.relative_pe.slopes": (4,),
            "transformer.h.#.attn.c_attn.weight": (8, 24),
            "transformer.h.#.mlp.c_fc2.weight": (8, 12),
            "transformer.ln_f.weight": (8,),
        },
    ),
    "phi-msft": (
        {"model_type": "phi-msft", "architectures": ["PhiForCausalLM"], "n_layer": LAYERS},
        {
            "transformer.embd.wte.weight": (16, 8),
            "transformer.h.#.mixer.Wqkv.weight": (24, 8),
            "transformer.h.#.mlp.fc1.bias": (12,),
            "lm_head.ln.weight": (8,),
            "lm_head.linear.weight": (16, 8),
        },
    ),
    "mixformer-sequential": (
        {"model_type": "mixformer-sequential", "architectures": ["MixFormerSequentialForCausalLM"], "n_layer": LAYERS},
        {
            "layers.0.wte.weight": (16, 8),
            **{f"layers.{i + 1}.mixer.Wqkv.weight": (24, 8) for i in range(LAYERS)},
            **{f"layers.{i + 1}.ln.weight": (8,) for i in range(LAYERS)},
            f"layers.{LAYERS + 1}.ln.weight": (8,),
            f"layers.{LAYERS + 1}.linear.weight": (16, 8),
        },
    ),
    "phi3small": (
        {"model_type": "phi3small", "architectures": ["Phi3SmallForCausalLM"], "num_hidden_layers": LAYERS},
        {
            "model.embed_tokens.weight": (16, 8),
            "model.layers.#.self_attn.query_key_value.weight": (24, 8),
            "model.layers.#.mlp.up_proj.weight": (24, 8),
            "model.final_layernorm.weight": (8,),
        },
    ),
    "qwen": (
        {"model_type": "qwen", "architectures": ["QWenLMHeadModel"], "num_hidden_layers": LAYERS},
        {
            "transformer.wte.weight": (16, 8),
            "transformer.h.#.attn.c_attn.weight": (24, 8),
            "transformer.h.#.mlp.w1.weight": (12, 8),
            "transformer.ln_f.weight": (8,),
            "lm_head.weight": (16, 8),
        },
    ),
    "stablelm_epoch": (
        {"model_type": "stablelm_epoch", "architectures": ["StableLMEpochForCausalLM"], "num_hidden_layers": LAYERS},
        {
            "model.embed_tokens.weight": (16, 8),
            "model.layers.#.self_attn.q_proj.weight": (8, 8),
            "model.layers.#.input_layernorm.bias": (8,),
            "model.norm.bias": (8,),
            "lm_head.weight": (16, 8),
        },
    ),
    "internvl": (
        {
            **{"model_type": "internvl_chat", "architectures": ["InternVLChatModel"]},
            **{"llm_config": {"num_hidden_layers": LAYERS}, "vision_config": {"num_hidden_layers": 2}},
        },
        {
            "language_model.model.embed_tokens.weight": (16, 8),
            "language_model.model.layers.#.self_attn.q_proj.weight": (8, 8),
            "language_model.model.norm.weight": (8,),
            "language_model.lm_head.weight": (16, 8),
            "vision_model.embeddings.class_embedding": (1, 1, 8),
            "vision_model.encoder.layers.0.attn.qkv.weight": (24, 8),
            "vision_model.encoder.layers.1.attn.qkv.weight": (24, 8),
            "mlp1.0.weight": (8,),
            "mlp1.1.weight": (8, 8),
        },
    ),
}


def tensors_of(sizes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under the written names."""
    generator = torch.Generator().manual_seed(seed)
    names = {n.replace("#", str(i)): s for n, s in sizes.items() for i in range(LAYERS if "#" in n else 1)}
    return {n: torch.randn(s, generator=generator) for n, s in names.items()}


def write(folder: Path, config: dict[str, Any] | None, tensors: dict[str, torch.Tensor]) -> Path:
    """A model folder."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_layout(name: str, folder: Path, seed: int = 0) -> Path:
    """A made-up model in the layout ``name``."""
    config, sizes = LAYOUTS[name]
    return write(folder, config, tensors_of(sizes, seed))
