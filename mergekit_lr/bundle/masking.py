"""Making a bundle's masks: one tensor of all tasks, streamed once, or twice where lambda is fitted to it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_lr.bundle.codes import steps
from mergekit_lr.bundle.masks import pack, packed_bytes
from mergekit_lr.checkpoint.dtypes import torch_dtype
from mergekit_lr.lazy import torch
from mergekit_lr.localize import elected, summed, wanted
from mergekit_lr.method import GRID, Call, Parameters, Pass, Piece
from mergekit_lr.pieces import drive, fold_all, sample_spans
from mergekit_lr.rewrite import Desk
from mergekit_lr.selection import Cut
from mergekit_lr.sparsify import LargestMagnitude

if TYPE_CHECKING:
    from torch import Tensor

FITTED = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""Lambdas that a data-free choice is made from: the paper's grid, and on to the best for a factor of one."""
TRIM = LargestMagnitude()


@dataclass(frozen=True)
class Packing:
    """One tensor of a bundle. ``lambdas``: one for each task, None where it is fitted to the tensor.

    ``cuts``: what is kept of each task vector, where that is known; otherwise it is found in the tensor. ``learned``:
    for each task the input that is its mask, packed; empty where thresholds make them.
    """

    name: str
    shape: tuple[int, ...]
    stored: tuple[str, ...]  # dtype codes of the base and of each task
    out: str
    lambdas: tuple[float | None, ...]
    ties: bool
    density: float
    factor: bool
    cuts: tuple[Cut, ...] = ()
    learned: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Trimming(Parameters):
    """What `TRIM` must know of a merge."""

    threshold_scope: str = "tensor"


class Share(Parameters):
    """What `TRIM` must know of a model."""

    density: float


@dataclass
class Part:
    """Elements of all tasks on the grid: deltas, the multi-task vector as it is stored, and that widened again."""

    deltas: list[Tensor]
    narrow: Tensor
    vector: Tensor


