"""Families of mixtures of experts as data: what their checkpoints call things, and how expert weights are stored.

To add a family, add a `Family` to `FAMILIES`, or hand one to `register_family` from a plug-in: nothing else in the
package knows a family by name. Names are those on disk, not those in memory: transformers 5 fuses experts when it
loads a model and takes them apart when it saves one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names of the expert count. transformers 5 writes ``num_local_experts`` where it read ``num_experts``."""

TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "top_k_experts")
"""Names of the number of experts that a token is sent to."""

SHARED_KEYS = ("n_shared_experts", "moe_num_shared_experts")
"""Names of the number of shared experts where their width is that number times the width of an expert."""


class Order(StrEnum):
    """How gate and up share one tensor."""

    HALVES = "halves"  # all of gate, then all of up
    INTERLEAVED = "interleaved"  # gate, up, gate, up ...


@dataclass(frozen=True, slots=True)
class Slot:
    """One kind of tensor that experts are stored in.

    ``name``: within the block; ``{e}`` stands for the expert where each has tensors of its own, else the first axis
    counts experts. ``holds``: the matrices in it, of ``gate``, ``up``, ``down``, in order. A matrix is ``[out, in]``
    unless ``transposed``, and two share the axis of outputs. ``bias``: vectors instead of matrices.
    """

    name: str
    holds: tuple[str, ...]
    order: Order = Order.HALVES
    transposed: bool = False
    bias: bool = False

    @property
    def fused(self) -> bool:
        """Whether one tensor holds all experts."""
        return "{e}" not in self.name


@dataclass(frozen=True, slots=True)
class Rows:
    """A tensor of the router with one entry for each expert along ``axis``."""

    name: str
    axis: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """Where transformers 5 holds a layer's mixture, which is what running a layer takes.

    All experts are in ``experts.gate_up_proj`` and ``experts.down_proj`` there, whatever the files hold. ``block``: the
    mixture, below the layer; ``router``: the router's module, below the block; ``renamed``: pairs (on disk, in memory)
    of other names below the block.
    """

    block: str = "mlp"
    router: str = "gate"
    renamed: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Family:
    """How one family of models stores and configures its experts.

    ``model_types``: of config.json (of its ``text_config`` where there is one). ``block``: the part of a layer that
    holds router and experts. ``router``: its matrix ``[experts, hidden]``; ``router_rows``: what else has an entry
    for each expert, where present. ``slots``: how experts are stored. ``beside``: parts of the block that every token
    passes, never touched. ``width_key``: names of an expert's width. ``shared_multiple``: shared experts are a
    multiple of the experts' width. ``shares_width``: something else in the model has the experts' width too, so
    the width cannot change. ``grouped``: the router may first choose among ``n_group`` groups of experts.
    ``group_least``: experts that a group needs. ``activation``: ``gated`` is ``act(gate) * up`` with the config's
    ``hidden_act``; ``clamped`` is GPT-OSS's ``(up + 1) * gate * sigmoid(1.702 gate)`` with both clamped.
    ``gate_on_input``: the router's gate multiplies an expert's input, not its output. ``memory``: None where layers
    cannot be run one by one, so that nothing can be calibrated.
    """

    name: str
    model_types: tuple[str, ...]
    block: str
    router: str
    slots: tuple[Slot, ...]
    width_key: tuple[str, ...]
    router_rows: tuple[Rows, ...] = ()
    beside: tuple[str, ...] = ()
    shared_multiple: bool = False
    shares_width: str = ""
    grouped: bool = False
    group_least: int = 1
    activation: str = "gated"
    gate_on_input: bool = False
    memory: Memory | None = None
    notes: str = field(default="", compare=False)


def _numbered(gate: str, up: str, down: str) -> tuple[Slot, ...]:
    names = (("gate", gate), ("up", up), ("down", down))
    return tuple(Slot(f"experts.{{e}}.{name}.weight", (matrix,)) for matrix, name in names)


_W123 = _numbered("w1", "w3", "w2")
_PROJECTIONS = _numbered("gate_proj", "up_proj", "down_proj")
_CORRECTION = (Rows("gate.e_score_correction_bias"),)
_OWN_WIDTH = ("moe_intermediate_size",)
_ONE_WIDTH = ("intermediate_size",)
_PLAIN = Memory()

