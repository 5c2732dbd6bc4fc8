"""Passes that methods share: sums and inner products over fixed blocks.

A sum in fp32 depends on its order, so every sum here goes over blocks of `BLOCK` elements counted from the
tensor's start (or from the start of a row), each summed in fp32 by one kernel, and the blocks' sums are added
exactly (`math.fsum`). Cutting a tensor into pieces, in any order, on any number of threads, gives the same
bits. A block whose fp32 sum overflows, or is too small to be trusted, is summed again in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergekit_lr import host
from mergekit_lr.lazy import torch
from mergekit_lr.method import Call, Pass, Piece

if TYPE_CHECKING:
    from torch import Tensor

Float64 = npt.NDArray[np.float64]
Values = Callable[[Call, Piece], "list[Tensor]"]

BLOCK = 4_096
"""Elements summed by one kernel: divides `GRID`, too short for torch or a BLAS to split among threads."""
_ROWS = 256  # rows of a matrix whose products are held at once in fp64
_TINY, _HUGE = 1e-30, 3e38  # outside this an fp32 sum of products may have lost terms, or overflowed


def piece_tensors(call: Call, piece: Piece) -> list[Tensor]:
    """The inputs as the method gets them; the default `Values` of the passes below."""
    return piece.tensors


def exact_sum(values: Iterable[float]) -> float:
    """The correctly rounded sum (`math.fsum`), and NaN where infinities of both signs meet."""
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):
        return math.nan


def _rows(x: Tensor) -> list[Tensor]:
    """``[r, c]`` as blocks of every row: ``[r, c // BLOCK, BLOCK]`` and the rest ``[r, 1, c % BLOCK]``."""
    r, c = x.shape
    edge = c // BLOCK * BLOCK
    parts = [x[:, :edge].reshape(r, edge // BLOCK, BLOCK), x[:, edge:].reshape(r, 1, c - edge)]
    return [p for p in parts if p.numel()]


def _dots(pairs: list[tuple[Tensor, Tensor]]) -> Float64:
    """Inner products along the last axis, at most `BLOCK` long, of pairs of one shape: ``[pairs, ...]``.

    In fp32; the single sums that overflow, or are small enough to have lost terms, again in fp64.
    """
    if not host.through_numpy(pairs[0][0]):
        out: Float64 = torch.stack([(a * b).sum(-1) for a, b in pairs]).double().cpu().numpy()
    else:
        sums = np.empty((len(pairs), *pairs[0][0].shape[:-1]), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for (a, b), mine in zip(pairs, sums, strict=True):
                np.vecdot(a.numpy(), b.numpy(), out=mine)
        out = sums.astype(np.float64)
    size = np.abs(out)
    doubtful = ~((size >= _TINY) & (size <= _HUGE) | (size == 0))
    if doubtful.any():
        for (a, b), mine, again in zip(pairs, out, doubtful, strict=True):
            chosen = torch.from_numpy(again).to(a.device)
            mine[again] = (a[chosen].double() * b[chosen].double()).sum(-1).cpu().numpy()
    return out


def _total(x: Tensor) -> Float64:
    """Sums along the last axis, at most `BLOCK` long."""
    return x.sum(-1).double().cpu().numpy()


def row_sums(values: list[Tensor]) -> Float64:
    """Sum of each row of each tensor: n tensors fp32 ``[r, c]`` to float64 ``[n, r]``."""
    return np.stack([_add_blocks([_total(p) for p in _rows(v)], v.shape[0]) for v in values])


def blocked_row_sums(x: Tensor) -> Tensor:
    """Sum of each row of ``[r, c]``, in its dtype and on its device, block by block: an order that only c fixes."""
    total = x.new_zeros(x.shape[0])
    for part in _rows(x):
        for column in part.sum(-1).T:
            total += column
    return total


def row_products(values: list[Tensor]) -> Float64:
    """Inner products of every pair, row by row.

    Args:
        values: n tensors fp32 ``[r, c]``.

    Returns:
        float64 ``[n, n, r]``, symmetric in its first two axes.
    """
    n, r = len(values), values[0].shape[0]
    blocks = [_rows(v) for v in values]
    out = np.zeros((n, n, r))
    i, j = np.tril_indices(n)
    for part in range(len(blocks[0])):
        sums = _dots([(blocks[a][part], blocks[b][part]) for a, b in zip(i, j, strict=True)])
        for column in np.moveaxis(sums, -1, 0):  # block by block: an order that only the row fixes
            out[i, j] += column
    out[j, i] = out[i, j]
    return out


def column_products(values: list[Tensor]) -> Float64:
    """Inner products of every pair, column by column: n tensors fp32 ``[r, c]`` to float64 ``[n, n, c]``."""
    n, (rows, columns) = len(values), values[0].shape
    out = np.zeros((n, n, columns))
    for i in range(n):
        for j in range(i + 1):
            total = torch.zeros(columns, dtype=torch.float64, device=values[0].device)
            for a in range(0, rows, _ROWS):
                total += (values[i][a : a + _ROWS].double() * values[j][a : a + _ROWS]).sum(0)
            out[i, j] = out[j, i] = total.cpu().numpy()
    return out


def _add_blocks(parts: list[Float64], rows: int) -> Float64:
    """Block sums ``[r, blocks]`` added along each row, in fp64 and in an order that only the row fixes."""
    total = np.zeros(rows)
    for part in parts:
        for column in part.T:
            total = total + column
    return total


def _flat_blocks(x: Tensor) -> list[Tensor]:
    """The same of a whole tensor: ``[blocks, BLOCK]`` and ``[1, rest]``."""
    flat = x.reshape(-1)
    edge = flat.numel() // BLOCK * BLOCK
    parts = [flat[:edge].view(-1, BLOCK)] if edge else []
    return [*parts, flat[edge:].view(1, -1)] if edge < flat.numel() else parts


def block_sums(values: list[Tensor]) -> Float64:
    """Sum of each tensor over each block: n tensors of equal size, fp32, to float64 ``[n, blocks]``."""
    if not values[0].numel():
        return np.zeros((len(values), 0))
    return np.stack([np.concatenate([_total(p) for p in _flat_blocks(v)]) for v in values])


def block_products(values: list[Tensor]) -> Float64:
    """Inner products of every pair over each block: float64 ``[n(n + 1)/2, blocks]``, pairs (i, j <= i)."""
    return _block_dots(values, [(i, j) for i in range(len(values)) for j in range(i + 1)])


def block_squares(values: list[Tensor]) -> Float64:
    """Sum of squares of each tensor over each block: float64 ``[n, blocks]``."""
    return _block_dots(values, [(i, i) for i in range(len(values))])


def _block_dots(values: list[Tensor], pairs: list[tuple[int, int]]) -> Float64:
    parts = list(zip(*(_flat_blocks(v) for v in values), strict=True))
    found = [_dots([(part[i], part[j]) for i, j in pairs]) for part in parts]
    return np.concatenate(found, axis=1) if found else np.zeros((len(pairs), 0))


class _Blocked(Pass["list[Float64]", Any]):
    """Collects arrays ``[sums, blocks]``, one for each piece, in order."""

    def fold(self, total: list[Float64] | None, partial: list[Float64]) -> list[Float64]:
        if total is None:
            return partial
        total.extend(partial)  # ``total`` was made by this fold: growing it keeps the fold linear
        return total


@dataclass
class Gram(_Blocked):
    """Gram matrix of the inputs over the whole tensor: ``G_ij = sum_e x_i[e] x_j[e]``, float64 ``[n, n]``.

    For elementwise pieces.
    """

    values: Values = piece_tensors

    def map(self, call: Call, piece: Piece) -> list[Float64]:
        return [block_products(self.values(call, piece))]

    def finish(self, total: list[Float64]) -> Float64:
        sums = [exact_sum(pair) for pair in np.concatenate(total, axis=1)]
        n = (math.isqrt(8 * len(sums) + 1) - 1) // 2
        gram = np.zeros((n, n))
        gram[np.tril_indices(n)] = sums
        return gram + np.tril(gram, -1).T


@dataclass
class Sum(_Blocked):
    """Sum over the whole tensor of each value that ``values`` gives: float64 ``[n]``.

    ``by_row`` for rowwise pieces, whose starts are not on the grid.
    """

    values: Values = piece_tensors
    by_row: bool = False

    def map(self, call: Call, piece: Piece) -> list[Float64]:
        values = self.values(call, piece)
        return [row_sums(values) if self.by_row else block_sums(values)]

    def finish(self, total: list[Float64]) -> Float64:
        return np.array([exact_sum(row) for row in np.concatenate(total, axis=1)])


@dataclass
class SquareSum(_Blocked):
    """Sum of squares over the whole tensor of each value that ``values`` gives: float64 ``[n]``.

    For elementwise pieces.
    """

    values: Values = piece_tensors

    def map(self, call: Call, piece: Piece) -> list[Float64]:
        return [block_squares(self.values(call, piece))]

    def finish(self, total: list[Float64]) -> Float64:
        return np.array([exact_sum(row) for row in np.concatenate(total, axis=1)])


@dataclass
class CountNonzero(Pass["list[int]", "list[int]"]):
    """How many elements of each value are not zero."""

    values: Values = piece_tensors

    def map(self, call: Call, piece: Piece) -> list[int]:
        return [int(torch.count_nonzero(v)) for v in self.values(call, piece)]

    def fold(self, total: list[int] | None, partial: list[int]) -> list[int]:
        return partial if total is None else [a + b for a, b in zip(total, partial, strict=True)]

    def finish(self, total: list[int]) -> list[int]:
        return total
