"""Output embeddings that are the input embeddings, and checkpoints that disagree about it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

EMBEDDINGS = (
    "model.embed_tokens.weight",
    "embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "model.text_model.embed_tokens.weight",
    "model.tok_embeddings.weight",
    "transformer.wte.weight",
    "gpt_neox.embed_in.weight",
    "model.decoder.embed_tokens.weight",
    "shared.weight",
)
HEADS = ("lm_head.weight", "language_model.lm_head.weight", "embed_out.weight")


def config_ties(config: dict[str, Any] | None) -> bool:
    """Whether config.json says that head and embeddings are one tensor."""
    if config is None:
        return False
    text = config.get("text_config")
    nested = text if isinstance(text, dict) else {}
    return bool(config.get("tie_word_embeddings", nested.get("tie_word_embeddings", False)))


def tied_source(name: str, present: Collection[str]) -> str | None:
    """The embedding that stands for a head ``name`` which a tied checkpoint does not store."""
    if name not in HEADS:
        return None
    found = [e for e in EMBEDDINGS if e in present]
    return found[0] if len(found) == 1 else None
