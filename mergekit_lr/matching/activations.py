"""Matching by what neurons do on data, with the same ascent: activations join the weights as tensors of their own.

What enters a linear layer has the groups of the axis along which it reads. Standardised (mean 0, norm 1 over the
samples) and laid out as ``[n, samples]`` it is one more tensor ``<weight>::input`` of the model, whose inner products
are correlations; so matching by activations, by weights or by both differ only in which tensors count.

Source: Ainsworth et al., arXiv 2209.04836, section 3.1; Li et al., "Convergent Learning", arXiv 1511.07543.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mergekit_lr.arch.layers import layer_of
from mergekit_lr.arch.symmetry import Factor, SymmetrySpec, TensorSpec
from mergekit_lr.errors import CheckpointError
from mergekit_lr.matching.member import Member, Read, identity
from mergekit_lr.matching.neurons import standardised

Cost = Literal["weights", "activations", "both"]
SUFFIX = "::input"
MOST = 4096
"""Samples kept of each activation, at even distances."""


def watched(spec: SymmetrySpec) -> dict[str, TensorSpec]:
    """Names of the weights whose inputs are recorded: the first of each layer that reads each set of groups."""
    found: dict[str, TensorSpec] = {}
    seen = set()
    for entry in spec.tensors:
        if entry.stack is not None or len(entry.reads) != 1 or not entry.names[0].endswith(".weight"):
            continue
        axis = entry.axes[entry.reads[0]]
        groups = tuple(f.group for s in axis for f in s if f.group)
        key = (layer_of(entry.names[0]), groups)
        if groups and key not in seen:
            seen.add(key)
            found[entry.names[0]] = entry
    return found


def record(model: nn.Module, spec: SymmetrySpec, batches: Sequence[Any]) -> dict[str, Tensor]:
    """``{weight: [samples, n]}`` in fp64: what enters the modules that hold the `watched` weights.

    A batch is given to the model as it is, or as keywords if it is a mapping.
    """
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                x = x.movedim(1, -1)
            seen.setdefault(name, []).append(x.reshape(-1, x.shape[-1]).double().cpu())

        return keep

    handles = [model.get_submodule(n.removesuffix(".weight")).register_forward_pre_hook(hook(n)) for n in watched(spec)]
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for h in handles:
            h.remove()
    return {n: _thinned(torch.cat(parts)) for n, parts in seen.items()}


def _thinned(x: Tensor) -> Tensor:
    if len(x) <= MOST:
        return x
    return x[torch.linspace(0, len(x) - 1, MOST, dtype=torch.float64).long()]


def with_activations(
    spec: SymmetrySpec,
    reads: tuple[Read, Read],
    recorded: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    cost: Cost,
) -> tuple[SymmetrySpec, Read, Read]:
    """Spec and readers under which `match_weights` matches by ``cost``.

    For ``both``, activations are scaled so that they could give as much in all as the weights could.

    Raises:
        CheckpointError: the two were not recorded on the same samples.
    """
    entries: list[TensorSpec] = []
    tables: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, entry in watched(spec).items():
        xs = [r[name] for r in recorded]
        if len(xs[0]) != len(xs[1]):
            raise CheckpointError(f"activations of {name} are of {len(xs[0])} and of {len(xs[1])} samples")
        for table, x in zip(tables, xs, strict=True):
            table[name + SUFFIX] = standardised(x).contiguous()
        axes = (entry.axes[entry.reads[0]], ((Factor(None, len(xs[0])),),))
        entries.append(TensorSpec((name + SUFFIX,), axes))
    if cost == "both":
        scale = _scale(spec, reads, tables)
        for table in tables:
            for n in table:
                table[n] = table[n] * scale
        entries = [*spec.tensors, *entries]
    used = {g for t in entries for g in t.groups()}
    groups = {g: s for g, s in spec.groups.items() if g in used}

    def joined(read: Read, table: Mapping[str, Tensor]) -> Read:
        return lambda name: table[name] if name in table else read(name)

    merged = SymmetrySpec(spec.family, groups, tuple(entries))
    return merged, joined(reads[0], tables[0]), joined(reads[1], tables[1])


def widened(spec: SymmetrySpec, member: Member) -> Member:
    """A member of a spec with fewer groups as one of ``spec``: the others stay."""
    still = identity(spec)
    return Member({**still.permutations, **member.permutations}, {**still.signs, **member.signs})


def _scale(spec: SymmetrySpec, reads: tuple[Read, Read], tables: tuple[dict[str, Tensor], dict[str, Tensor]]) -> float:
    def norm(tensors: Sequence[Tensor]) -> float:
        return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))

    names = [n for t in spec.tensors if t.groups() for n in t.names]
    weights = [norm([t for t in map(read, names) if t.is_floating_point()]) for read in reads]
    inputs = [norm(list(t.values())) for t in tables]
    return math.sqrt(weights[0] * weights[1] / (inputs[0] * inputs[1])) if min(inputs) > 0 else 0.0


def record_text(folder: Path, spec: SymmetrySpec, texts: Sequence[str], samples: int, length: int) -> dict[str, Tensor]:
    """`record` for a language model on the first ``samples`` windows of ``length`` tokens of some text files.

    Raises:
        CheckpointError: the folder does not load, or the texts are too short for one window.
    """
    from mergekit_lr.evaluation import load_for_evaluation

    network, tokenizer = load_for_evaluation(folder)
    windows: list[list[int]] = []
    for text in texts:
        tokens = tokenizer(Path(text).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
        windows += [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    if not windows:
        raise CheckpointError(
            f"no text has {length} tokens", where=", ".join(texts), fix="set a shorter sequence_length"
        )
    chosen = [{"input_ids": torch.tensor([w])} for w in windows[:samples]]
    return record(network, spec, chosen)
