"""A center and, for each task, its offsets in a few bits: one scale for a group of neighbours in a row.

An offset comes back as ``(code - zero) * scale``. With three bits and more ``zero = 2 ** (bits - 1)``: zero itself is
a level, and the level that is left over is on the side that the scale's sign says, where the group's largest entry is.
With one or two bits the levels lie on both sides of zero alike, ``zero = (2 ** bits - 1) / 2``: with so few, a level
spent on zero costs more than it gives. Scales are bf16 numbers, so a product of code and scale is exact in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_lr.bundle.bits import levels_of, pack_codes, stream_bytes
from mergekit_lr.bundle.codes import Code
from mergekit_lr.bundle.manifest import Recovered
from mergekit_lr.checkpoint.dtypes import torch_dtype
from mergekit_lr.lazy import torch
from mergekit_lr.method import GRID
from mergekit_lr.rewrite import Desk

if TYPE_CHECKING:
    from torch import Tensor

CLIPS = (1.0, 0.8, 0.65, 0.5)
"""Shares of a group's largest entry that its range is tried with, from two to four bits. With more, clipping costs more
than finer steps gain; with one the fit that follows is the optimum."""


@dataclass(frozen=True)
class Quantizing:
    """One tensor. ``stored``: dtype codes of the base and of each task; ``out``: of the center.

    ``bits``: of each task, None where it is stored as it is.
    """

    shape: tuple[int, ...]
    stored: tuple[str, ...]
    out: str
    bits: tuple[int | None, ...]
    group: int
    mean: bool
    squares: bool


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """``(rows, columns)``: the first dimension, and all others together. A tensor of one dimension is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def groups_of(columns: int, group: int) -> int:
    """Groups in a row; the last may be short."""
    return -(-columns // group)


def zero_of(bits: int) -> float:
    """The code, maybe between two, that stands for zero."""
    return 2.0 ** (bits - 1) if bits > 2 else (2**bits - 1) / 2


def quantize(offsets: Tensor, bits: int, group: int, squares: bool) -> tuple[Tensor, Tensor]:
    """``[rows, columns]`` fp32 to codes ``uint8 [rows, columns]`` and scales ``bf16 [rows, groups]``.

    An entry gets the code of the nearest level. A group's scale is the smallest that leaves no entry off by more than
    half of it; or with ``squares``, and for one bit, that of least squared error among a few: the range clipped by each
    of `CLIPS`, and for each the least-squares scale of the codes that it gives. A group of zeros has scale zero.
    """
    rows, columns = offsets.shape
    width = max(1, min(group, columns))
    number = groups_of(columns, width)
    spare = number * width - columns
    padded = torch.nn.functional.pad(offsets, (0, spare)) if spare else offsets
    x = padded.reshape(-1, width).t().contiguous()  # a group is a column: scales are spread along fast rows
    there = None
    if spare:
        there = torch.ones((number, width), dtype=torch.float32, device=x.device)
        there[-1, width - spare :] = 0
        there = there.repeat(rows, 1).t().contiguous()
    scales = _least_squares(x, bits, there) if squares or bits == 1 else _covering(x, bits)
    codes = (_levels(x, scales, bits) + zero_of(bits)).nan_to_num_(0.0).to(torch.uint8)
    flat = codes.t().reshape(rows, number * width)[:, :columns]
    return flat.contiguous(), scales.to(torch.bfloat16).view(rows, number)


def _covering(x: Tensor, bits: int) -> Tensor:
    """``[width, groups]`` to a bf16 number a group, in fp32, rounded up in magnitude."""
    levels = 2.0**bits
    low, high = (side.clamp_(min=0) + 0.0 for side in (-x.amin(0), x.amax(0)))  # no negative zero
    if bits > 2:  # one side has a level more; the ends reach half a step further
        more, less = (levels + 1) / 2, (levels - 1) / 2
        up = torch.maximum(low / more, high / less)
        down = torch.maximum(high / more, low / less)
        wanted = torch.where(up <= down, up, -down)
    else:
        wanted = torch.maximum(low, high) / (levels / 2)
    near = wanted.to(torch.bfloat16)
    short = near.to(torch.float32).abs() < wanted.abs()
    return (near.view(torch.int16) + short).view(torch.bfloat16).to(torch.float32)


def _least_squares(x: Tensor, bits: int, there: Tensor | None) -> Tensor:
    """``[width, groups]`` to a bf16 number a group, in fp32. ``there``: zero where a row's last group is filled up."""
    low, high, zero = x.amin(0), x.amax(0), zero_of(bits)
    if bits > 2:
        reach = torch.where(-low >= high, -low, -high) / zero
        clips = (1.0, zero / (zero - 1), *(CLIPS[1:] if bits < 5 else ()))  # the second: both ends alike
    else:
        reach, clips = torch.maximum(-low, high) / zero, CLIPS if bits == 2 else CLIPS[:1]
    best, least = _narrow(reach + 0.0), None
    for clip in clips:
        scale = _narrow(reach * clip)
        for _ in range(2):
            levels = _levels(x, scale, bits)
            if there is not None:
                levels.mul_(there)
            error = _sum((levels * scale).sub_(x).square_())
            better = error == error if least is None else error < least
            best = torch.where(better, scale, best)
            least = error if least is None else torch.where(better, error, least)
            square = _sum(levels * levels)
            scale = _narrow(torch.where(square > 0, _sum(levels.mul_(x)) / square, scale))
    return best + 0.0  # no negative zero


def _levels(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``code - zero`` of the nearest level."""
    zero = zero_of(bits)
    step = torch.where(scale == 0, 1.0, scale)
    return (x / step).add_(zero).round_().clamp_(0.0, 2.0**bits - 1).sub_(zero)


def _narrow(scale: Tensor) -> Tensor:
    return scale.to(torch.bfloat16).to(torch.float32)


def _sum(x: Tensor) -> Tensor:
    """Sum over the first dimension, halving it: in one order, however many columns there are. ``x`` is overwritten."""
    n = x.shape[0]
    while n > 1:
        half = n // 2
        x[:half] += x[n - half : n]
        n -= half
    return x[0]


def spans(shape: Sequence[int], group: int) -> Iterator[tuple[int, int, int]]:
    """``(start, stop, rows)`` of pieces of about 65,536 elements: whole rows, or whole groups of one row."""
    rows, columns = rows_of(shape)
    if columns <= GRID:
        count = max(1, GRID // max(columns, 1))
        for r in range(0, rows, count):
            yield r * columns, min(rows, r + count) * columns, min(rows, r + count) - r
        return
    piece = GRID // group * group
    for r in range(rows):
        for c in range(0, columns, piece):
            yield r * columns + c, r * columns + min(columns, c + piece), 1


def quantize_tensor(job: Quantizing, desk: Desk) -> dict[str, Any]:
    """Outputs: the center where a task needs it, then for each task its codes and scales, or its weights as they are.

    Returns each task's squared error, before the cast, and that of the base, for the report.
    """
    needed = [t for t, b in enumerate(job.bits) if b is not None]
    first, places = (1 if needed else 0), []
    for b in job.bits:
        places.append(first)
        first += 1 if b is None else 2
    streams = {t: _Stream(desk, places[t], b) for t, b in enumerate(job.bits) if b is not None}
    written = dict.fromkeys(streams, 0)
    errors: list[list[float]] = [[] for _ in job.bits]
    moved: list[list[float]] = [[] for _ in job.bits]
    for a, e, rows in spans(job.shape, job.group):
        raw = [desk.read(i, a, e, dtype=torch_dtype(d)) for i, d in enumerate(job.stored)]
        base, *weights = (x.to(torch.float32) for x in raw)
        center = _center(base, [weights[t] for t in needed], job)
        if needed:
            desk.write(0, center, a)
        wide = center.to(torch.float32)
        for t, w in enumerate(weights):
            moved[t].append(_square(base - w))
            if t not in streams:
                desk.write(places[t], raw[1 + t], a)
                continue
            bits = streams[t].bits
            offsets = (w - wide).view(rows, -1)
            codes, scales = quantize(offsets, bits, job.group, job.squares)
            streams[t].add(codes)
            desk.write(places[t] + 1, scales, written[t])
            written[t] += scales.numel()
            errors[t].append(_square(_offsets(codes, bits, _spread(scales, rows, job.group, offsets)) - offsets))
    for stream in streams.values():
        stream.finish()
    return {
        "squared_error": [math.fsum(x) for x in errors],
        "squared_task_vector": [math.fsum(x) for x in moved],
    }


def _center(base: Tensor, weights: Sequence[Tensor], job: Quantizing) -> Tensor:
    """What offsets are taken from, as it is stored. A mean of equal weights is that weight itself."""
    if not job.mean or not weights:
        return base.to(torch_dtype(job.out))
    total = torch.zeros_like(base)
    for w in weights:
        total += w - weights[0]
    return (weights[0] + total / len(weights)).to(torch_dtype(job.out))


def _spread(scales: Tensor, rows: int, group: int, like: Tensor) -> Tensor:
    """``[rows, groups]`` to one scale for each element of ``like``, fp32."""
    return scales.to(torch.float32).repeat_interleave(group, dim=1)[:, : like.shape[1]]


def _offsets(codes: Tensor, bits: int, scales: Tensor) -> Tensor:
    """``(code - zero) * scale`` in fp32: exact."""
    return codes.to(torch.float32).sub_(zero_of(bits)).mul_(scales)


def _square(x: Tensor) -> float:
    wide = x.reshape(-1).double()
    return float(torch.dot(wide, wide))


class _Stream:
    """Codes of one task on their way to an output: whole bytes are written, the rest waits."""

    def __init__(self, desk: Desk, output: int, bits: int) -> None:
        self.desk, self.output, self.bits = desk, output, bits
        self._rest = torch.empty(0, dtype=torch.uint8)
        self._bytes = 0

    def add(self, codes: Tensor) -> None:
        waiting = torch.cat([self._rest, codes.reshape(-1).cpu()])
        whole = waiting.numel() // 8 * 8
        self._write(waiting[:whole])
        self._rest = waiting[whole:]

    def finish(self) -> None:
        self._write(self._rest)

    def _write(self, codes: Tensor) -> None:
        packed = pack_codes(codes, self.bits)
        self.desk.write(self.output, packed, self._bytes)
        self._bytes += packed.numel()


class Offsets(Code):
    """``W = center + (code - zero) * scale``, in fp32, rounded once. Parts: center, codes, scales.

    ``call``: ``group``, and ``bits`` of the task.
    """

    name = "offsets"

    def decode(self, wanted: Recovered, desk: Desk, start: int = 0, stop: int | None = None) -> None:
        bits, group = wanted.call["bits"], wanted.call["group"]
        rows, columns = rows_of(wanted.shape)
        if type(bits) is not int or not 1 <= bits <= 8 or type(group) is not int or group < 1:
            raise ValueError(f"{bits} bits in groups of {group}")
        if desk.shape(0) != wanted.shape or desk.shape(1) != (stream_bytes(wanted.numel, bits),):
            raise ValueError(f"center {desk.shape(0)} and codes {desk.shape(1)} for {wanted.shape}")
        if desk.shape(2) != (rows, groups_of(columns, group)):
            raise ValueError(f"scales {desk.shape(2)} for {wanted.shape} in groups of {group}")
        dtype, end = torch_dtype(wanted.dtype), wanted.numel if stop is None else stop
        scales = _Scales(desk, columns, group)
        for a in range(start, end, GRID) or [start]:
            e = min(end, a + GRID)
            center = desk.read(0, a, e, dtype=dtype)
            packed = desk.read(1, a * bits // 8, stream_bytes(e, bits), dtype=torch.uint8)
            levels = levels_of(packed, e - a, bits, zero_of(bits))
            out = desk.room(0, a, e)
            desk.write(0, added(center, levels, scales.of(a, e), out), a)


def added(center: Tensor, levels: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """``center + scales * levels`` into ``out``, of the center's dtype; ``levels`` and ``scales`` are bf16."""
    if center.dtype == torch.bfloat16:
        # One operation that widens to fp32 inside. The product is exact, so it may be fused with the addition or not.
        return torch.addcmul(center, levels, scales, out=out)
    moved = levels.to(torch.float32).mul_(scales.to(torch.float32))
    return out.copy_(moved.add_(center.to(torch.float32)))


class _Scales:
    """The scale of each element of a run, runs in order; every stored scale is read once."""

    def __init__(self, desk: Desk, columns: int, group: int) -> None:
        self.desk, self.columns, self.group = desk, columns, group
        self.number = groups_of(columns, group)
        self._first = self._next = -1
        self._held: Tensor | None = None

    def of(self, start: int, stop: int) -> Tensor:
        if stop == start:
            return self.desk.read(2, 0, 0, dtype=torch.bfloat16)
        first, last = self._group(start), self._group(stop - 1)
        fresh = first if self._held is None else self._next
        found = self.desk.read(2, fresh, last + 1, dtype=torch.bfloat16)
        if self._held is not None and first < fresh:
            found = torch.cat([self._held, found])  # the group that the last run ended in
        self._held, self._next = found[-1:], last + 1
        before = start - self._begin(first)
        if self.columns % self.group == 0:
            return found.unsqueeze(1).expand(-1, self.group).reshape(-1)[before : before + stop - start]
        sizes = torch.full((last + 1 - first,), self.group, dtype=torch.int64, device=found.device)
        short = self.number - 1 - first % self.number
        sizes[short :: self.number] = self.columns % self.group
        return found.repeat_interleave(sizes)[before : before + stop - start]

    def _group(self, element: int) -> int:
        row, column = divmod(element, self.columns)
        return row * self.number + column // self.group

    def _begin(self, group: int) -> int:
        row, place = divmod(group, self.number)
        return row * self.columns + place * self.group
