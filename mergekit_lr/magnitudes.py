"""Passes over magnitudes as integers: the 31 bits of ``|x|`` order as ``|x|`` does.

On a CPU the comparisons and gathers go through numpy, which does them several times faster than torch, and
over blocks that stay in cache; on a GPU they are torch operations on the device, and only counts and
collected values come back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mergekit_lr import host
from mergekit_lr.lazy import torch
from mergekit_lr.method import GRID, Call, Pass, Piece
from mergekit_lr.statistics import Values

if TYPE_CHECKING:
    from torch import Tensor

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
LOW_BITS = 15
INFINITY = 0x7F800000  # bits of +inf: no finite magnitude reaches it
_MAGNITUDE = np.int32(0x7FFFFFFF)

BlockCounts = list[tuple[str, int, Int64]]
"""(tensor, first block, one count for each block of `GRID` elements), in order."""


@dataclass(frozen=True)
class Want:
    """One question: the ``keep`` largest magnitudes of value stream ``stream``.

    ``among`` is how many entries the stream has in all, where it skips some tensors.
    """

    stream: int
    keep: int
    among: int | None = None


@dataclass(frozen=True)
class Bracket:
    """Magnitudes ``low .. high`` (bits, both inclusive) within which a threshold is looked for."""

    want: Want
    low: int
    high: int


def magnitude_bits(x: Tensor) -> Tensor:
    """Bits of ``|x|`` as int32 on the same device, flattened. fp32 ``x`` of any shape."""
    return x.detach().reshape(-1).view(torch.int32) & int(_MAGNITUDE)


def _blocks(call: Call, piece: Piece, values: Values) -> Iterator[list[Tensor]]:
    """Every value stream flat, `GRID` elements at a time."""
    flat = [v.reshape(-1) for v in values(call, piece)]
    for a in range(0, max(v.numel() for v in flat), GRID):
        yield [v[a : a + GRID] for v in flat]


def _look(x: Tensor, low: int, high: int) -> tuple[int, Int32]:
    """(how many magnitudes of a block lie above ``high``, the bits of those in ``low .. high``, in order).

    NaN, whose bits are above infinity's, is neither where ``high`` is infinity.
    """
    if not host.through_numpy(x):
        bits = magnitude_bits(x)
        inside: Int32 = bits[(bits >= low) & (bits <= high)].cpu().numpy()
        return 0 if high >= INFINITY else int(torch.count_nonzero(bits > high)), inside
    b = np.bitwise_and(x.numpy().view(np.int32), _MAGNITUDE)
    above = b > high
    chosen = b >= low
    count = 0 if high >= INFINITY else int(np.count_nonzero(above))
    np.not_equal(chosen, above, out=chosen)  # what is above is chosen too
    return count, b.take(np.flatnonzero(chosen))  # a gather by index is cheaper here than one by mask


@dataclass
class Collected:
    """Per bracket: how many magnitudes lie above it, those inside, and how many of these each block has."""

    above: int = 0
    parts: list[Int32] = field(default_factory=list)
    blocks: BlockCounts = field(default_factory=list)

    def ties(self, value: int) -> BlockCounts:
        """Entries equal to ``value``, by block."""
        before = np.concatenate([[0], np.cumsum(np.concatenate(self.parts) == np.int32(value))])
        edges = np.concatenate([[0], np.cumsum(np.concatenate([c for _, _, c in self.blocks]))])
        counts = np.diff(before[edges])
        out, at = [], 0
        for name, first, sizes in self.blocks:
            out.append((name, first, counts[at : at + sizes.size]))
            at += sizes.size
        return out


@dataclass
class Collect(Pass["list[Collected]", "list[Collected]"]):
    """Everything inside each bracket; for tensors of moderate size."""

    values: Values
    brackets: list[Bracket]

    def map(self, call: Call, piece: Piece) -> list[Collected]:
        out = [Collected() for _ in self.brackets]
        sizes: list[list[int]] = [[] for _ in self.brackets]
        for streams in _blocks(call, piece, self.values):
            for b, c, size in zip(self.brackets, out, sizes, strict=True):
                above, inside = _look(streams[b.want.stream], b.low, b.high)
                c.above += above
                c.parts.append(inside)
                size.append(inside.size)
        for c, size in zip(out, sizes, strict=True):
            c.blocks.append((call.name, piece.start // GRID, np.array(size, dtype=np.int64)))
        return out

    def fold(self, total: list[Collected] | None, partial: list[Collected]) -> list[Collected]:
        if total is None:
            return partial
        for mine, new in zip(total, partial, strict=True):
            mine.above += new.above
            mine.parts.extend(new.parts)
            mine.blocks.extend(new.blocks)
        return total

    def finish(self, total: list[Collected]) -> list[Collected]:
        return total


Counted = tuple[int, Int64]
"""(entries above, counts of each magnitude of a bracket in ascending order)."""


@dataclass
class Count(Pass["list[Counted]", "list[Counted]"]):
    """How often each magnitude in each bracket occurs; the brackets' widths alone decide its memory."""

    values: Values
    brackets: list[Bracket]

    def map(self, call: Call, piece: Piece) -> list[Counted]:
        above = [0] * len(self.brackets)
        inside: list[list[Int32]] = [[] for _ in self.brackets]
        for streams in _blocks(call, piece, self.values):
            for i, b in enumerate(self.brackets):
                more, found = _look(streams[b.want.stream], b.low, b.high)
                above[i] += more
                inside[i].append(found - np.int32(b.low))
        empty = [np.zeros(0, np.int32)]
        return [
            (a, np.bincount(np.concatenate(parts or empty), minlength=b.high - b.low + 1))
            for b, a, parts in zip(self.brackets, above, inside, strict=True)
        ]

    def fold(self, total: list[Counted] | None, partial: list[Counted]) -> list[Counted]:
        if total is None:
            return partial
        for (_, mine), (_, new) in zip(total, partial, strict=True):
            mine += new
        return [(a + c, counts) for (a, counts), (c, _) in zip(total, partial, strict=True)]

    def finish(self, total: list[Counted]) -> list[Counted]:
        return total


