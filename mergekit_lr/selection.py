"""Keep the k largest magnitudes of a tensor, exactly, without sorting it and without holding it.

A sample brackets each wanted threshold; one pass counts what lies above the bracket and collects what lies in
it; the threshold is then an order statistic of the few collected values. If a bracket misses, or would collect
too much (bf16 deltas repeat values heavily), a two-pass histogram over the 31 magnitude bits finds the same
threshold in bounded memory. Entries equal to the threshold are kept by lowest index until k is reached, so a
selection holds exactly k entries and does not depend on slices.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergekit_lr.lazy import torch
from mergekit_lr.method import GRID, Call, Pass, Piece
from mergekit_lr.statistics import Values, piece_tensors

if TYPE_CHECKING:
    from torch import Tensor

Int64 = npt.NDArray[np.int64]
SMALL = 1 << 18  # below this many elements the bracket is everything
SAMPLE = 4096  # elements looked at in each sampled block
LOW_BITS = 15
INFINITY = 0x7F800000  # bits of +inf: no finite magnitude reaches it


def magnitude_bits(x: Tensor) -> npt.NDArray[np.int32]:
    """Bits of ``|x|`` as int32, which order as the magnitudes do. fp32 ``x`` of any shape, flattened."""
    bits = x.detach().reshape(-1).cpu().numpy().view(np.int32)
    return bits & np.int32(0x7FFFFFFF)


def count_to_keep(density: float, numel: int) -> int:
    """How many of ``numel`` entries a density keeps: ``int(density * numel)``, within 0..numel."""
    return max(0, min(numel, int(density * numel)))


@dataclass(frozen=True)
class Want:
    """One question: the ``keep`` largest magnitudes of value stream ``stream``."""

    stream: int
    keep: int


@dataclass(frozen=True)
class Cut:
    """The answer: keep ``|x| > threshold``, and the first few entries equal to it.

    ``threshold`` is the k-th largest magnitude (infinity keeps nothing, 0 keeps everything). Entries equal to it
    are kept in blocks (of `GRID` elements) before ``tie_block``, and the first ``tie_rank`` of that block.
    """

    threshold: float
    tie_block: int | None = None  # None: every entry equal to the threshold is kept
    tie_rank: int = 0

    def trim(self, x: Tensor, start: int) -> Tensor:
        """``x`` with everything else set to zero. fp32, any shape; ``start`` is its offset in the tensor."""
        if self.threshold == 0.0:
            return x.clone()  # whatever lies at the threshold is zero already
        if self.tie_block is None:
            return self._keep_ties(x)
        flat = x.reshape(-1)
        edge = self.tie_block * GRID
        a = min(max(edge - start, 0), flat.numel())
        b = min(max(edge + GRID - start, 0), flat.numel())
        out = torch.empty_like(flat)
        out[:a] = self._keep_ties(flat[:a])
        out[b:] = torch.nn.functional.hardshrink(flat[b:], self.threshold)
        if a < b:
            out[a:b] = self._keep_first_ties(flat[a:b])  # pieces start on the grid: this is the whole block
        return out.reshape(x.shape)

    def _keep_ties(self, x: Tensor) -> Tensor:
        below = float(np.nextafter(np.float32(self.threshold), np.float32(0)))
        return torch.nn.functional.hardshrink(x, below)

    def _keep_first_ties(self, block: Tensor) -> Tensor:
        ties = block.abs() == self.threshold
        early = ties.cumsum(0) <= self.tie_rank
        return torch.nn.functional.hardshrink(block, self.threshold) + block * (ties & early)


KEEP_NOTHING = Cut(float("inf"))
KEEP_ALL = Cut(0.0)


@dataclass
class _Sample(Pass["list[list[Any]]", "list[Any]"]):
    """Magnitudes at a few places; the engine hands a sampling pass short pieces spread over the tensor."""

    sample = SAMPLE
    values: Values

    def map(self, call: Call, piece: Piece) -> list[list[Any]]:
        return [[magnitude_bits(v)] for v in self.values(call, piece)]

    def fold(self, total: list[list[Any]] | None, partial: list[list[Any]]) -> list[list[Any]]:
        return partial if total is None else [a + b for a, b in zip(total, partial, strict=True)]

    def finish(self, total: list[list[Any]]) -> list[Any]:
        return [np.sort(np.concatenate(parts)) for parts in total]


@dataclass(frozen=True)
class _Bracket:
    want: Want
    low: int  # bits, inclusive
    high: int  # bits, inclusive


@dataclass
class _Collect(Pass["list[tuple[int, list[Any]]]", "list[tuple[int, Any]]"]):
    """Per bracket: how many magnitudes lie above it, and those inside."""

    values: Values
    brackets: list[_Bracket]

    def map(self, call: Call, piece: Piece) -> list[tuple[int, list[Any]]]:
        streams = [magnitude_bits(v) for v in self.values(call, piece)]
        out: list[tuple[int, list[Any]]] = []
        for b in self.brackets:
            bits = streams[b.want.stream]
            above = int(np.count_nonzero(bits > np.int32(b.high))) if b.high < INFINITY else 0
            # One unsigned comparison for low <= bits <= high.
            inside = (bits - np.int32(b.low)).view(np.uint32) <= np.uint32(b.high - b.low)
            out.append((above, [bits[inside]]))
        return out

    def fold(self, total: Any, partial: Any) -> Any:
        if total is None:
            return partial
        return [(a + c, b + d) for (a, b), (c, d) in zip(total, partial, strict=True)]

    def finish(self, total: list[tuple[int, list[Any]]]) -> list[tuple[int, Any]]:
        return [(above, np.concatenate(parts)) for above, parts in total]


@dataclass
class _Histogram(Pass["list[Int64]", "list[Int64]"]):
    """Counts of magnitudes by their high 16 bits; or, in chosen bins, by their low 15 bits."""

    values: Values
    wants: list[Want]
    bins: list[int] | None = None

    def map(self, call: Call, piece: Piece) -> list[Int64]:
        streams = [magnitude_bits(v) for v in self.values(call, piece)]
        if self.bins is None:
            return [np.bincount(bits >> LOW_BITS, minlength=1 << 16) for bits in streams]
        out = []
        for want, high in zip(self.wants, self.bins, strict=True):
            bits = streams[want.stream]
            low = bits[(bits >> LOW_BITS) == high] & ((1 << LOW_BITS) - 1)
            out.append(np.bincount(low, minlength=1 << LOW_BITS))
        return out

    def fold(self, total: list[Int64] | None, partial: list[Int64]) -> list[Int64]:
        return partial if total is None else [a + b for a, b in zip(total, partial, strict=True)]

    def finish(self, total: list[Int64]) -> list[Int64]:
        return total


@dataclass
class _Ties(Pass["list[list[tuple[str, int, Int64]]]", "list[list[tuple[str, int, Int64]]]"]):
    """Per want: (tensor, block, count) of entries equal to its threshold, in order."""

    values: Values
    wants: list[Want]
    thresholds: list[int]

    def map(self, call: Call, piece: Piece) -> list[list[tuple[str, int, Int64]]]:
        streams = [magnitude_bits(v) for v in self.values(call, piece)]
        out = []
        for want, threshold in zip(self.wants, self.thresholds, strict=True):
            equal = streams[want.stream] == np.int32(threshold)
            starts = np.arange(0, equal.size, GRID)
            out.append([(call.name, piece.start // GRID, np.add.reduceat(equal, starts, dtype=np.int64))])
        return out

    def fold(self, total: Any, partial: Any) -> Any:
        return partial if total is None else [a + b for a, b in zip(total, partial, strict=True)]

    def finish(self, total: Any) -> Any:
        return total


@dataclass
class _Progress:
    """What is known of one want: its threshold (bits) and how many entries equal to it are kept."""

    threshold: int | None = None
    quota: int = 0
    equal: int = 0


def _brackets(wants: list[Want], samples: list[Any], numel: int) -> list[_Bracket | None]:
    """A bracket per want, wide enough to hold its threshold nearly always; None where it would collect a lot."""
    out: list[_Bracket | None] = []
    for want in wants:
        ordered = samples[want.stream]
        if numel <= SMALL:
            out.append(_Bracket(want, 0, INFINITY))
            continue
        at = (1 - want.keep / numel) * ordered.size
        margin = 0.01 * ordered.size + 4 * np.sqrt(ordered.size)
        i, j = int(at - margin), int(at + margin)
        low = int(ordered[i]) if i >= 0 else 0
        high = int(ordered[j]) if j < ordered.size else INFINITY
        share = np.searchsorted(ordered, high, "right") - np.searchsorted(ordered, low, "left")
        out.append(_Bracket(want, low, high) if share <= ordered.size // 8 else None)
    return out


def _from_collected(want: Want, above: int, inside: Any) -> _Progress | None:
    """The threshold from collected magnitudes, or None where the bracket missed it."""
    rank = want.keep - above
    if not 0 < rank <= inside.size:
        return None
    threshold = int(np.partition(inside, inside.size - rank)[inside.size - rank])
    return _Progress(threshold, rank - int((inside > threshold).sum()), int((inside == threshold).sum()))


def _bin_of(counts: Int64, rank: int) -> tuple[int, int]:
    """(bin, rank within it) of the rank-th largest entry, ``counts`` by ascending magnitude."""
    from_top = np.cumsum(counts[::-1])
    i = int(np.searchsorted(from_top, rank))
    before = int(from_top[i - 1]) if i else 0
    return counts.size - 1 - i, rank - before


def _by_histogram(values: Values, wants: list[Want]) -> Generator[Pass[Any, Any], Any, list[_Progress]]:
    high = yield _Histogram(values, wants)
    located = [_bin_of(high[w.stream], w.keep) for w in wants]
    low = yield _Histogram(values, wants, [b for b, _ in located])
    out = []
    for (bin_, rank), counts in zip(located, low, strict=True):
        at, quota = _bin_of(counts, rank)
        out.append(_Progress((bin_ << LOW_BITS) | at, quota, int(counts[at])))
    return out


def _thresholds(
    values: Values, wants: list[Want], numel: int, sampled: bool
) -> Generator[Pass[Any, Any], Any, list[_Progress]]:
    found: list[_Progress | None] = [None] * len(wants)
    if sampled:
        samples = [] if numel <= SMALL else (yield _Sample(values))
        empty = [np.empty(0, np.int32)] * (max(w.stream for w in wants) + 1)
        brackets = _brackets(wants, samples or empty, numel)
        chosen = [(i, b) for i, b in enumerate(brackets) if b is not None]
        if chosen:
            collected = yield _Collect(values, [b for _, b in chosen])
            for (i, b), (above, inside) in zip(chosen, collected, strict=True):
                found[i] = _from_collected(b.want, above, inside)
    missed = [i for i, f in enumerate(found) if f is None]
    if missed:
        exact = yield from _by_histogram(values, [wants[i] for i in missed])
        for i, progress in zip(missed, exact, strict=True):
            found[i] = progress
    return [f for f in found if f is not None]


@dataclass(frozen=True)
class ModelCut:
    """A `Cut` over many tensors as one: which of them lie before the place where ties stop being kept."""

    threshold: float
    tie_tensor: str | None = None
    tie_block: int = 0
    tie_rank: int = 0
    before: frozenset[str] = field(default_factory=frozenset)

    def for_tensor(self, name: str) -> Cut:
        """The cut of one tensor."""
        if self.tie_tensor is None or name in self.before:
            return Cut(self.threshold)
        if name == self.tie_tensor:
            return Cut(self.threshold, self.tie_block, self.tie_rank)
        return Cut(self.threshold, 0, 0)


def _place_ties(threshold: float, quota: int, counts: list[tuple[str, int, Int64]]) -> ModelCut:
    """Where keeping entries equal to the threshold stops: tensor, block, and how many of that block."""
    before: set[str] = set()
    left = quota
    for name, first, blocks in counts:
        total = int(blocks.sum())
        if left <= total:
            from_start = np.cumsum(blocks)
            i = int(np.searchsorted(from_start, left))
            rank = left - (int(from_start[i - 1]) if i else 0)
            return ModelCut(threshold, name, first + i, rank, frozenset(before - {name}))
        left -= total
        before.add(name)
    raise AssertionError("more ties wanted than counted")


def select_model_wide(
    wants: list[Want], numel: int, values: Values = piece_tensors, sampled: bool = False
) -> Generator[Pass[Any, Any], Any, list[ModelCut]]:
    """Cuts that keep exactly ``want.keep`` of ``numel`` entries over everything the passes see.

    Yields the passes; returns one `ModelCut` per want, in order.
    """
    cuts: list[ModelCut | None] = [None] * len(wants)
    open_: list[int] = []
    for i, want in enumerate(wants):
        if want.keep <= 0:
            cuts[i] = ModelCut(float("inf"))
        elif want.keep >= numel:
            cuts[i] = ModelCut(0.0)
        else:
            open_.append(i)
    if open_:
        found = yield from _thresholds(values, [wants[i] for i in open_], numel, sampled)
        as_float = [float(np.int32(p.threshold).view(np.float32)) for p in found]
        partial = [(i, p, t) for i, p, t in zip(open_, found, as_float, strict=True) if 0 < t and p.quota < p.equal]
        for i, t in zip(open_, as_float, strict=True):
            cuts[i] = ModelCut(t)
        if partial:
            thresholds = [p.threshold or 0 for _, p, _ in partial]
            counted = yield _Ties(values, [wants[i] for i, _, _ in partial], thresholds)
            for (i, p, t), counts in zip(partial, counted, strict=True):
                cuts[i] = _place_ties(t, p.quota, counts)
    return [c for c in cuts if c is not None]


def select(
    call: Call, wants: list[Want], values: Values = piece_tensors
) -> Generator[Pass[Any, Any], Any, list[Cut]]:
    """Cuts that keep exactly ``want.keep`` entries of this tensor's value streams. See `select_model_wide`."""
    cuts = yield from select_model_wide(wants, call.numel, values, sampled=True)
    return [c.for_tensor(call.name) for c in cuts]
