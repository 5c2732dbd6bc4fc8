"""How a layer's mixture of experts, as the files hold it, becomes modules of transformers 5.

What a family calls things there is said by `mergekit_lr.arch.moe_families.Memory`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from mergekit_lr.arch.moe_families import Family
from mergekit_lr.errors import CheckpointError

Blocks = tuple[tuple[str, ...], ...]
"""How a tensor in memory is put together from tensors on disk: a stack of concatenations along the rows."""


def in_memory(family: Family | None, names: Iterable[str]) -> dict[str, str | Blocks]:
    """What each tensor of a layer in memory is made of.

    Args:
        family: None, or without a `Memory`, for a layer whose names are the same in memory.
        names: names on disk, relative to the layer.

    Returns:
        name in memory -> the one name on disk that it is, or the `Blocks` that are stacked.

    Raises:
        CheckpointError: experts are missing.
    """
    if family is None or family.memory is None:
        return {name: name for name in names}
    memory, found = family.memory, _own(family)
    plain: dict[str, str | Blocks] = {}
    parts: dict[tuple[int, str], str] = {}
    for name in names:
        inside = name.removeprefix(family.block + ".") if name.startswith(family.block + ".") else None
        if inside is None:
            plain[name] = name
        elif match := next((m for pattern in found if (m := pattern.fullmatch(inside))), None):
            parts[int(match["e"]), found[match.re]] = name
        else:
            plain[f"{memory.block}.{dict(memory.renamed).get(inside, inside)}"] = name
    if parts:
        count = 1 + max(e for e, _ in parts)
        absent = [(e, m) for e in range(count) for m in ("gate", "up", "down") if (e, m) not in parts]
        if absent:
            what = f"expert {absent[0][0]} of {count} has no {absent[0][1]}"
            raise CheckpointError(f"{what} projection", where=min(parts.values()))
        experts = f"{memory.block}.experts"
        plain[f"{experts}.gate_up_proj"] = tuple((parts[e, "gate"], parts[e, "up"]) for e in range(count))
        plain[f"{experts}.down_proj"] = tuple((parts[e, "down"],) for e in range(count))
    return plain


def _own(family: Family) -> dict[re.Pattern[str], str]:
    """Where each expert has tensors of its own: a pattern of their names, and which matrix it is."""
    return {
        re.compile("(?P<e>\\d+)".join(map(re.escape, slot.name.split("{e}")))): slot.holds[0]
        for slot in family.slots
        if not slot.fused and not slot.bias
    }


def experts_prefix(family: Family, layer: str) -> str:
    """What statistics of a layer's mixture are filed under: ``model.layers.3.mlp.experts``."""
    return f"{layer}.{family.block}.experts"
