"""Keep the k largest magnitudes of a tensor, exactly, without sorting it and without holding it.

A sample brackets each wanted threshold. One pass counts what lies above the bracket and collects what lies in it
(or, where that is too much, counts each magnitude in it); the threshold is an order statistic of that. If a
bracket misses or is too wide, two passes of histograms over the 31 magnitude bits find the same threshold in
bounded memory. Entries equal to the threshold are kept by lowest index until k is reached, so a selection
holds exactly k entries and does not depend on slices.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_lr.lazy import torch
from mergekit_lr.magnitudes import (
    INFINITY,
    LOW_BITS,
    BlockCounts,
    Bracket,
    Collect,
    Collected,
    Count,
    Histogram,
    Int64,
    Ties,
    Want,
    magnitude_bits,
)
from mergekit_lr.method import GRID, Call, Pass
from mergekit_lr.sampling import Sample
from mergekit_lr.statistics import Values, piece_tensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Cut",
    "ModelCut",
    "Want",
    "count_to_keep",
    "magnitude_bits",
    "order_statistics",
    "select",
    "select_model_wide",
]

SMALL = 1 << 20  # up to this many elements everything is collected: a sample would have few places
MOST_COLLECTED = 1 << 22  # entries of one stream that may be collected: 16 MiB
MOST_COUNTED = 1 << 18  # distinct magnitudes in a bracket that may be counted


def count_to_keep(density: float, numel: int) -> int:
    """How many of ``numel`` entries a density keeps: ``int(density * numel)``, within 0..numel."""
    return max(0, min(numel, int(density * numel)))


@dataclass(frozen=True)
class Cut:
    """The answer: keep ``|x| > threshold``, and the first few entries equal to it.

    ``threshold`` is the k-th largest magnitude (infinity keeps nothing, 0 keeps everything). Entries equal
    to it are kept in blocks (of `GRID` elements) before ``tie_block``, and the first ``tie_rank`` of that
    block.
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
        if a == b:
            kept = self._keep_ties(flat) if a else torch.nn.functional.hardshrink(flat, self.threshold)
            return kept.reshape(x.shape)
        out = torch.empty_like(flat)
        out[:a] = self._keep_ties(flat[:a])
        out[a:b] = self._keep_first_ties(flat[a:b])  # pieces start on the grid: this is the whole block
        out[b:] = torch.nn.functional.hardshrink(flat[b:], self.threshold)
        return out.reshape(x.shape)

    def _keep_ties(self, x: Tensor) -> Tensor:
        below = float(np.nextafter(np.float32(self.threshold), np.float32(0)))
        return torch.nn.functional.hardshrink(x, below)

    def _keep_first_ties(self, block: Tensor) -> Tensor:
        ties = block.abs() == self.threshold
        early = ties.cumsum(0) <= self.tie_rank
        return torch.nn.functional.hardshrink(block, self.threshold) + block * (ties & early)


KEEP_NOTHING = Cut(float("inf"), 0, 0)
KEEP_ALL = Cut(0.0)


@dataclass
class _Found:
    """What is known of one want: its threshold (bits), and how many of the entries equal to it are kept."""

    threshold: int
    quota: int
    equal: int
    ties: BlockCounts | None = None


def _from_collected(want: Want, got: Collected) -> _Found | None:
    """The threshold from collected magnitudes, or None where the bracket missed it."""
    inside = np.concatenate(got.parts)
    rank = want.keep - got.above
    if not 0 < rank <= inside.size:
        return None
    ordered = np.sort(inside)  # faster than a partition where, as in 16-bit weights, many magnitudes are equal
    threshold = int(ordered[inside.size - rank])
    first, after = np.searchsorted(ordered, np.array([threshold, threshold + 1], np.int32))
    quota, equal = rank - int(inside.size - after), int(after - first)
    return _Found(threshold, quota, equal, got.ties(threshold) if quota < equal else None)


def _from_counts(bracket: Bracket, above: int, counts: Int64) -> _Found | None:
    rank = bracket.want.keep - above
    if not 0 < rank <= counts.sum():
        return None
    at, quota = _bin_of(counts, rank)
    return _Found(bracket.low + at, quota, int(counts[at]))


def _bin_of(counts: Int64, rank: int) -> tuple[int, int]:
    """(bin, rank within it) of the rank-th largest entry, ``counts`` by ascending magnitude."""
    from_top = np.cumsum(counts[::-1])
    i = int(np.searchsorted(from_top, rank))
    before = int(from_top[i - 1]) if i else 0
    return counts.size - 1 - i, rank - before


