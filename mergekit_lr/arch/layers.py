"""Where a tensor sits in a model, read off its name: no table of architectures is needed for that."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LAYER = re.compile(r"^(.*?)\.(\d+)\.")


def layer_of(name: str) -> tuple[str, int] | None:
    """(stack, index) of a tensor: ``model.layers.7.mlp.experts.3.w1.weight`` -> ``("model.layers", 7)``."""
    m = _LAYER.match(name)
    return (m.group(1), int(m.group(2))) if m else None


def positions(names: Iterable[str]) -> dict[str, float]:
    """Place of every tensor in 0..1, by which gradients of parameters are read.

    Layer i of n in its stack is at ``i / (n - 1)``; a stack of one layer is at 1; what lies outside the stacks
    (embeddings, final norm, head) is at 0. This is mergekit's convention.
    """
    found = {name: layer_of(name) for name in names}
    count: dict[str, int] = {}
    for place in found.values():
        if place:
            count[place[0]] = max(count.get(place[0], 0), place[1] + 1)
    return {name: _place(place, count) for name, place in found.items()}


def _place(place: tuple[str, int] | None, count: dict[str, int]) -> float:
    if place is None:
        return 0.0
    n = count[place[0]]
    return place[1] / (n - 1) if n > 1 else 1.0
