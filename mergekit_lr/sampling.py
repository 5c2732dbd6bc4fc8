"""Where a threshold probably lies: brackets from a sample of a tensor, or of a whole model tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mergekit_lr.magnitudes import INFINITY, Bracket, Int32, Int64, Want, magnitude_bits
from mergekit_lr.method import GRID, Call, Pass, Piece
from mergekit_lr.pieces import SAMPLED_PLACES
from mergekit_lr.statistics import Values


@dataclass
class Stratum:
    """A sample of one tensor's magnitudes: at several places, in order, ``sizes`` at each."""

    name: str
    numel: int
    streams: list[list[Int32]]

    def absorb(self, other: Stratum) -> None:
        """Take in another place of the same tensor."""
        for mine, new in zip(self.streams, other.streams, strict=True):
            mine.extend(new)


@dataclass
class Samples:
    """What a sample says of one stream: magnitudes place by place, tensor by tensor."""

    bits: Int32
    sizes: Int64  # of each place
    tensors: Int64  # of each place
    weights: npt.NDArray[np.float64]  # of each place: how many entries one sampled entry stands for

    @property
    def numel(self) -> float:
        """Entries that the sample stands for."""
        return float(np.dot(self.weights, self.sizes))

    @cached_property
    def _ranked(self) -> tuple[Int32, npt.NDArray[Any]]:
        """The sampled magnitudes in ascending order, and how many entries lie up to each of them."""
        if self.weights.min() == self.weights.max():  # one tensor: its values alone are sorted, ten times faster
            return np.sort(self.bits), np.arange(1, self.bits.size + 1) * self.weights[0]
        order = np.argsort(self.bits, kind="stable")
        return self.bits[order], np.cumsum(np.repeat(self.weights, self.sizes)[order])

    def bracket(self, want: Want) -> Bracket | None:
        """Magnitudes that hold the wanted threshold nearly always; None where there is nothing to go by.

        The margin is four standard errors of the number of entries above the threshold, as the places of one
        tensor differ among themselves; so it widens where the rows of a tensor differ.
        """
        if not self.bits.size:
            return None
        bits, below = self._ranked
        target = below[-1] - want.keep
        middle = bits[min(int(np.searchsorted(below, target)), bits.size - 1)]
        margin = 4 * self._error(int(middle)) + 8 * float(self.weights.max())
        i = int(np.searchsorted(below, target - margin)) - 1
        j = int(np.searchsorted(below, target + margin)) + 1
        low = int(bits[i]) if i >= 0 else 0
        high = int(bits[j]) if j < bits.size else INFINITY
        return Bracket(want, low, high)

    def _error(self, middle: int) -> float:
        """Standard error of the estimated number of entries above ``middle``."""
        above = self._counts(self.bits > np.int32(middle))
        share = np.bincount(self.tensors, above) / np.bincount(self.tensors, self.sizes)
        mine = share[self.tensors]
        between = np.sum((self.weights * (above - mine * self.sizes)) ** 2)
        within = np.sum(self.weights**2 * mine * (1 - mine) * self.sizes)
        return float(np.sqrt(max(between, within)))

    def share(self, bracket: Bracket) -> float:
        """Estimated share of entries inside ``bracket``."""
        inside = self._counts((self.bits >= bracket.low) & (self.bits <= bracket.high))
        return float(np.dot(self.weights, inside)) / self.numel

    def _counts(self, chosen: npt.NDArray[np.bool_]) -> Int64:
        """How many are chosen at each place."""
        before = np.concatenate([[0], np.cumsum(chosen)])
        edges = np.concatenate([[0], np.cumsum(self.sizes)])
        counts: Int64 = np.diff(before[edges])
        return counts


@dataclass
class Sample(Pass["list[Stratum]", "list[Samples]"]):
    """Magnitudes at a few places. The engine hands it short pieces spread over each tensor.

    Of ``numel`` entries in all about ``most`` are kept, in proportion to the tensors' sizes.
    """

    sample = 1024
    values: Values
    numel: int
    most: int = 1 << 20

    def map(self, call: Call, piece: Piece) -> list[Stratum]:
        flat = [v.reshape(-1) for v in self.values(call, piece)]
        places = min(-(-call.numel // GRID), SAMPLED_PLACES)
        wanted = self.most * call.numel / (self.numel * places)  # this piece's share of all samples
        stride = max(1, int(max(v.numel() for v in flat) / max(wanted, 1)))
        kept = [[magnitude_bits(v[::stride]).cpu().numpy()] if v.numel() else [] for v in flat]
        return [Stratum(call.name, call.numel, kept)]

    def fold(self, total: list[Stratum] | None, partial: list[Stratum]) -> list[Stratum]:
        if total is None:
            return partial
        for one in partial:
            if total[-1].name == one.name:
                total[-1].absorb(one)
            else:
                total.append(one)
        return total

    def finish(self, total: list[Stratum]) -> list[Samples]:
        return [self._stream([(t.numel, t.streams[s]) for t in total]) for s in range(len(total[0].streams))]

    def _stream(self, found: list[tuple[int, list[Int32]]]) -> Samples:
        places = [(i, numel, part) for i, (numel, parts) in enumerate(found) for part in parts]
        sizes = np.array([part.size for _, _, part in places], dtype=np.int64)
        tensors = np.array([i for i, _, _ in places], dtype=np.int64)
        seen = np.bincount(tensors, sizes, minlength=1)
        weights = np.array([numel for _, numel, _ in places], dtype=np.float64) / seen[tensors]
        parts = [part for _, _, part in places]
        return Samples(np.concatenate(parts) if parts else np.zeros(0, np.int32), sizes, tensors, weights)
