"""How many basis vectors each module gets: one number for all, a byte budget, or an error target.

The error of packing is a sum over modules of spectra's tails, and one more direction costs a module always the same
number of bytes. So the best use of a budget takes directions by energy for each byte, the best first; a module's own
energies decrease, so they are taken in their order.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit_lr.errors import UsageError


@dataclass(frozen=True)
class Spectrum:
    """``tail[k]``: energy that direction k + 1 takes off the error; ``energy``: of all tasks; ``step``: its bytes."""

    tail: tuple[float, ...]
    energy: float
    step: int


def by_bytes(spectra: Mapping[str, Spectrum], budget: int) -> dict[str, int]:
    """p for each module such that all directions together fit into ``budget`` bytes.

    Raises:
        UsageError: the budget is negative: not even the means fit.
    """
    if budget < 0:
        raise UsageError(
            "the byte budget is too small",
            where="max_bytes",
            why=f"what is stored in any case takes {-budget} bytes more than that",
            fix="raise max_bytes, lower the rank, or pack fewer tasks",
        )
    chosen = dict.fromkeys(spectra, 0)
    queue = _queue(spectra)
    while queue:
        _, name, k = heapq.heappop(queue)
        if spectra[name].step > budget:
            continue  # a cheaper module's direction may still fit
        budget -= spectra[name].step
        _take(chosen, queue, spectra, name, k)
    return chosen


def by_error(spectra: Mapping[str, Spectrum], error: float) -> dict[str, int]:
    """The cheapest p for each module with ``sqrt(residual / energy) <= error`` over the whole model."""
    chosen = dict.fromkeys(spectra, 0)
    allowed = error**2 * math.fsum(s.energy for s in spectra.values())
    queue = _queue(spectra)
    left = math.fsum(t for s in spectra.values() for t in s.tail)
    while queue and left > allowed:
        _, name, k = heapq.heappop(queue)
        _take(chosen, queue, spectra, name, k)
        left = math.fsum(t for n, s in spectra.items() for t in s.tail[chosen[n] :])
    return chosen


def needed(spectra: Sequence[Spectrum], share: float = 0.99) -> int:
    """The smallest p that, given to every module, keeps ``share`` of the energy."""
    total = math.fsum(s.energy for s in spectra)
    longest = max((len(s.tail) for s in spectra), default=0)
    for p in range(longest):
        if math.fsum(t for s in spectra for t in s.tail[p:]) <= (1 - share) * total:
            return p
    return longest


def _queue(spectra: Mapping[str, Spectrum]) -> list[tuple[float, str, int]]:
    queue = [(-s.tail[0] / s.step, n, 0) for n, s in spectra.items() if s.tail]
    heapq.heapify(queue)
    return queue


def _take(
    chosen: dict[str, int], queue: list[tuple[float, str, int]], spectra: Mapping[str, Spectrum], name: str, k: int
) -> None:
    chosen[name] = k + 1
    tail = spectra[name].tail
    if k + 1 < len(tail):
        heapq.heappush(queue, (-tail[k + 1] / spectra[name].step, name, k + 1))
