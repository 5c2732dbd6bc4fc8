"""How tasks come back from a bundle of `reversible`: a weight from its base and packed factors, or a factor alone.

Stored for each side of a module (A: one position for each input, B: one for each output): ``mean`` ``[positions, r]``
and, where p > 0, ``basis`` ``[p, positions, r]`` and ``coef`` ``[tasks, p, groups]``; see
`mergekit_lr.lowrank.positions`. A side's ``call`` is ``[p, group]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mergekit_lr.bundle.codes import Code
from mergekit_lr.bundle.manifest import Recovered
from mergekit_lr.checkpoint.lora import block_rows
from mergekit_lr.lazy import torch
from mergekit_lr.rewrite import Desk

if TYPE_CHECKING:
    from torch import Tensor


def read_side(desk: Desk, first: int, p: int, group: int, row: int) -> Tensor:
    """``mu + V c`` of one task, ``[positions, r]`` in fp32, from the parts that begin at ``first``.

    Parts are read whole, so that their digests can be checked; they are small beside the weight.
    """
    out = desk.read(first).clone()
    if p == 0:
        return out
    basis, coef = desk.read(first + 1), desk.read(first + 2)[row]
    for k in range(p):
        weights = coef[k].repeat_interleave(group)[: out.shape[0]]
        out += basis[k] * weights.unsqueeze(1)
    return out


def parts_of(p: int) -> int:
    """How many stored tensors a side has."""
    return 3 if p else 1


class Factor(Code):
    r"""One factor of one task: ``mu + V c_t``, ``[positions, r]``; its transpose where ``turned``.

    Parts: a side's. ``call``: ``side``, ``turned``, and ``row`` of the task.
    """

    name = "factor"
    whole = True

    def decode(self, wanted: Recovered, desk: Desk, start: int = 0, stop: int | None = None) -> None:
        p, group = wanted.call["side"]
        found = read_side(desk, 0, p, group, wanted.call["row"])
        desk.write(0, (found.T if wanted.call["turned"] else found).contiguous())


class LowRank(Code):
    r"""``W = base + B_t A_t``, or its transpose for a weight stored ``[in, out]``; with DoRA ``m V / ||V||`` of that V.

    Parts: the base, A's side, B's side, and DoRA's magnitude. ``call``: ``a`` and ``b`` (the sides), ``transposed``,
    ``dora``, and ``row`` of the task. fp32, rounded once; products in blocks of rows that are anchored at row 0, so
    that bits do not depend on where the tensor is cut.
    """

    name = "low_rank"

    def decode(self, wanted: Recovered, desk: Desk, start: int = 0, stop: int | None = None) -> None:
        call, n = wanted.call, wanted.numel
        stop = n if stop is None else stop
        second = 1 + parts_of(call["a"][0])
        a = read_side(desk, 1, call["a"][0], call["a"][1], call["row"])
        b = read_side(desk, second, call["b"][0], call["b"][1], call["row"])
        left, right = (a, b) if call["transposed"] else (b, a)
        right = right.T.contiguous()
        scale = None
        if call["dora"]:
            magnitude = desk.read(second + parts_of(call["b"][0]))
            scale = _scales(desk, wanted.shape, left, right, magnitude, by_column=call["transposed"])
        for value, top in _blocks(desk, wanted.shape, left, right, start, stop):
            if scale is not None:
                value.mul_(scale if call["transposed"] else scale[top : top + value.shape[0], None])
            first = top * wanted.shape[1]
            lower, upper = max(start, first), min(stop, first + value.numel())
            desk.write(0, value.view(-1)[lower - first : upper - first], lower)

    def fixed(self, wanted: Recovered) -> int:
        """Both factors, what they are made of, and three blocks of rows."""
        rows, columns = wanted.shape
        directions = sum(1 + int(wanted.call[side][0]) for side in "ab")
        rank = max(1, int(wanted.call["rank"]))
        return 4 * rank * (rows + columns) * (directions + 3) + 12 * block_rows(columns) * columns


def _blocks(
    desk: Desk, shape: tuple[int, ...], left: Tensor, right: Tensor, start: int, stop: int
) -> Iterator[tuple[Tensor, int]]:
    """``base + left right`` for every block of rows that holds some of ``start .. stop``, with its first row."""
    rows, columns = shape
    step = block_rows(columns)
    for top in range(start // max(columns, 1) // step * step, rows, step):
        bottom = min(top + step, rows)
        if top * columns >= stop:
            break
        base = desk.read(0, top * columns, bottom * columns).view(-1, columns)
        yield torch.mm(left[top:bottom], right).add_(base), top


def _scales(
    desk: Desk, shape: tuple[int, ...], left: Tensor, right: Tensor, magnitude: Tensor, *, by_column: bool
) -> Tensor:
    """``m / ||V||`` for each row (each column where the weight is stored the other way), one pass over the base."""
    squares = []
    total = torch.zeros(shape[1], dtype=torch.float64, device=magnitude.device)
    for value, _ in _blocks(desk, shape, left, right, 0, math.prod(shape)):
        wide = value.double().square_()
        if by_column:
            total += wide.sum(0)
        else:
            squares.append(wide.sum(1))
    norms = (total if by_column else torch.cat(squares)).sqrt_().float()
    return magnitude / norms