def _narrow(values: Values, wants: list[Want], numel: int) -> Generator[Pass[Any, Any], Any, list[_Found | None]]:
    """Thresholds by a sample and one pass; None for a want whose bracket missed or was too wide."""
    if numel <= SMALL:
        collected = yield Collect(values, [Bracket(w, 0, INFINITY) for w in wants])
        return [_from_collected(w, got) for w, got in zip(wants, collected, strict=True)]
    samples = yield Sample(values, numel)
    collect: list[Bracket] = []
    count: list[Bracket] = []
    for b in filter(None, (samples[w.stream].bracket(w) for w in wants)):
        if samples[b.want.stream].share(b) * numel <= MOST_COLLECTED:
            collect.append(b)
        elif b.high - b.low < MOST_COUNTED:
            count.append(b)
    got: dict[Want, _Found | None] = {}
    if collect:
        collected = yield Collect(values, collect)
        got |= {b.want: _from_collected(b.want, c) for b, c in zip(collect, collected, strict=True)}
    if count:
        counted = yield Count(values, count)
        got |= {b.want: _from_counts(b, *c) for b, c in zip(count, counted, strict=True)}
    return [got.get(w) for w in wants]


def _by_histogram(values: Values, wants: list[Want]) -> Generator[Pass[Any, Any], Any, list[_Found]]:
    """Thresholds by two passes: the high 16 bits of every magnitude, then the low 15 of those in one bin."""
    high = yield Histogram(values, wants)
    located = [_bin_of(counts, w.keep)[0] << LOW_BITS for counts, w in zip(high, wants, strict=True)]
    brackets = [Bracket(w, a, a + (1 << LOW_BITS) - 1) for w, a in zip(wants, located, strict=True)]
    counted = yield Count(values, brackets)
    found = [_from_counts(b, *c) for b, c in zip(brackets, counted, strict=True)]
    return [f for f in found if f is not None]


def order_statistics(values: Values, ranks: list[int]) -> Generator[Pass[Any, Any], Any, list[float]]:
    """The magnitudes of the first stream that are the 1st, 2nd, ... largest, for each of ``ranks`` from 1.

    Two looks, whatever the pieces: unlike `select` it places no ties, so pieces need not start on the grid.
    """
    found = yield from _by_histogram(values, [Want(0, r) for r in ranks])
    return [float(np.int32(f.threshold).view(np.float32)) for f in found]


def _thresholds(values: Values, wants: list[Want], numel: int) -> Generator[Pass[Any, Any], Any, list[_Found]]:
    found = yield from _narrow(values, wants, numel)
    missed = [i for i, f in enumerate(found) if f is None]
    if missed:
        exact = yield from _by_histogram(values, [wants[i] for i in missed])
        for i, one in zip(missed, exact, strict=True):
            found[i] = one
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


def _place_ties(threshold: float, quota: int, counts: BlockCounts) -> ModelCut:
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
    wants: list[Want], numel: int, values: Values = piece_tensors
) -> Generator[Pass[Any, Any], Any, list[ModelCut]]:
    """Cuts that keep exactly ``want.keep`` of ``numel`` entries over everything the passes see.

    Yields the passes; returns one `ModelCut` per want, in order. ``values`` may give an empty stream where a
    tensor does not compete; such a want says among how many it chooses.
    """
    cuts = [ModelCut(0.0)] * len(wants)
    open_: list[int] = []
    for i, want in enumerate(wants):
        if want.keep <= 0:
            cuts[i] = ModelCut(float("inf"), "", 0, 0)
        elif want.keep < (numel if want.among is None else want.among):
            open_.append(i)
    if not open_:
        return cuts
    found = yield from _thresholds(values, [wants[i] for i in open_], numel)
    unplaced: list[tuple[int, _Found]] = []
    for i, one in zip(open_, found, strict=True):
        cuts[i] = ModelCut(float(np.int32(one.threshold).view(np.float32)))
        if one.threshold == 0 or one.quota == one.equal:
            continue
        if one.ties is not None:
            cuts[i] = _place_ties(cuts[i].threshold, one.quota, one.ties)
        else:
            unplaced.append((i, one))
    if unplaced:
        counted = yield Ties(values, [wants[i] for i, _ in unplaced], [one.threshold for _, one in unplaced])
        for (i, one), counts in zip(unplaced, counted, strict=True):
            cuts[i] = _place_ties(cuts[i].threshold, one.quota, counts)
    return cuts


def select(call: Call, wants: list[Want], values: Values = piece_tensors) -> Generator[Pass[Any, Any], Any, list[Cut]]:
    """Cuts that keep exactly ``want.keep`` entries of this tensor's streams. See `select_model_wide`."""
    cuts = yield from select_model_wide(wants, call.numel, values)
    return [c.for_tensor(call.name) for c in cuts]
