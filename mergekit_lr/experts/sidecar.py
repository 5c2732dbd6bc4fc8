"""What a stock loader cannot express, as files beside the weights: a map of router rows to experts, and a model class.

Used for tied routers and for layers with different numbers of experts. Every router row is kept; the map says which
stored expert a row leads to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from mergekit_lr.arch.moe import MoeLayer
from mergekit_lr.errors import CheckpointError
from mergekit_lr.experts.decision import LayerDecision

MODULE = "modeling_tied_experts"
MAP = "expert_map.json"
CLASSES = {"mixtral": "TiedMixtralForCausalLM", "qwen3_moe": "TiedQwen3MoeForCausalLM"}
"""model_type -> the class in `MODULE` that loads it."""


def expert_map(layers: Sequence[MoeLayer], decisions: Mapping[str, LayerDecision]) -> dict[str, list[int]]:
    """Layer number -> for each router row, the stored expert that it leads to."""
    return {
        str(layer.index): decisions[layer.block].partition.new_index(layer.experts)
        for layer in layers
        if not layer.extra
    }


def tied_config(config: Mapping[str, Any], mapping: Mapping[str, list[int]], reference: str) -> dict[str, Any]:
    """``config`` that names the class and holds the map. The expert count stays: it is the router's.

    Raises:
        CheckpointError: there is no class for this family.
    """
    name = CLASSES.get(str(config.get("model_type")))
    if name is None:
        raise CheckpointError(
            f"there is no model class with tied experts for {config.get('model_type')!r}",
            where=reference,
            why=f"there is one for {', '.join(CLASSES)}",
            fix="use router: mean or select, which stock loaders read",
        )
    auto = {"AutoModelForCausalLM": f"{MODULE}.{name}"}
    return {**config, "architectures": [name], "auto_map": auto, "expert_map": dict(mapping)}


def sidecar_files(mapping: Mapping[str, list[int]]) -> dict[str, bytes]:
    """The map for other programs, and the model class for transformers."""
    source = files("mergekit_lr.experts").joinpath(f"{MODULE}.py").read_bytes()
    text = json.dumps({"format": 1, "layers": dict(mapping)}, indent=1) + "\n"
    return {MAP: text.encode(), f"{MODULE}.py": source}
