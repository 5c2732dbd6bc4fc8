"""Permutation specs of plain feed-forward networks, inferred from names and shapes alone.

A perceptron or a chain of convolutions without skips: weights in the natural order of their names, each reading what
the one before it wrote. A one-dimensional tensor belongs to the channels of the weight it is named with (bias) or
follows (BatchNorm). Anything that is not such a chain is refused, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise, permutations

from mergekit_lr.arch.symmetry import Draft, SymmetrySpec
from mergekit_lr.errors import CheckpointError

_NORM = ("weight", "bias", "running_mean", "running_var")
Shapes = Mapping[str, tuple[int, ...]]


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which fc10 comes after fc9."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]


def chain_spec(shapes: Shapes, where: str) -> SymmetrySpec:
    """The spec of a chain: group ``hidden.i`` for what the i-th weight writes, i from 0, all but the last.

    Raises:
        CheckpointError: the tensors are no chain.
    """
    modules = _modules(shapes, where)
    weights = _weights(modules, shapes, where)
    draft = Draft("chain")
    group_of = _writers(draft, shapes, modules, weights, where)
    for m, parts in modules.items():
        if m in weights:
            continue
        group = group_of[_norm_owner(m, modules, weights, shapes, where)]
        for part, name in parts.items():
            _add_vector(draft, name, part, shapes[name], group, where)
    return draft.finish()


def chain_order(shapes: Shapes, where: str) -> list[str]:
    """Names of the weights' modules, in the order in which data goes through them.

    Raises:
        CheckpointError: the tensors are no chain.
    """
    return _weights(_modules(shapes, where), shapes, where)


def _weights(modules: Mapping[str, dict[str, str]], shapes: Shapes, where: str) -> list[str]:
    matrices = [m for m, parts in modules.items() if len(shapes.get(parts.get("weight", ""), ())) > 1]
    found = _in_order(matrices, modules, shapes)
    if len(found) < 2:
        raise _refuse(where, "its weights form no chain, or could form several")
    return found


def _modules(shapes: Shapes, where: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for name in sorted(shapes, key=natural):
        module, _, part = name.rpartition(".")
        if part not in (*_NORM, "num_batches_tracked"):
            raise _refuse(where, f"{name} is neither weight nor bias nor a running statistic")
        found.setdefault(module, {})[part] = name
    return found


def _in_order(found: list[str], modules: Mapping[str, dict[str, str]], shapes: Shapes) -> list[str]:
    """The weights in the only order in which each can read what the one before it writes; [] unless there is just one.

    Weights whose names differ in numbers alone stay in the order of those; convolutions come before matrices.
    """
    stems: dict[str, list[str]] = {}
    for m in found:
        stems.setdefault(re.sub(r"\d+", "#", m), []).append(m)
    if len(stems) > 5:
        return []
    orders = []
    for order in permutations(stems.values()):
        chain = [m for stem in order for m in stem]
        sizes = [shapes[modules[m]["weight"]] for m in chain]
        if all(_reads(b, a) for a, b in pairwise(sizes)):
            orders.append(chain)
    return orders[0] if len(orders) == 1 else []


def _reads(shape: tuple[int, ...], before: tuple[int, ...]) -> bool:
    """Whether a weight can read what another writes: as many channels, flattened maps, or channel by channel."""
    if len(shape) > len(before):
        return False
    depthwise = len(shape) > 2 and shape[1] == 1 and shape[0] == before[0]
    return depthwise or shape[1] == before[0] or (len(shape) == 2 < len(before) and shape[1] % before[0] == 0)


def _writers(
    draft: Draft, shapes: Shapes, modules: Mapping[str, dict[str, str]], weights: list[str], where: str
) -> dict[str, str | None]:
    """Add weights and their biases; the group that each weight writes."""
    group_of: dict[str, str | None] = {}
    before: tuple[str | None, int] = (None, 0)
    for i, m in enumerate(weights):
        name = modules[m]["weight"]
        shape = shapes[name]
        depthwise = i > 0 and len(shape) > 2 and shape[1] == 1 and shape[0] == before[1] != 1
        group = before[0] if depthwise else (f"hidden.{i}" if i < len(weights) - 1 else None)
        reads: str | None = None
        if i > 0 and not depthwise:
            blocks = shape[1] // before[1]
            reads = before[0] if blocks == 1 or before[0] is None else f"{before[0]} * {blocks}"
        draft.add([name], shape, [group, reads, *([None] * (len(shape) - 2))])
        if "bias" in modules[m]:
            _add_vector(draft, modules[m]["bias"], "bias", shapes[modules[m]["bias"]], group, where)
        if len(set(modules[m]) - {"weight", "bias"}):
            raise _refuse(where, f"{m} has both a weight matrix and running statistics")
        group_of[m], before = group, (group, shape[0])
    return group_of


def _add_vector(draft: Draft, name: str, part: str, shape: tuple[int, ...], group: str | None, where: str) -> None:
    if part == "num_batches_tracked":
        draft.add([name], shape, [None] * len(shape))
    elif len(shape) != 1:
        raise _refuse(where, f"{name} has {len(shape)} axes")
    else:
        draft.add([name], shape, [group])


def _norm_owner(m: str, modules: Mapping[str, dict[str, str]], weights: list[str], shapes: Shapes, where: str) -> str:
    """The weight whose channels a norm layer scales: the one it follows, or the one of its own number."""
    order = list(modules)
    sizes = {shapes[n] for p, n in modules[m].items() if p in _NORM}
    size = next(iter(sizes), ())
    if len(sizes) != 1 or len(size) != 1:
        raise _refuse(where, f"{m} is neither a weight matrix nor a norm layer")

    def stem(name: str) -> str:
        return re.sub(r"\d+", "#", name)

    before = [w for w in weights if stem(w) == stem(m) and order.index(w) < order.index(m)]
    number = re.findall(r"\d+", m)
    namesakes = [w for w in weights if stem(w) != stem(m) and number and re.findall(r"\d+", w) == number]
    candidates = before[-1:] or namesakes
    if len(candidates) != 1 or shapes[modules[candidates[0]]["weight"]][0] != size[0]:
        raise _refuse(where, f"it is not clear which weight the norm layer {m} follows")
    return candidates[0]


def _refuse(where: str, why: str) -> CheckpointError:
    return CheckpointError(
        "its symmetries cannot be inferred",
        where=where,
        why=why,
        fix="write a permutation spec in YAML (docs/matching.md) and give its path as `permutations`",
    )
