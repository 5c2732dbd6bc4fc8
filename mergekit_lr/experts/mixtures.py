"""Mixtures that can be built from dense models: what each is called, how it is configured, where its experts go.

Names are those of the families' checkpoints on the Hub, one tensor for each expert's matrix. A dense model gives an
expert its gated MLP (``gate_proj``, ``up_proj``, ``down_proj``); everything else comes from one model, the base.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Config = dict[str, Any]
GateMode = Literal["hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random"]
RANDOM = ("random", "uniform_random")
Prompts = tuple[tuple[str, ...], tuple[str, ...]]
"""Positive and negative prompts of one expert."""

MLP = re.compile(r"^model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight$")
MATRICES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Mixture:
    """One kind of output.

    ``takes``: model types that it can be built from. ``block``, ``router``: names below the layer; ``matrices``: what
    an expert's three matrices are called; ``shared``: where a shared expert goes, empty if there is none, and
    ``shared_gate`` its gate. ``most_shared`` and ``least_shared``: how many shared experts it has. ``biases``: the
    attention's projections have biases, zero where the base has none.
    """

    name: str
    takes: tuple[str, ...]
    configure: Callable[[Config, int, int, int], Config]
    block: str = "mlp"
    router: str = "gate.weight"
    matrices: tuple[str, str, str] = MATRICES
    shared: str = ""
    shared_gate: str = ""
    least_shared: int = 0
    most_shared: int = 0
    biases: bool = False
    warning: str = ""

    def expert(self, layer: int, expert: int, matrix: str) -> str:
        """Name of one expert's matrix ``gate_proj``, ``up_proj`` or ``down_proj``."""
        own = self.matrices[MATRICES.index(matrix)]
        return f"model.layers.{layer}.{self.block}.experts.{expert}.{own}.weight"

    def shared_expert(self, layer: int, matrix: str) -> str:
        return f"model.layers.{layer}.{self.block}.{self.shared}.{matrix}.weight"

    def gate(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.block}.{self.router}"

    def gate_of_shared(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.block}.{self.shared_gate}"


_LLAMA_ONLY = ("attention_bias", "mlp_bias", "pretraining_tp", "use_sliding_window", "max_window_layers", "layer_types")


def _common(config: Mapping[str, Any], model_type: str, architecture: str) -> Config:
    kept = {k: v for k, v in config.items() if k not in ("auto_map", "quantization_config")}
    return kept | {"model_type": model_type, "architectures": [architecture]}


def _mixtral(config: Config, experts: int, shared: int, per_token: int) -> Config:
    new = {k: v for k, v in _common(config, "mixtral", "MixtralForCausalLM").items() if k not in _LLAMA_ONLY}
    return new | {"num_local_experts": experts, "num_experts_per_tok": per_token, "sliding_window": None}


def _deepseek(config: Config, experts: int, shared: int, per_token: int) -> Config:
    return _common(config, "deepseek", "DeepseekForCausalLM") | {
        **{"n_routed_experts": experts, "n_shared_experts": shared or None, "num_experts_per_tok": per_token},
        **{"first_k_dense_replace": 0, "moe_layer_freq": 1, "scoring_func": "softmax", "norm_topk_prob": True},
        "moe_intermediate_size": config.get("intermediate_size"),
    }


def _qwen2(config: Config, experts: int, shared: int, per_token: int) -> Config:
    new = {k: v for k, v in _common(config, "qwen2_moe", "Qwen2MoeForCausalLM").items() if k not in _LLAMA_ONLY}
    width = config.get("intermediate_size")
    return new | {
        **{"num_experts": experts, "num_experts_per_tok": per_token, "norm_topk_prob": True},
        **{"decoder_sparse_step": 1, "mlp_only_layers": [], "sliding_window": None, "use_sliding_window": False},
        **{"moe_intermediate_size": width, "shared_expert_intermediate_size": width, "qkv_bias": True},
    }


def _qwen3(config: Config, experts: int, shared: int, per_token: int) -> Config:
    new = _common(config, "qwen3_moe", "Qwen3MoeForCausalLM")
    return {k: v for k, v in new.items() if k not in ("layer_types", "max_window_layers")} | {
        **{"num_experts": experts, "num_experts_per_tok": per_token, "norm_topk_prob": True},
        **{"decoder_sparse_step": 1, "mlp_only_layers": [], "sliding_window": None, "use_sliding_window": False},
        "moe_intermediate_size": config.get("intermediate_size"),
    }


MIXTURES: tuple[Mixture, ...] = (
    Mixture(
        "mixtral",
        ("llama", "mistral"),
        _mixtral,
        block="block_sparse_moe",
        matrices=("w1", "w3", "w2"),
    ),
    Mixture(
        "deepseek",
        ("llama", "mistral"),
        _deepseek,
        shared="shared_experts",
        most_shared=1,
        warning="transformers has no code of its own for model type deepseek: "
        "the output loads where DeepseekForCausalLM is known (vLLM, or DeepSeek's own files)",
    ),
    Mixture(
        "qwen2_moe",
        ("llama", "mistral", "qwen2"),
        _qwen2,
        shared="shared_expert",
        shared_gate="shared_expert_gate.weight",
        least_shared=1,
        most_shared=1,
        biases=True,
    ),
    Mixture("qwen3_moe", ("qwen3",), _qwen3),
)
"""In the order in which one is chosen where the recipe names none."""

NAMES = {"mixtral": "mixtral", "deepseek": "deepseek", "deepseekmoe": "deepseek", "qwenmoe": "qwen2_moe"}
NAMES |= {"qwen": "qwen2_moe", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "qwen3": "qwen3_moe"}
"""What recipes call them, letters and digits only ("Qwen MoE", "DeepSeek MoE")."""


def mixture_named(word: str) -> Mixture | None:
    """The mixture that a recipe means; None if there is none of that name."""
    meant = NAMES.get(re.sub(r"[^a-z0-9]", "", word.lower()))
    return next((m for m in MIXTURES if m.name == meant), None)


def fitting(model_type: str, shared: int) -> list[Mixture]:
    """Mixtures that can be built from models of a type with so many shared experts."""
    return [m for m in MIXTURES if model_type in m.takes and m.least_shared <= shared <= m.most_shared]