def pack_tensor(job: Packing, desk: Desk) -> dict[str, Any]:
    """Outputs 0 base, 1 vector, then one mask for each task, and ``fit [tasks, 2]`` where a factor is wanted.

    Masks are made against the vector as it is stored, rounded, so a reader can make them again from a bundle.
    Returns densities and, where they were fitted, lambdas and factors, for the report.
    """
    parts = Parts(job, desk)
    tasks = len(job.lambdas)
    lambdas = parts.fitted() if None in job.lambdas else [x for x in job.lambdas if x is not None]
    sums = [_Sums() for _ in range(tasks)]
    kept = [0] * tasks
    for start, raw in parts.blocks():
        n = raw[0].numel()
        narrow = torch.empty(n, dtype=torch_dtype(job.out), device=raw[0].device)
        masks = [torch.empty(packed_bytes(n), dtype=torch.uint8) for _ in range(tasks)]
        for s in range(0, n, GRID):
            e = min(n, s + GRID)
            part = parts.part(raw, start, s, e)
            narrow[s:e] = part.narrow
            for t, (d, lam) in enumerate(() if job.learned else zip(part.deltas, lambdas, strict=True)):
                mask = wanted(d, part.vector, lam)
                kept[t] += int(torch.count_nonzero(mask))
                masks[t][s // 8 : packed_bytes(e)] = pack(mask)
                if job.factor:
                    sums[t].add(mask, part.vector, d)
        desk.write(0, raw[0], start)
        desk.write(1, narrow, start)
        for t, given in enumerate(job.learned):
            masks[t] = desk.read(given, start // 8, packed_bytes(start + n), dtype=torch.uint8)
            kept[t] += int(np.bitwise_count(masks[t].cpu().numpy()).sum())
        for t, packed in enumerate(masks):
            desk.write(2 + t, packed, start // 8)
    facts: dict[str, Any] = {"density": [round(k / max(job.numel, 1), 6) for k in kept]}
    if job.factor:
        factors = [s.factor() for s in sums]
        desk.write(2 + tasks, torch.tensor(list(zip(lambdas, factors, strict=True)), dtype=torch.float32))
        facts |= {"lambda": lambdas, "factor": factors}
    return facts


class _Sums:
    """``<m tau, D>`` and ``|m tau|^2`` over pieces on the grid, in fp64 and in piece order."""

    def __init__(self) -> None:
        self.inner: list[float] = []
        self.square: list[float] = []

    def add(self, mask: Tensor, vector: Tensor, delta: Tensor) -> None:
        chosen = (vector * mask).double()
        self.inner.append(float(torch.dot(chosen, delta.double())))
        self.square.append(float(torch.dot(chosen, chosen)))

    def gain(self) -> float:
        """What the best factor takes off ``|f m tau - D|^2``: ``<m tau, D>^2 / |m tau|^2``."""
        square = math.fsum(self.square)
        return math.fsum(self.inner) ** 2 / square if square > 0 else 0.0

    def factor(self) -> float:
        """``<m tau, D> / |m tau|^2`` as a bf16 number; 1 for an empty mask."""
        square = math.fsum(self.square)
        best = math.fsum(self.inner) / square if square > 0 else 1.0
        return float(torch.tensor(best, dtype=torch.float64).to(torch.bfloat16))


class Parts:
    """The inputs of one tensor, block by block; held where one block is all."""

    def __init__(self, job: Packing, desk: Desk) -> None:
        self.job, self.desk = job, desk
        self._held: list[Tensor] | None = None
        self._cuts: Any = None
        self._call = Call(
            name=job.name,
            shape=job.shape,
            merge=Trimming(),
            models=(Share(density=job.density),) * len(job.lambdas),
            has_base=True,
        )
        if job.ties:
            self._cuts = list(job.cuts) or drive(TRIM.statistics(self._call, None), self._look)

    def blocks(self) -> Iterator[tuple[int, list[Tensor]]]:
        """(first element, base and tasks as stored)."""
        if self._held is not None:
            yield 0, self._held
            return
        for a, b in steps(self.desk, 0, self.job.numel):
            raw = [self.desk.read(i, a, b, dtype=torch_dtype(d)) for i, d in enumerate(self.job.stored)]
            if b - a == self.job.numel:
                self._held = raw
            yield a, raw

    def part(self, raw: Sequence[Tensor], start: int, s: int, e: int) -> Part:
        """Elements ``s .. e`` of a block that begins at ``start``."""
        deltas = _deltas(raw, s, e)
        if self.job.ties:
            piece = Piece(deltas, None, start + s)
            vector = elected([TRIM.apply(self._call, piece, self._cuts, i) for i in range(len(deltas))])
        else:
            vector = summed(deltas)
        narrow = vector.to(torch_dtype(self.job.out))
        return Part(deltas, narrow, narrow.to(torch.float32))

    def fitted(self) -> list[float]:
        """For each task whose lambda is open the one that leaves least of it, with the factor that is best then.

        Without a factor that is 1 whatever the tensors: at every entry the mask then keeps what brings ``m tau``
        nearer to the task vector.
        """
        job = self.job
        if not job.factor:
            return [1.0 if lam is None else lam for lam in job.lambdas]
        sums = [[_Sums() for _ in FITTED] for _ in job.lambdas]
        for start, raw in self.blocks():
            for s in range(0, raw[0].numel(), GRID):
                part = self.part(raw, start, s, min(raw[0].numel(), s + GRID))
                for mine, d, given in zip(sums, part.deltas, job.lambdas, strict=True):
                    for one, lam in zip(mine, FITTED if given is None else (), strict=False):
                        one.add(wanted(d, part.vector, lam), part.vector, d)
        best = [max(range(len(FITTED)), key=lambda i: (mine[i].gain(), FITTED[i])) for mine in sums]
        return [FITTED[b] if lam is None else lam for b, lam in zip(best, job.lambdas, strict=True)]

    def _look(self, asked: Pass[Any, Any]) -> Any:
        return fold_all(asked, self._pieces(asked.sample))

    def _pieces(self, sample: int | None) -> Iterator[tuple[Call, Piece]]:
        if sample:
            for span in sample_spans(self.job.shape, sample):
                raw = [
                    self.desk.read(i, span.start, span.stop, dtype=torch_dtype(d))
                    for i, d in enumerate(self.job.stored)
                ]
                yield self._call, Piece(_deltas(raw, 0, span.numel), None, span.start)
            return
        for start, raw in self.blocks():
            n = raw[0].numel()
            for s in range(0, n, GRID) or [0]:
                yield self._call, Piece(_deltas(raw, s, min(n, s + GRID)), None, start + s)


def _deltas(raw: Sequence[Tensor], s: int, e: int) -> list[Tensor]:
    base = raw[0][s:e].to(torch.float32)
    return [x[s:e].to(torch.float32).sub_(base) for x in raw[1:]]
