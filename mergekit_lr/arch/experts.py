"""Where mixtures of experts keep their routers and experts: on disk, and in memory under transformers 5.

transformers 5 holds the experts of a layer in two tensors, ``experts.gate_up_proj`` and ``experts.down_proj``,
whatever the files hold. A family says how the two views of one layer correspond, which is what running a layer
takes; `mergekit_lr.arch.moe_families` says what it takes to write fewer experts (a test compares the two). To add a
family, add a `Family` to `FAMILIES`: its ``model_type`` and the names below ``model.layers.N.`` on disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from mergekit_lr.errors import CheckpointError

_NUMBER = re.compile(r"\.experts\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Family:
    """One layout. Names are relative to the decoder layer.

    ``block``: the mixture on disk; ``memory``: the same in memory; ``router``: the router's module in memory, below
    the block; ``gate``, ``up``, ``down``: what an expert's matrices are called below ``<block>.experts.<e>.``, empty
    where the experts are fused on disk; ``renamed``: pairs (on disk, in memory) of names below the block.
    """

    model_types: tuple[str, ...]
    block: str = "mlp"
    memory: str = "mlp"
    router: str = "gate"
    gate: str = ""
    up: str = ""
    down: str = ""
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def fused(self) -> bool:
        """One tensor on disk holds all experts of a layer."""
        return not self.gate


_MIXTRAL = Family(
    ("mixtral", "minimax_m2"), block="block_sparse_moe", gate="w1.weight", up="w3.weight", down="w2.weight"
)
_QWEN = Family(
    ("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe"),
    gate="gate_proj.weight",
    up="up_proj.weight",
    down="down_proj.weight",
)

FAMILIES: tuple[Family, ...] = (
    _MIXTRAL,
    replace(_MIXTRAL, model_types=("phimoe",), router="router", renamed=(("gate.weight", "router.weight"),)),
    _QWEN,
    replace(
        _QWEN,
        model_types=("ernie4_5_moe",),
        renamed=(("moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"),),
    ),
    Family(("gpt_oss",), router="router"),
    Family(("llama4_text",), block="feed_forward", memory="feed_forward", router="router"),
    Family(
        ("granitemoe", "granitemoeshared"),
        block="block_sparse_moe",
        memory="block_sparse_moe",
        router="router",
        renamed=(
            ("input_linear.weight", "experts.gate_up_proj"),
            ("output_linear.weight", "experts.down_proj"),
            ("router.layer.weight", "router.weight"),
        ),
    ),
)
"""Families whose mixtures are understood."""


def family_of(model_type: str) -> Family | None:
    """The family of a config's ``model_type``; None if it is none of `FAMILIES`."""
    return next((f for f in FAMILIES if model_type in f.model_types), None)


def known_families() -> str:
    """The ``model_type`` of every known mixture, for messages."""
    return ", ".join(sorted(t for f in FAMILIES for t in f.model_types))


Blocks = tuple[tuple[str, ...], ...]
"""How a tensor in memory is put together from tensors on disk: a stack of concatenations along the rows."""


def in_memory(family: Family | None, names: Iterable[str]) -> dict[str, str | Blocks]:
    """What each tensor of a layer in memory is made of.

    Args:
        names: names on disk, relative to the layer.

    Returns:
        name in memory -> the one name on disk that it is, or the `Blocks` that are stacked.

    Raises:
        CheckpointError: experts are missing.
    """
    plain: dict[str, str | Blocks] = {}
    parts: dict[tuple[int, str], str] = {}
    for name in names:
        if family is None:
            plain[name] = name
            continue
        inside = name.removeprefix(family.block + ".") if name.startswith(family.block + ".") else None
        numbered = _NUMBER.search("." + inside) if inside is not None and not family.fused else None
        if inside is None:
            plain[name] = name
        elif numbered and numbered[2] in (family.gate, family.up, family.down):
            parts[int(numbered[1]), numbered[2]] = name
        else:
            plain[f"{family.memory}.{dict(family.renamed).get(inside, inside)}"] = name
    if family is not None and parts:
        count = 1 + max(e for e, _ in parts)
        absent = [(e, m) for e in range(count) for m in (family.gate, family.up, family.down) if (e, m) not in parts]
        if absent:
            raise CheckpointError(f"expert {absent[0][0]} of {count} has no {absent[0][1]}", where=min(parts.values()))
        experts = f"{family.memory}.experts"
        plain[f"{experts}.gate_up_proj"] = tuple((parts[e, family.gate], parts[e, family.up]) for e in range(count))
        plain[f"{experts}.down_proj"] = tuple((parts[e, family.down],) for e in range(count))
    return plain


def experts_prefix(family: Family, layer: str) -> str:
    """What statistics of a layer's mixture are filed under: ``model.layers.3.mlp.experts``."""
    return f"{layer}.{family.block}.experts"
