"""Two values an entry and one bit for each task: which of the two is its weight.

For T weights of one entry the best two values (least squared error, each task taking the nearer) come from cutting
the sorted weights in two and taking the mean of each side; there are T - 1 cuts, and all are tried. Two tasks are
kept exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_lr.bundle.apart import bits_of
from mergekit_lr.bundle.codes import Code, steps
from mergekit_lr.bundle.manifest import Recovered
from mergekit_lr.bundle.masks import mask_scratch, pack, packed_bytes, spread
from mergekit_lr.checkpoint.dtypes import torch_dtype
from mergekit_lr.lazy import torch
from mergekit_lr.method import GRID
from mergekit_lr.rewrite import Desk

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pairing:
    """One tensor. ``stored``: dtype codes of the base and of each task; ``out``: of what is stored."""

    shape: tuple[int, ...]
    stored: tuple[str, ...]
    out: str


def two_means(weights: Tensor) -> tuple[Tensor, Tensor]:
    """``[T, n]`` fp32 to the low and the high value of each entry, ``[n]``; equal where T is 1.

    Sums are taken from the smallest weight on, so that their rounding does not depend on where the entry lies.
    """
    ordered = weights.sort(dim=0).values
    tasks = len(ordered)
    if tasks == 1:
        return ordered[0].clone(), ordered[0].clone()
    apart = ordered - ordered[0]
    below = apart.cumsum(0)
    total = below[-1]
    best = torch.full_like(total, -1.0)
    low, high = ordered[0].clone(), ordered[-1].clone()
    for k in range(1, tasks):
        left, right = below[k - 1] / k, (total - below[k - 1]) / (tasks - k)
        gain = (right - left).square_().mul_(k * (tasks - k) / tasks)  # between-group sum of squares
        better = gain > best
        best = torch.where(better, gain, best)
        # A group of one is that weight itself, without the rounding of a difference.
        low = torch.where(better, ordered[0] if k == 1 else ordered[0] + left, low)
        high = torch.where(better, ordered[-1] if k == tasks - 1 else ordered[0] + right, high)
    return low, high


def nearer_high(weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The mask of one task: where the high value is the nearer one. bool."""
    return (weight - high).abs_() < (weight - low).abs_()


def pair_tensor(job: Pairing, desk: Desk) -> dict[str, Any]:
    """Outputs 0 low, 1 high, then one mask for each task. Returns each task's squared error and that of the base."""
    n, tasks = math.prod(job.shape), len(job.stored) - 1
    dtype = torch_dtype(job.out)
    errors: list[list[float]] = [[] for _ in range(tasks)]
    moved: list[list[float]] = [[] for _ in range(tasks)]
    for a, b in steps(desk, 0, n):
        raw = [desk.read(i, a, b, dtype=torch_dtype(d)) for i, d in enumerate(job.stored)]
        low, high = (torch.empty(b - a, dtype=dtype, device=raw[0].device) for _ in range(2))
        masks = [torch.empty(packed_bytes(b - a), dtype=torch.uint8) for _ in range(tasks)]
        for s in range(0, b - a, GRID):
            e = min(b - a, s + GRID)
            weights = torch.stack([x[s:e].to(torch.float32) for x in raw[1:]])
            low[s:e], high[s:e] = two_means(weights)
            u, v, base = (x[s:e].to(torch.float32) for x in (low, high, raw[0]))
            for t, w in enumerate(weights):
                mask = nearer_high(w, u, v)
                masks[t][s // 8 : packed_bytes(e)] = pack(mask)
                errors[t].append(_square(torch.where(mask, v, u) - w))
                moved[t].append(_square(base - w))
        for j, x in enumerate((low, high)):
            desk.write(j, x, a)
        for t, packed in enumerate(masks):
            desk.write(2 + t, packed, a // 8)
    return {"squared_error": _totals(errors), "squared_task_vector": _totals(moved)}


def _square(x: Tensor) -> float:
    wide = x.double()
    return float(torch.dot(wide, wide))


def _totals(values: Sequence[Sequence[float]]) -> list[float]:
    return [math.fsum(v) for v in values]


class Select(Code):
    """``W = high where the task's bit is set, else low``: the bytes of one or the other. Parts: low, high, mask."""

    name = "select"

    def decode(self, wanted: Recovered, desk: Desk, start: int = 0, stop: int | None = None) -> None:
        dtype = torch_dtype(wanted.dtype)
        kind = bits_of(dtype)
        runs = steps(desk, start, wanted.numel if stop is None else stop)
        scratch = mask_scratch(runs, kind)
        for a, b in runs:
            low, high = (desk.read(i, a, b, dtype=dtype).view(kind) for i in (0, 1))
            packed = desk.read(2, a // 8, packed_bytes(b), dtype=torch.uint8)
            out = desk.room(0, a, b)
            chosen_bits(low, high, packed, out.view(kind), scratch)
            desk.write(0, out, a)


def chosen_bits(low: Tensor, high: Tensor, packed: Tensor, out: Tensor, scratch: Tensor) -> None:
    """``out = low ^ ((low ^ high) & -bit)`` on integer views: several times faster than a choice."""
    bits = spread(packed, low.numel(), low.dtype, -1.0, scratch=scratch)
    torch.bitwise_xor(low, high, out=out)
    torch.bitwise_xor(out.bitwise_and_(bits), low, out=out)
