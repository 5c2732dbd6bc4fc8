"""``adapter_config.json`` and tensor names as PEFT reads them. Plain data; torch is not needed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit_lr.checkpoint.model import Checkpoint

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings")
_TASKS = {
    "CausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
    "ConditionalGeneration": "SEQ_2_SEQ_LM",
}


@dataclass(frozen=True)
class Described:
    """An adapter: rank by module path (factors hold the scale, so alpha equals the rank), modules saved whole, and
    what its configuration says beside that."""

    ranks: Mapping[str, int]
    saved: Collection[str] = ()
    biases: bool = False
    fan_in_fan_out: bool = False
    dora: bool = False
    tied: bool = False
    base: str = ""
    architectures: tuple[str, ...] = field(default=())


def factor_names(path: str, *, embedding: bool) -> tuple[str, str]:
    """Names of A and B in ``adapter_model.safetensors``."""
    if embedding:
        return f"{PREFIX}{path}.lora_embedding_A", f"{PREFIX}{path}.lora_embedding_B"
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


def adapter_config(adapter: Described, weights: Collection[str] = ()) -> dict[str, Any]:
    """The configuration; scale 1 everywhere (``lora_alpha`` is the rank). ``weights``: names of the base's tensors, by
    which targets are named by their last part where that says the same.

    PEFT matches a target or saved module by the end of its path, so whole paths are always right, and short ones
    only where every module that ends so is meant.
    """
    counts = Counter(adapter.ranks.values())
    rank = max(counts, key=lambda r: (counts[r], r)) if counts else 1
    patterns = {p: r for p, r in sorted(adapter.ranks.items()) if r != rank}
    task = next((t for a in adapter.architectures for end, t in _TASKS.items() if end in a), None)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": adapter.base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": _targets(sorted(adapter.ranks), weights),
        "modules_to_save": sorted(adapter.saved) or None,
        "bias": "all" if adapter.biases else "none",
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "use_dora": adapter.dora,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        **({"ensure_weight_tying": True} if adapter.tied else {}),
    }


def config_bytes(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _targets(paths: list[str], weights: Collection[str]) -> list[str]:
    chosen = set(paths)
    modules = [w.removesuffix(".weight") for w in weights if w.endswith(".weight")]
    ends = {p.rpartition(".")[2] for p in paths}
    short = {e for e in ends if all(m in chosen for m in modules if m.rpartition(".")[2] == e)} if modules else set()
    return sorted(short | {p for p in paths if p.rpartition(".")[2] not in short})


def architectures_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    found = (checkpoint.config or {}).get("architectures") or []
    return tuple(str(a) for a in found) if isinstance(found, list) else ()


def is_embedding(weight: str) -> bool:
    """Whether a weight's name is that of a token embedding (rows are tokens)."""
    return weight.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS


def is_head(weight: str) -> bool:
    """Whether a weight's name is that of an output head."""
    return weight.removesuffix(".weight").rpartition(".")[2] in ("lm_head", "embed_out", "score", "classifier")


def saved_name(stored: str, pairs: Collection[str]) -> str:
    """The adapter's name of a tensor saved whole, whose name was ``stored`` in an adapter or a base.

    A bias of a module that has a pair (by weight in ``pairs``) lies inside PEFT's wrapper.
    """
    plain = re.sub(r"\.modules_to_save(\.default)?\.", ".", stored.removeprefix(PREFIX)).replace(".base_layer.", ".")
    path, _, kind = plain.rpartition(".")
    inner = ".base_layer" if kind == "bias" and f"{path}.weight" in pairs else ""
    return f"{PREFIX}{path}{inner}.{kind}"
