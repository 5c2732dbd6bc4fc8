"""Gram matrices read once, half computed, and measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lr.linalg.blocks import Blocks, Side
from mergekit_lr.linalg.kernels import gram_kernel

ROWS = 192
"""Rows of one strip of the lower triangle: measured best on AVX-512 for orders 768-4096."""


@dataclass(frozen=True)
class Probe:
    """Exact looks at the Gram: ``images = G signs`` and ``trace = tr G = ||M||_F^2``, both in fp64."""

    signs: Tensor  # [n, k], +-1, fp64
    images: Tensor  # [n, k], fp64
    trace: float


def gram(blocks: Blocks, side: Side | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """``G = M M^T`` (LEFT) or ``M^T M`` (RIGHT) of ``M = [W_1 ... W_k]``, ``[n, n]``, exactly symmetric.

    Only the lower triangle is computed, ``n^2 d`` flops; the concatenation and fp32 copies of half-precision
    inputs are never materialised (one piece of 2 M elements at a time). Operands of bf16 or fp16 are exact in
    fp32, so only the accumulation rounds: measured ``||G_hat - G|| / ||G||`` is 1e-7 to 6e-7 with fp32, 1e-15
    with fp64.

    Args:
        blocks: the matrices.
        side: which Gram; the smaller one by default.
        dtype: accumulation, fp32 or fp64; by default that of ``blocks``.
    """
    side = side or blocks.small_side
    dtype = dtype or blocks.dtype
    fused = gram_kernel(blocks, side, dtype)
    if fused is not None:
        return fused
    n = blocks.order(side)
    out = torch.zeros(n, n, dtype=dtype, device=blocks.device)
    for x in blocks.pieces(side, dtype):
        _add_lower(out, x)
    return _mirrored(out)


def outer_product(x: Tensor) -> Tensor:
    """``X X^T``, computed by half and symmetric to the bit."""
    return _mirrored(_add_lower(x.new_zeros(x.shape[0], x.shape[0]), x))


def _strips(g: Tensor) -> list[tuple[int, int]]:
    strip = ROWS if g.device.type == "cpu" else 2048
    return [(i, min(i + strip, g.shape[0])) for i in range(0, g.shape[0], strip)]


def _add_lower(g: Tensor, x: Tensor) -> Tensor:
    for i, j in _strips(g):
        g[i:j, :j].addmm_(x[i:j], x[:j].T)
    return g


def _mirrored(g: Tensor) -> Tensor:
    """The lower strips copied up; a diagonal block was computed whole, and keeps its lower half."""
    for i, j in _strips(g):
        g[:i, i:j] = g[i:j, :i].T
        block = torch.tril(g[i:j, i:j])
        g[i:j, i:j] = block + torch.tril(block, -1).T
    return g


def probe(blocks: Blocks, side: Side, signs: Tensor) -> Probe:
    """``G signs`` and ``tr G`` in fp64, from the matrices themselves: one read, no Gram.

    What an fp32 Gram and its eigendecomposition got wrong is measured against this (see `certificate`).

    Args:
        signs: fp64 ``[n, k]``.
    """
    images = torch.zeros_like(signs)
    trace = torch.zeros((), dtype=torch.float64, device=blocks.device)
    elements = 256 * blocks.order(side) if blocks.device.type == "cpu" else 1 << 25
    for x in blocks.pieces(side, torch.float64, elements):
        images.addmm_(x, x.T @ signs)
        # dot needs a flat view; a right-side piece is a transposed view of contiguous rows
        flat = (x if side is Side.LEFT else x.T).reshape(-1)
        trace += torch.dot(flat, flat)
    return Probe(signs, images, float(trace))