@dataclass
class Histogram(Pass["list[Int64]", "list[Int64]"]):
    """Per want: counts of all magnitudes by their high 16 bits."""

    values: Values
    wants: list[Want]

    def map(self, call: Call, piece: Piece) -> list[Int64]:
        out = [np.zeros(1 << 16, np.int64) for _ in self.wants]
        for streams in _blocks(call, piece, self.values):
            used = {w.stream for w in self.wants}
            high = {i: _counts(magnitude_bits(streams[i]) >> LOW_BITS, 1 << 16) for i in used}
            for mine, want in zip(out, self.wants, strict=True):
                mine += high[want.stream]
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
class Ties(Pass["list[BlockCounts]", "list[BlockCounts]"]):
    """Per want: how many entries of each block equal its threshold."""

    values: Values
    wants: list[Want]
    thresholds: list[int]

    def map(self, call: Call, piece: Piece) -> list[BlockCounts]:
        counts: list[list[int]] = [[] for _ in self.wants]
        for streams in _blocks(call, piece, self.values):
            for want, threshold, mine in zip(self.wants, self.thresholds, counts, strict=True):
                mine.append(_equal(streams[want.stream], threshold))
        first = piece.start // GRID
        return [[(call.name, first, np.array(mine, dtype=np.int64))] for mine in counts]

    def fold(self, total: list[BlockCounts] | None, partial: list[BlockCounts]) -> list[BlockCounts]:
        if total is None:
            return partial
        for mine, new in zip(total, partial, strict=True):
            mine.extend(new)
        return total

    def finish(self, total: list[BlockCounts]) -> list[BlockCounts]:
        return total


def _equal(x: Tensor, value: int) -> int:
    bits = magnitude_bits(x)
    if not host.through_numpy(x):
        return int(torch.count_nonzero(bits == value))
    return int(np.count_nonzero(bits.numpy() == np.int32(value)))
