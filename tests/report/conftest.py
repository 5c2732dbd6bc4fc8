"""Tiny models of several families, as transformers writes them, built once for this folder's tests."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**COMMON, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {**COMMON, "head_dim": 16, "tie_word_embeddings": False}),
    "gemma2": ("Gemma2", {**COMMON, "head_dim": 8}),
    "mixtral": ("Mixtral", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {**COMMON, **MOE, "head_dim": 8}),
    "olmoe": ("Olmoe", {**COMMON, "num_experts": 4, "num_experts_per_tok": 2}),
    "starcoder2": ("Starcoder2", COMMON),
    "gpt_neox": ("GPTNeoX", COMMON),
    "gpt2": ("GPT2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}),
}  # fmt: skip


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models, one by family; not to be changed."""
    root = tmp_path_factory.mktemp("families")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        for family, (name, settings) in FAMILIES.items():
            torch.manual_seed(1)
            config = getattr(transformers, f"{name}Config")(**settings)
            cls = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
            cls(config).save_pretrained(root / family)
            for file in (root / family).iterdir():
                file.chmod(0o644)
        transformers.utils.logging.enable_progress_bar()
    return root


@pytest.fixture
def model(built: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy that may be changed: ``model(family, key=value...)`` also edits its config."""

    def copy(family: str = "llama", **changes: Any) -> Path:
        target = tmp_path / family
        shutil.copytree(built / family, target)
        edit_config(target, **changes)
        return target

    return copy


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
