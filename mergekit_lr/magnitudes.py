"""Passes over magnitudes as integers: the 31 bits of ``|x|`` order as ``|x|`` does.

On a CPU the comparisons and gathers go through numpy, which does them several times faster than torch; on a
GPU they are torch operations on the device, and only counts and collected values come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergekit_lr.lazy import torch
from mergekit_lr.method import GRID, Call, Pass, Piece
from mergekit_lr.statistics import Values

if TYPE_CHECKING:
    from torch import Tensor

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
SAMPLE = 4096  # elements looked at in each sampled block
LOW_BITS = 15
INFINITY = 0x7F800000  # bits of +inf: no finite magnitude reaches it
_MAGNITUDE = 0x7FFFFFFF


@dataclass(frozen=True)
class Want:
    """One question: the ``keep`` largest magnitudes of value stream ``stream``."""

    stream: int
    keep: int


@dataclass(frozen=True)
class Bracket:
    """Magnitudes ``low .. high`` (bits, both inclusive) within which a threshold is looked for."""

    want: Want
    low: int
    high: int


def magnitude_bits(x: Tensor) -> Tensor:
    """Bits of ``|x|`` as int32 on the same device, flattened. fp32 ``x`` of any shape."""
    return x.detach().reshape(-1).view(torch.int32) & _MAGNITUDE


def _above_and_inside(bits: Tensor, low: int, high: int) -> tuple[int, Int32]:
    """How many of ``bits`` lie above ``high``, and those in ``low .. high``."""
    if bits.device.type != "cpu":
        above = int(torch.count_nonzero(bits > high)) if high < INFINITY else 0
        return above, bits[(bits >= low) & (bits <= high)].cpu().numpy()
    b: Int32 = bits.numpy()
    above = int(np.count_nonzero(b > np.int32(high))) if high < INFINITY else 0
    # One unsigned comparison for low <= b <= high; then a gather by index, cheaper here than one by mask.
    inside = (b - np.int32(low)).view(np.uint32) <= np.uint32(high - low)
    return above, b.take(np.flatnonzero(inside))


@dataclass
class Sample(Pass["list[list[Int32]]", "list[Int32]"]):
    """Magnitudes at a few places, sorted. The engine hands it short pieces spread over the tensor."""

    sample = SAMPLE
    values: Values

    def map(self, call: Call, piece: Piece) -> list[list[Int32]]:
        return [[magnitude_bits(v).cpu().numpy()] for v in self.values(call, piece)]

    def fold(self, total: list[list[Int32]] | None, partial: list[list[Int32]]) -> list[list[Int32]]:
        return partial if total is None else [a + b for a, b in zip(total, partial, strict=True)]

    def finish(self, total: list[list[Int32]]) -> list[Int32]:
        return [np.sort(np.concatenate(parts)) for parts in total]


@dataclass
class Collect(Pass["list[tuple[int, list[Int32]]]", "list[tuple[int, Int32]]"]):
    """Per bracket: how many magnitudes lie above it, and those inside."""

    values: Values
    brackets: list[Bracket]

    def map(self, call: Call, piece: Piece) -> list[tuple[int, list[Int32]]]:
        streams = [magnitude_bits(v) for v in self.values(call, piece)]
        out: list[tuple[int, list[Int32]]] = []
        for b in self.brackets:
            above, inside = _above_and_inside(streams[b.want.stream], b.low, b.high)
            out.append((above, [inside]))
        return out

    def fold(self, total: Any, partial: Any) -> Any:
        if total is None:
            return partial
        for (_, mine), (_, new) in zip(total, partial, strict=True):
            mine.extend(new)
        return [(a + c, b) for (a, b), (c, _) in zip(total, partial, strict=True)]

    def finish(self, total: list[tuple[int, list[Int32]]]) -> list[tuple[int, Int32]]:
        return [(above, np.concatenate(parts)) for above, parts in total]


@dataclass
class Histogram(Pass["list[Int64]", "list[Int64]"]):
    """Per want: counts of magnitudes by their high 16 bits; or, in a chosen bin, by their low 15 bits."""

    values: Values
    wants: list[Want]
    bins: list[int] | None = None

    def map(self, call: Call, piece: Piece) -> list[Int64]:
        streams = [magnitude_bits(v) for v in self.values(call, piece)]
        if self.bins is None:
            by_stream = {w.stream: _counts(streams[w.stream] >> LOW_BITS, 1 << 16) for w in self.wants}
            return [by_stream[w.stream].copy() for w in self.wants]
        out = []
        for want, high in zip(self.wants, self.bins, strict=True):
            bits = streams[want.stream]
            first = high << LOW_BITS
            _, inside = _above_and_inside(bits, first, first + (1 << LOW_BITS) - 1)
            out.append(np.bincount(inside - np.int32(first), minlength=1 << LOW_BITS))
        return out

    def fold(self, total: list[Int64] | None, partial: list[Int64]) -> list[Int64]:
        if total is None:
            return partial
        for mine, new in zip(total, partial, strict=True):
            mine += new
        return total

    def finish(self, total: list[Int64]) -> list[Int64]:
        return total


def _counts(small: Tensor, size: int) -> Int64:
    """Histogram of integers 0 .. size - 1; torch's, as numpy's first converts to int64."""
    counts: Int64 = torch.bincount(small, minlength=size).cpu().numpy()
    return counts


@dataclass
class Ties(Pass["list[list[tuple[str, int, Int64]]]", "list[list[tuple[str, int, Int64]]]"]):
    """Per want: (tensor, first block, counts by block) of entries equal to its threshold, in order."""

    values: Values
    wants: list[Want]
    thresholds: list[int]

    def map(self, call: Call, piece: Piece) -> list[list[tuple[str, int, Int64]]]:
        streams = [magnitude_bits(v) for v in self.values(call, piece)]
        out = []
        for want, threshold in zip(self.wants, self.thresholds, strict=True):
            bits = streams[want.stream]
            blocks = [bits[a : a + GRID] for a in range(0, bits.numel(), GRID)]
            counts = np.array([_equal(b, threshold) for b in blocks], dtype=np.int64)
            out.append([(call.name, piece.start // GRID, counts)])
        return out

    def fold(self, total: Any, partial: Any) -> Any:
        if total is None:
            return partial
        for mine, new in zip(total, partial, strict=True):
            mine.extend(new)
        return total

    def finish(self, total: Any) -> Any:
        return total


def _equal(bits: Tensor, value: int) -> int:
    if bits.device.type != "cpu":
        return int(torch.count_nonzero(bits == value))
    return int(np.count_nonzero(bits.numpy() == np.int32(value)))
