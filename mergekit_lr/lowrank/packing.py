"""Packs one module's pairs of all tasks, and says what that left out; laid out by `mergekit_lr.lowrank.bundling`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint.dtypes import torch_dtype
from mergekit_lr.rewrite import Desk

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lr.linalg.lowrank import Pair
    from mergekit_lr.lowrank.positions import Packed


@dataclass(frozen=True)
class Side:
    """One side of a module: so many ``positions``, in groups of ``group``, with ``p`` basis vectors."""

    positions: int
    group: int
    p: int

    @property
    def groups(self) -> int:
        return -(-self.positions // self.group)

    def shapes(self, tasks: int, rank: int) -> list[tuple[str, tuple[int, ...]]]:
        """Kind and shape of each stored tensor."""
        found: list[tuple[str, tuple[int, ...]]] = [("mean", (self.positions, rank))]
        if self.p:
            found += [("basis", (self.p, self.positions, rank)), ("coef", (tasks, self.p, self.groups))]
        return found


@dataclass(frozen=True)
class PackCall:
    """What packing a module must know: the tasks' scales, and the two sides. ``dtype``: what is stored."""

    weight: str
    tasks: tuple[str, ...]
    scales: tuple[float, ...]
    rank: int
    a: Side
    b: Side
    gauge: str
    dtype: str


def canonical(pairs: Sequence[Pair], scales: Sequence[float], rank: int, gauge: str) -> list[Pair]:
    """Every pair with its scale folded in, in one gauge, cut or padded to ``rank``; fp64."""
    from mergekit_lr.lowrank.gauge import aligned, balanced, pad

    found = []
    for (b, a), scale in zip(pairs, scales, strict=True):
        left, right = balanced(b, a, scale)
        kept = min(rank, left.shape[1])
        found.append(pad(left[:, :kept], right[:kept], rank))
    return aligned(found) if gauge == "aligned" else found


def stacked(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """A's and B's positions of all tasks: ``[tasks, in, r]`` and ``[tasks, out, r]``."""
    from mergekit_lr.lazy import torch

    return torch.stack([a.T for _, a in pairs]), torch.stack([b for b, _ in pairs])


def spectra(call: PackCall, pairs: Sequence[Pair]) -> dict[str, Any]:
    """For each side the energy that each further direction takes off the error, and that of all tasks."""
    from mergekit_lr.lowrank.positions import spectrum

    found = {}
    for name, side, x in zip("ab", (call.a, call.b), stacked(pairs), strict=True):
        tail, energy = spectrum(x, side.group)
        found[name] = {"tail": tail.tolist(), "energy": energy}
    return found


def pack_module(call: PackCall, desk: Desk) -> None:
    """Write the stored tensors of one module, A's side and then B's, and note what the tasks lost.

    Noted: the spectra; for each task ``||B A - B' A'||_F`` of what comes back from the stored numbers, and ``||B
    A||_F``.
    """
    from mergekit_lr.lowrank.combine import distance
    from mergekit_lr.lowrank.positions import pack, unpack

    given = [(desk.read(2 * i), desk.read(2 * i + 1)) for i in range(len(call.tasks))]
    pairs = canonical(given, call.scales, call.rank, call.gauge)
    output, back = 0, []
    for side, x in zip((call.a, call.b), stacked(pairs), strict=True):
        packed = pack(x, side.p, side.group)
        stored = [packed.mean] if side.p == 0 else [packed.mean, packed.basis, packed.coef.transpose(0, 1)]
        for tensor in stored:
            desk.write(output, tensor.contiguous())
            output += 1
        back.append(_rounded(packed, call.dtype))
    errors = {}
    for i, task in enumerate(call.tasks):
        b, a = given[i]
        a_back, b_back = (unpack(p, i) for p in back)
        error, norm = distance((b.double() * call.scales[i], a), (b_back, a_back.T))
        errors[task] = {"error": error, "norm": norm}
    desk.note({"rank": call.rank, "p": [call.a.p, call.b.p], "tasks": errors, **spectra(call, pairs)})


def _rounded(packed: Packed, dtype: str) -> Packed:
    """The numbers as they will be read: stored in ``dtype``, widened to fp32."""
    from mergekit_lr.lowrank.positions import Packed as Kind

    kept = torch_dtype(dtype)
    mean, basis, coef = (t.to(kept).float() for t in (packed.mean, packed.basis, packed.coef))
    return Kind(mean, basis, coef, packed.group)


def group_of(granularity: str | int, positions: int) -> int:
    """Positions that share coefficients: 1, a number, or all of a tensor's."""
    if granularity == "position":
        return 1
    return positions if granularity == "tensor" else min(int(granularity), positions)


def stored_names(call: PackCall, letters: str = "AB") -> tuple[str, ...]:
    """The stored tensors of a module's sides, in the order in which codes take them."""
    sides = {"A": call.a, "B": call.b}
    return tuple(
        f"{kind}/{call.weight}/{x}" for x in letters for kind, _ in sides[x].shapes(len(call.tasks), call.rank)
    )
