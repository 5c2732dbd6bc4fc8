"""Passes that methods share: sums of products over fixed blocks.

A sum in fp32 depends on its order, so every sum here goes over blocks of `GRID` elements counted from the
tensor's start, each summed in fp32 by one kernel, and the blocks' sums are added exactly (`math.fsum`). Cutting
a tensor into pieces, in any order, on any number of threads, gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mergekit_lr.lazy import torch
from mergekit_lr.method import GRID, Call, Pass, Piece

if TYPE_CHECKING:
    from torch import Tensor

Float64 = npt.NDArray[np.float64]
Values = Callable[[Call, Piece], "list[Tensor]"]


def piece_tensors(call: Call, piece: Piece) -> list[Tensor]:
    """The inputs as the method gets them; the default `Values` of the passes below."""
    return piece.tensors


def block_sums(values: list[Tensor]) -> Float64:
    """Sum of each tensor over each block of `GRID` elements.

    Args:
        values: n tensors of equal size, fp32; flattened here.

    Returns:
        float64 ``[n, blocks]``: fp32 sums, one block each.
    """
    rows = [[block.sum() for block in v.reshape(-1).split(GRID)] for v in values]
    return torch.stack([torch.stack(row) for row in rows]).double().cpu().numpy()


def block_products(values: list[Tensor]) -> Float64:
    """Inner products of every pair over each block: float64 ``[n (n + 1) / 2, blocks]``, pairs (i, j <= i)."""
    out: list[Tensor] = []
    for blocks in zip(*(v.reshape(-1).split(GRID) for v in values), strict=True):
        pairs = [(a * b).sum() for i, a in enumerate(blocks) for b in blocks[: i + 1]]
        out.append(torch.stack(pairs))
    return torch.stack(out, dim=1).double().cpu().numpy()


@dataclass
class Gram(Pass["list[Float64]", Float64]):
    """Gram matrix of the inputs over the whole tensor: ``G_ij = sum_e x_i[e] x_j[e]``, float64 ``[n, n]``."""

    values: Values = piece_tensors

    def map(self, call: Call, piece: Piece) -> list[Float64]:
        return [block_products(self.values(call, piece))]

    def fold(self, total: list[Float64] | None, partial: list[Float64]) -> list[Float64]:
        return partial if total is None else total + partial

    def finish(self, total: list[Float64]) -> Float64:
        sums = [math.fsum(pair) for pair in np.concatenate(total, axis=1)]
        n = int((math.isqrt(8 * len(sums) + 1) - 1) // 2)
        gram = np.zeros((n, n))
        gram[np.tril_indices(n)] = sums
        return gram + np.tril(gram, -1).T


@dataclass
class Sum(Pass["list[Float64]", Float64]):
    """Sum over the whole tensor of each value that ``values`` gives: float64 ``[n]``."""

    values: Values = piece_tensors

    def map(self, call: Call, piece: Piece) -> list[Float64]:
        return [block_sums(self.values(call, piece))]

    def fold(self, total: list[Float64] | None, partial: list[Float64]) -> list[Float64]:
        return partial if total is None else total + partial

    def finish(self, total: list[Float64]) -> Float64:
        return np.array([math.fsum(row) for row in np.concatenate(total, axis=1)])