FAMILIES: list[Family] = [
    Family("Mixtral", ("mixtral",), "block_sparse_moe", "gate.weight", _W123, _ONE_WIDTH, memory=_PLAIN),
    Family(
        "Phi-MoE",
        ("phimoe",),
        "block_sparse_moe",
        "gate.weight",
        _W123,
        _ONE_WIDTH,
        memory=Memory(router="router", renamed=(("gate.weight", "router.weight"),)),
        notes="sparsemixer: the two gates are not a softmax over the chosen logits",
    ),
    Family(
        "MiniMax-M2",
        ("minimax_m2",),
        "block_sparse_moe",
        "gate.weight",
        _W123,
        _ONE_WIDTH,
        router_rows=(Rows("e_score_correction_bias"),),
        memory=_PLAIN,
    ),
    Family(
        "Qwen2-MoE",
        ("qwen2_moe",),
        "mlp",
        "gate.weight",
        _PROJECTIONS,
        _OWN_WIDTH,
        beside=("shared_expert.", "shared_expert_gate."),
        memory=_PLAIN,
    ),
    Family("Qwen3-MoE", ("qwen3_moe",), "mlp", "gate.weight", _PROJECTIONS, _OWN_WIDTH, memory=_PLAIN),
    Family(
        "Qwen3-Next",
        ("qwen3_next",),
        "mlp",
        "gate.weight",
        _PROJECTIONS,
        _OWN_WIDTH,
        beside=("shared_expert.", "shared_expert_gate."),
    ),
    Family("OLMoE", ("olmoe",), "mlp", "gate.weight", _PROJECTIONS, _ONE_WIDTH, memory=_PLAIN),
    Family(
        "DeepSeek-V2",
        ("deepseek_v2",),
        "mlp",
        "gate.weight",
        _PROJECTIONS,
        _OWN_WIDTH,
        beside=("shared_experts.",),
        shared_multiple=True,
        grouped=True,
        memory=_PLAIN,
    ),
    Family(
        "DeepSeek-V3",
        ("deepseek_v3", "kimi_k2"),
        "mlp",
        "gate.weight",
        _PROJECTIONS,
        _OWN_WIDTH,
        router_rows=_CORRECTION,
        beside=("shared_experts.",),
        shared_multiple=True,
        grouped=True,
        group_least=2,
        memory=_PLAIN,
    ),
    Family(
        "GLM-4.5-MoE",
        ("glm4_moe",),
        "mlp",
        "gate.weight",
        _PROJECTIONS,
        _OWN_WIDTH,
        router_rows=_CORRECTION,
        beside=("shared_experts.",),
        shared_multiple=True,
        grouped=True,
        group_least=2,
        memory=_PLAIN,
    ),
    Family(
        "ERNIE-4.5-MoE",
        ("ernie4_5_moe",),
        "mlp",
        "gate.weight",
        _PROJECTIONS,
        _OWN_WIDTH,
        router_rows=(Rows("moe_statics.e_score_correction_bias", axis=1),),
        beside=("shared_experts.",),
        shared_multiple=True,
        memory=Memory(renamed=(("moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"),)),
    ),
    Family(
        "GPT-OSS",
        ("gpt_oss",),
        "mlp",
        "router.weight",
        (
            Slot("experts.gate_up_proj", ("gate", "up"), Order.INTERLEAVED, transposed=True),
            Slot("experts.gate_up_proj_bias", ("gate", "up"), Order.INTERLEAVED, bias=True),
            Slot("experts.down_proj", ("down",), transposed=True),
            Slot("experts.down_proj_bias", ("down",), bias=True),
        ),
        _ONE_WIDTH,
        router_rows=(Rows("router.bias"),),
        activation="clamped",
        memory=Memory(router="router"),
    ),
    Family(
        "Llama-4",
        ("llama4_text",),
        "feed_forward",
        "router.weight",
        (
            Slot("experts.gate_up_proj", ("gate", "up"), transposed=True),
            Slot("experts.down_proj", ("down",), transposed=True),
        ),
        _ONE_WIDTH,
        beside=("shared_expert.",),
        shares_width="the shared expert has the same width",
        gate_on_input=True,
        memory=Memory("feed_forward", "router"),
    ),
    Family(
        "Granite-MoE",
        ("granitemoe", "granitemoeshared"),
        "block_sparse_moe",
        "router.layer.weight",
        (Slot("input_linear.weight", ("gate", "up")), Slot("output_linear.weight", ("down",))),
        _ONE_WIDTH,
        memory=Memory(
            "block_sparse_moe",
            "router",
            (
                ("input_linear.weight", "experts.gate_up_proj"),
                ("output_linear.weight", "experts.down_proj"),
                ("router.layer.weight", "router.weight"),
            ),
        ),
    ),
]
"""Every family that is known. The names, shapes and traps were checked against models that transformers saved."""


def register_family(family: Family) -> None:
    """Make a family of a plug-in known; one with the same name is replaced."""
    FAMILIES[:] = [f for f in FAMILIES if f.name != family.name] + [family]


def find_family(model_type: str) -> Family | None:
    """The family of a ``model_type``; the latest registered one where several claim it."""
    return next((f for f in reversed(FAMILIES) if model_type in f.model_types), None)


def known_families() -> str:
    """Their names and model types, for messages."""
    return ", ".join(f"{f.name} ({', '.join(f.model_types)})" for f in FAMILIES)
