"""What a worker does to write experts: weighted sums of stored numbers, merges of matrices, decoding of FP8."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergekit_lr.arch.moe import FP8_BLOCK, Stored
from mergekit_lr.arch.moe_families import Slot
from mergekit_lr.checkpoint.dtypes import torch_dtype
from mergekit_lr.experts.merging import aligned_mean, union_merge
from mergekit_lr.experts.quantised import decode_fp8, encode_fp8
from mergekit_lr.experts.storage import Expert, expert_from, stored_as, weighted_mean
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lr.rewrite import Desk

Term = tuple[int, int, float]
"""(input, its first element, factor)."""


@dataclass(frozen=True)
class Combine:
    """One output of ``len(rows) * numel`` elements: row j is the sum of its terms, ``factor * input[start:]``.

    A row of one term with factor 1 is copied to the bit. ``dtype``: safetensors code that the inputs are stored in.
    """

    numel: int
    rows: tuple[tuple[Term, ...], ...]
    dtype: str


@dataclass(frozen=True)
class Fitted:
    """A matrix (or bias) of the new expert that was worked out before: input ``input`` holds it whole."""

    name: str
    input: int


@dataclass(frozen=True)
class Recipe:
    """How one new expert comes about. ``members``: for each, where each stored part begins: (input, first element)."""

    members: tuple[tuple[tuple[int, int], ...], ...]
    shares: tuple[float, ...]
    centre: int
    fitted: tuple[Fitted, ...] = ()


@dataclass(frozen=True)
class MatrixMerge:
    """New experts from the matrices of old ones.

    ``stored``: how an old expert is stored (without names); ``slots``: what is written, one output each, followed by
    one output of scales each where ``requantise``. ``rule``: ``mean``, ``aligned`` or ``union`` (with ``rank``).
    ``grams``: inputs that hold, for whitening, the Gram of the experts' inputs and of each member's hidden layer.
    """

    stored: tuple[Stored, ...]
    slots: tuple[Slot, ...]
    experts: tuple[Recipe, ...]
    rule: str
    rank: str | int | float = "full"
    requantise: bool = False
    grams: tuple[tuple[int, tuple[tuple[int, int, int], ...]], ...] = ()


@dataclass(frozen=True)
class Decode:
    """A block-scaled FP8 matrix ``[rows, columns]`` (input 0, scales in input 1) as floating point."""

    rows: int
    columns: int


def nameless(stored: tuple[Stored, ...]) -> tuple[Stored, ...]:
    """Storage without its tensors' names: what a task must know, and no more."""
    return tuple(replace(s, names=()) for s in stored)


def compute(call: Any, key: str, desk: Desk) -> None:
    """Carry out one call."""
    if isinstance(call, Combine):
        _combine(call, desk)
    elif isinstance(call, MatrixMerge):
        _merge(call, key, desk)
    else:
        assert isinstance(call, Decode)
        _decode(call, desk)


def _combine(call: Combine, desk: Desk) -> None:
    stored = torch_dtype(call.dtype)
    wide = torch.float64 if stored == torch.float64 else torch.float32
    for j, row in enumerate(call.rows):
        for start in range(0, call.numel, desk.step):
            stop = min(call.numel, start + desk.step)
            if len(row) == 1 and row[0][2] == 1.0:
                out = desk.read(row[0][0], row[0][1] + start, row[0][1] + stop, dtype=stored)
            else:
                out = torch.zeros(stop - start, dtype=wide, device=desk.device)
                for source, first, factor in row:
                    out.add_(desk.read(source, first + start, first + stop, dtype=wide), alpha=factor)
            desk.write(0, out, j * call.numel + start)


def _decode(call: Decode, desk: Desk) -> None:
    scales = desk.read(1).reshape(-(-call.rows // FP8_BLOCK), -1)
    step = max(1, desk.step // (FP8_BLOCK * call.columns)) * FP8_BLOCK
    for row in range(0, call.rows, step):
        last = min(call.rows, row + step)
        values = desk.read(0, row * call.columns, last * call.columns).reshape(-1, call.columns)
        part = scales[row // FP8_BLOCK : -(-last // FP8_BLOCK)]
        desk.write(0, decode_fp8(values, part), row * call.columns)


def _merge(call: MatrixMerge, key: str, desk: Desk) -> None:
    done = [0] * (2 * len(call.slots))
    for j, recipe in enumerate(call.experts):
        grams = _grams(call, j, desk) if call.grams else None
        merged = _merged(call, recipe, f"{key} {j}", desk, grams)
        for i, slot in enumerate(call.slots):
            part = stored_as(slot, merged)
            if call.requantise and not slot.bias:
                part, scales = encode_fp8(part)
                desk.write(len(call.slots) + i, scales, done[len(call.slots) + i])
                done[len(call.slots) + i] += scales.numel()
            desk.write(i, part, done[i])
            done[i] += part.numel()


def _merged(call: MatrixMerge, recipe: Recipe, name: str, desk: Desk, grams: list[dict[str, Tensor]] | None) -> Expert:
    fitted = {f.name: desk.read(f.input) for f in recipe.fitted}
    if {"gate", "up", "down"} <= fitted.keys():
        return Expert(**fitted)
    experts = [_read(call.stored, places, desk) for places in recipe.members]
    if len(experts) == 1:
        merged = experts[0]
    elif call.rule == "aligned":
        merged = aligned_mean(experts, recipe.shares, recipe.centre)
    elif call.rule == "union":
        merged = union_merge(experts, recipe.shares, call.rank, grams, name)
    else:
        merged = weighted_mean(experts, recipe.shares)
    return replace(merged, **fitted)


def _read(stored: tuple[Stored, ...], places: tuple[tuple[int, int], ...], desk: Desk) -> Expert:
    parts = []
    for s, (source, start) in zip(stored, places, strict=True):
        raw = torch_dtype(s.dtype)
        wide = raw if s.suffix or raw.itemsize in (1, 8) else torch.float32
        parts.append(desk.read(source, start, start + s.numel, dtype=wide).reshape(s.shape))
    return expert_from(stored, parts)


def _grams(call: MatrixMerge, j: int, desk: Desk) -> list[dict[str, Tensor]]:
    shared, hidden = call.grams[j]
    inputs = desk.read(shared)
    found = []
    for source, start, width in hidden:
        own = desk.read(source, start, start + width * width).reshape(width, width)
        found.append({"gate": inputs, "up": inputs, "down": own})
    return found
