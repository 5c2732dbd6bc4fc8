"""Merges one module's pairs, or one tensor saved whole, at the desk; laid out by `mergekit_lr.lowrank.merging`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mergekit_lr.rewrite import Desk


@dataclass(frozen=True)
class PairCall:
    """What the computation of one module's pair needs beside its factors. ``scales``: the adapters' own."""

    name: str
    combination: str
    rule: str
    lam: float
    rank: int
    scales: tuple[float, ...]
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    seed: int
    keys: tuple[str, ...]
    twin: bool


@dataclass(frozen=True)
class SavedCall:
    """``base + lambda sum_i w_i (saved_i - base)``."""

    lam: float
    weights: tuple[float, ...]
    twin: bool


def merge_pair(call: PairCall, desk: Desk) -> None:
    """One module's merged pair, written as B, A (and the tied head's B, A)."""
    from mergekit_lr.lowrank import combine
    from mergekit_lr.lowrank.gauge import pad

    pairs = [(desk.read(2 * i), desk.read(2 * i + 1)) for i in range(len(call.scales))]
    scales = [call.lam * w * s for w, s in zip(call.weights, call.scales, strict=True)]
    error = 0.0
    if call.combination == "cat":
        b, a = combine.concatenated(pairs, scales)
    elif call.combination == "svd":
        (b, a), error = combine.compressed(pairs, scales, call.rank)
    elif call.combination == "peft_linear":
        b, a = combine.cross_terms(pairs, scales)
    else:
        merged = combine.knots(pairs, call.scales, _rule(call))
        (b, a), error = combine.compressed([merged], [1.0], call.rank)
    b, a = pad(b, a, call.rank)
    outputs = [b, a, a.T, b.T] if call.twin else [b, a]
    for index, tensor in enumerate(outputs):
        desk.write(index, tensor.contiguous())
    desk.note({"relative_error": error})


def _rule(call: PairCall) -> Any:
    """The elementwise rule on aligned parts: the method of that name on task vectors from a base of zeros."""
    from mergekit_lr.lazy import torch
    from mergekit_lr.pieces import apply
    from mergekit_lr.registry import tensor_method

    method = tensor_method(call.rule)
    own = method.PerModel.model_fields
    models = [
        {"weight": w} | ({"density": d} if "density" in own else {})
        for w, d in zip(call.weights, call.densities, strict=True)
    ]

    def merge(parts: list[Any]) -> Any:
        zeros = torch.zeros_like(parts[0])
        merge_parameters = {"lambda": call.lam}
        return apply(
            method, parts, zeros, merge=merge_parameters, models=models, name=call.name, seed=call.seed, keys=call.keys
        )

    return merge


def merge_saved(call: SavedCall, desk: Desk) -> None:
    """A tensor that adapters saved whole: task arithmetic on their copies."""
    n = 1
    for d in desk.shape(0):
        n *= d
    for start in range(0, n, desk.step):
        stop = min(n, start + desk.step)
        base = desk.read(0, start, stop)
        total = base.new_zeros(stop - start)
        for i, w in enumerate(call.weights):
            total += (desk.read(i + 1, start, stop) - base) * w
        out = base + call.lam * total
        for index in range(1 + call.twin):
            desk.write(index, out, start)
