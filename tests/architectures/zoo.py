"""Tiny random models of many architectures, in the layout that transformers saves and the Hub has.

`TRANSFORMERS` says how each is made: the class, and what its config needs beside `SMALL`. Sizes that a config has under
one of the usual names are made small by themselves, so an entry is mostly empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

LAYERS = 4
SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "out_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "n_inner", "block_ff_dim"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "shared_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "vision_output_dim"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **{"vocab_size": 64, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "d_kv": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    **{"image_size": 16, "patch_size": 4, "type_vocab_size": 2},
}

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
_LINEAR = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}
_MIXED = ["linear_attention", "full_attention"] * 2
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION |= {"image_size": 16, "patch_size": 4}
_QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN3_VISION = {
    **_QWEN_VISION,
    **{"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32},
    **{"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
}
_TEXT = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_QWEN_IDS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

Entry = tuple[str, dict[str, Any]]

#: name -> class of transformers, and what its config needs beside `SMALL`
TRANSFORMERS: dict[str, Entry] = {
    # decoders
    "afmoe": ("AfmoeForCausalLM", {"num_dense_layers": 1}),
    "apertus": ("ApertusForCausalLM", {}),
    "arcee": ("ArceeForCausalLM", {}),
    "bloom": ("BloomForCausalLM", {}),
    "cohere": ("CohereForCausalLM", {}),
    "cohere2": ("Cohere2ForCausalLM", {}),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        {"first_k_dense_replace": 1, "num_key_value_heads": 4, "num_experts_per_tok": 2},
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {"first_k_dense_replace": 1, "num_key_value_heads": 4}),
    "ernie4_5": ("Ernie4_5ForCausalLM", {}),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {}),
    "exaone4": ("Exaone4ForCausalLM", {}),
    "falcon": ("FalconForCausalLM", {}),
    "falcon-new": ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_mamba": ("FalconMambaForCausalLM", {"state_size": 8}),
    "gemma": ("GemmaForCausalLM", {}),
    "gemma2": ("Gemma2ForCausalLM", {}),
    "gemma3_text": ("Gemma3ForCausalLM", {}),
    "glm": ("GlmForCausalLM", {}),
    "glm4": ("Glm4ForCausalLM", {}),
    "glm4_moe": ("Glm4MoeForCausalLM", {"first_k_dense_replace": 1}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2-classifier": ("GPT2ForSequenceClassification", {}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "gpt_oss": ("GptOssForCausalLM", {}),
    "gptj": ("GPTJForCausalLM", {"rotary_dim": 8}),
    "granite": ("GraniteForCausalLM", {}),
    "granitemoe": ("GraniteMoeForCausalLM", {}),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        {**_MAMBA, "layer_types": ["mamba", "attention", "mamba", "attention"]},
    ),
    "helium": ("HeliumForCausalLM", {}),
    "jamba": (
        "JambaForCausalLM",
        {
            **{"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
            **{"attn_layer_period": 2, "attn_layer_offset": 1},
        },
    ),
    "lfm2": ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}),
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-classifier": ("LlamaForSequenceClassification", {}),
    "llama4_text": ("Llama4ForCausalLM", {"intermediate_size_mlp": 48, "attention_chunk_size": 8}),
    "mamba": ("MambaForCausalLM", {"state_size": 8}),
    "mamba2": ("Mamba2ForCausalLM", {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {"rotary_dim": 8}),
    "mistral": ("MistralForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {}),
    "mpt": ("MptForCausalLM", {}),
    "nemotron": ("NemotronForCausalLM", {"num_key_value_heads": 2}),
    "olmo": ("OlmoForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3ForCausalLM", {}),
    "olmoe": ("OlmoeForCausalLM", {}),
    "opt": ("OPTForCausalLM", {"word_embed_proj_dim": 32}),
    "persimmon": ("PersimmonForCausalLM", {}),
    "phi": ("PhiForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {}),
    "phimoe": ("PhimoeForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {}),
    "qwen3_next": ("Qwen3NextForCausalLM", _LINEAR),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", _LINEAR),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", {"lru_width": 32, "attention_window_size": 8}),
    "rwkv": ("RwkvForCausalLM", {"attention_hidden_size": 32}),
    "seed_oss": ("SeedOssForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "solar": ("LlamaForCausalLM", {"architectures": ["SolarForCausalLM"]}),
    "stablelm": ("StableLmForCausalLM", {}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    # encoders
    "bert": ("BertModel", {}),
    "bert-masked-lm": ("BertForMaskedLM", {}),
    "bert-classifier": ("BertForSequenceClassification", {}),
    "bert-multiple-choice": ("BertForMultipleChoice", {}),
    "bert-tokens": ("BertForTokenClassification", {}),
    "deberta_v2": ("DebertaV2ForSequenceClassification", {}),
    "distilbert": ("DistilBertModel", {}),
    "distilbert-masked-lm": ("DistilBertForMaskedLM", {}),
    "distilbert-classifier": ("DistilBertForSequenceClassification", {}),
    "distilbert-tokens": ("DistilBertForTokenClassification", {}),
    "electra": ("ElectraForMaskedLM", {"embedding_size": 32}),
    "modernbert": ("ModernBertForMaskedLM", {"cls_token_id": 1, "sep_token_id": 2}),
    "roberta": ("RobertaModel", {}),
    "roberta-masked-lm": ("RobertaForMaskedLM", {}),
    "roberta-classifier": ("RobertaForSequenceClassification", {}),
    "roberta-tokens": ("RobertaForTokenClassification", {}),
    "vit": ("ViTForImageClassification", {}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", {}),
    # encoders with decoders
    "bart": ("BartForConditionalGeneration", {}),
    "t5": ("T5ForConditionalGeneration", {"num_decoder_layers": LAYERS}),
    "t5-untied": (
        "T5ForConditionalGeneration",
        {"num_decoder_layers": LAYERS, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
    ),
    # pictures and text
    "clip": (
        "CLIPModel",
        {
            "text_config": _TEXT,
            "vision_config": _VISION,
            "projection_dim": 16,
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {"text_config": _TEXT, "vision_config": _VISION, "mm_tokens_per_image": 4, "image_token_index": 5},
    ),
    "idefics3": (
        "Idefics3ForConditionalGeneration",
        {"text_config": {"model_type": "llama", **_TEXT}, "vision_config": _VISION, "image_token_id": 5},
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        {
            "text_config": {
                **_TEXT,
                **{"intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1},
                "attention_chunk_size": 8,
            },
            "vision_config": {**_VISION, "intermediate_size": 128, "vision_output_dim": 32}
            | {"projector_input_dim": 32, "projector_output_dim": 32},
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "clip_vision_model", **_VISION},
            "image_token_index": 5,
        },
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {"model_type": "mistral", **_TEXT},
            "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 8},
            "image_token_index": 5,
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {
            **{"text_config": {**_TEXT, **_ROTARY}, **_QWEN_IDS},
            "vision_config": {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            **{"text_config": {**_TEXT, **_ROTARY}, **_QWEN_IDS},
            "vision_config": {**_QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
            | {"fullatt_block_indexes": [1], "window_size": 16},
        },
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {"text_config": {**_TEXT, **_ROTARY}, "vision_config": _QWEN3_VISION, **_QWEN_IDS},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        {"text_config": {**_TEXT, **_ROTARY, **_EXPERTS}, "vision_config": _QWEN3_VISION, **_QWEN_IDS},
    ),
}


def tiny_config(name: str, **overrides: Any) -> Any:
    """The config of a tiny model."""
    class_name, own = TRANSFORMERS[name]
    kind = getattr(transformers, class_name).config_class
    with_defaults = kind().to_dict()
    small = {k: v for k, v in SMALL.items() if type(with_defaults.get(k)) is int}
    listed = {k: with_defaults[k][:LAYERS] for k in ("layer_types", "mlp_layer_types") if with_defaults.get(k)}
    return kind(**{**small, **listed, **own, **overrides})


def tiny_model(name: str, seed: int = 0, **overrides: Any) -> Any:
    """A model with random weights that differ by ``seed``; norms are near 1."""
    config = tiny_config(name, **overrides)
    model = getattr(transformers, TRANSFORMERS[name][0])(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.numel() and tensor.ndim and not tensor.isinf().any():
                tensor += torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.05
    return model


def save_tiny(name: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A tiny model in ``folder``, as transformers saves it."""
    tiny_model(name, seed, **overrides).save_pretrained(folder)
    return folder
