# Copyright 2026 The mergekit_lr authors. Licensed under the Apache License, Version 2.0.
"""Mixtral and Qwen3-MoE with fewer experts than router rows: several rows lead to one expert, and their gates add up.

Load with ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. ``config.expert_map`` gives, for
each layer by its number, the stored expert of each router row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeForCausalLM


def _shrink(experts: Any, rows: list[int]) -> None:
    """Hold as many experts as the map names, and remember which row leads to which."""
    experts.rows, experts.num_experts = rows, max(rows) + 1
    for name in ("gate_up_proj", "down_proj"):
        old = getattr(experts, name)
        size = (experts.num_experts, *old.shape[1:])
        setattr(experts, name, nn.Parameter(torch.empty(size, dtype=old.dtype, device=old.device)))


def _stored(experts: Any, top_k_index: Any) -> Any:
    return torch.tensor(experts.rows, device=top_k_index.device)[top_k_index]


class TiedMixtralExperts(MixtralExperts):  # type: ignore[misc]
    def __init__(self, config: Any, rows: list[int]) -> None:
        super().__init__(config)
        _shrink(self, rows)

    def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        return super().forward(hidden_states, _stored(self, top_k_index), top_k_weights)


class TiedQwen3MoeExperts(Qwen3MoeExperts):  # type: ignore[misc]
    def __init__(self, config: Any, rows: list[int]) -> None:
        super().__init__(config)
        _shrink(self, rows)

    def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        return super().forward(hidden_states, _stored(self, top_k_index), top_k_weights)


class TiedMixtralForCausalLM(MixtralForCausalLM):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for index, rows in config.expert_map.items():
            self.model.layers[int(index)].mlp.experts = TiedMixtralExperts(config, rows)


class TiedQwen3MoeForCausalLM(Qwen3MoeForCausalLM):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for index, rows in config.expert_map.items():
            self.model.layers[int(index)].mlp.experts = TiedQwen3MoeExperts(config, rows)
