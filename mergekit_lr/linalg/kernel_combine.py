"""K2 ``project_combine``: a weighted sum of matrices, and its projection, without storing the sum (Triton)."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENT = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


@triton.jit
def _weighted_tile(pointers, weights, base, at, mask, experts, HAS_BASE: tl.constexpr, DTYPE: tl.constexpr):
    """``sum_e f_e (W_e - base)`` at the given offsets, fp32: the loader of every kernel here."""
    total = tl.zeros(at.shape, dtype=tl.float32)
    reference = tl.zeros(at.shape, dtype=tl.float32)
    if HAS_BASE:
        reference = tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
    for e in range(experts):
        w = tl.load(tl.load(pointers + e).to(tl.pointer_type(DTYPE)) + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(weights + e) * (w - reference)
    return total


@triton.jit
def _weighted_sum(
    pointers, weights, base, out, count, experts, scale,
    HAS_BASE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    total = scale * _weighted_tile(pointers, weights, base, at, mask, experts, HAS_BASE, DTYPE)
    if HAS_BASE:
        total += tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _project(
    u, pointers, weights, base, out, rows, columns, rank, experts,
    HAS_BASE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = U^T sum_e f_e (W_e - base)``, ``[rank, columns]``; the sum exists one tile at a time."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for start in range(0, rows, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        basis_mask = (k < rows)[:, None] & (r < rank)[None, :]
        basis = tl.load(u + k.to(tl.int64)[:, None] * rank + r[None, :], mask=basis_mask, other=0.0)
        mask = (k < rows)[:, None] & (n < columns)[None, :]
        at = k.to(tl.int64)[:, None] * columns + n[None, :]
        m = _weighted_tile(pointers, weights, base, at, mask, experts, HAS_BASE, DTYPE)
        total += tl.dot(tl.trans(basis), m, input_precision=PRECISION)
    mask = (r < rank)[:, None] & (n < columns)[None, :]
    tl.store(out + r.to(tl.int64)[:, None] * columns + n[None, :], total, mask=mask)


@triton.jit
def _gather(
    pointers, base, v, out, rows, width, rank, experts,
    HAS_BASE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = sum_e (W_e - base) V_e``, ``[rows, rank]``, V_e the e-th block of ``width`` rows of v."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for e in range(experts):
        matrix = tl.load(pointers + e).to(tl.pointer_type(DTYPE))
        for start in range(0, width, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            mask = (i < rows)[:, None] & (k < width)[None, :]
            at = i.to(tl.int64)[:, None] * width + k[None, :]
            w = tl.load(matrix + at, mask=mask, other=0.0).to(tl.float32)
            if HAS_BASE:
                w -= tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
            block_mask = (k < width)[:, None] & (r < rank)[None, :]
            block = tl.load(v + (e * width + k).to(tl.int64)[:, None] * rank + r[None, :], mask=block_mask, other=0.0)
            total += tl.dot(w, block, input_precision=PRECISION)
    mask = (i < rows)[:, None] & (r < rank)[None, :]
    tl.store(out + i.to(tl.int64)[:, None] * rank + r[None, :], total, mask=mask)


@triton.jit
def _expand(
    x, y, base, out, rows, columns, rank, scale,
    HAS_BASE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = base + scale x y``, rounded once to the dtype of ``out``."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, rank, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_mask = (i < rows)[:, None] & (k < rank)[None, :]
        left = tl.load(x + i.to(tl.int64)[:, None] * rank + k[None, :], mask=x_mask, other=0.0)
        y_mask = (k < rank)[:, None] & (n < columns)[None, :]
        right = tl.load(y + k.to(tl.int64)[:, None] * columns + n[None, :], mask=y_mask, other=0.0)
        total += tl.dot(left, right, input_precision=PRECISION)
    mask = (i < rows)[:, None] & (n < columns)[None, :]
    at = i.to(tl.int64)[:, None] * columns + n[None, :]
    total *= scale
    if HAS_BASE:
        total += tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def weighted_sum(
    matrices: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None = None,
    *,
    scale: float = 1.0,
    out_dtype: torch.dtype,
    block: int = 1024,
) -> Tensor:
    """``base + scale sum_i f_i (W_i - base)`` in one pass over the inputs: any shape, contiguous, one dtype."""
    first = matrices[0]
    out = torch.empty(first.shape, dtype=out_dtype, device=first.device)
    _weighted_sum[(triton.cdiv(first.numel(), block),)](
        *_operands(matrices, weights, base), out, first.numel(), len(matrices), scale,
        HAS_BASE=base is not None, DTYPE=ELEMENT[first.dtype], BLOCK=block,
    )  # fmt: skip
    return out


def project_combine(
    basis: Tensor,
    matrices: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None = None,
    *,
    left: bool,
    scale: float = 1.0,
    out_dtype: torch.dtype,
    interpreted: bool = False,
    blocks: tuple[int, int, int] = (64, 64, 32),
) -> Tensor:
    """The projection of `mergekit_lr.linalg.joint.project_combine` in two launches.

    LEFT: ``C = U^T sum f_i W_i`` (loader forms the sum), then ``U C``. RIGHT: ``P = sum W_i V_i``, then ``P sum
    f_i V_i^T``. Products in tf32x3 (as good as fp32), one rounding to ``out_dtype``. Inputs contiguous, one shape
    and dtype.
    """
    first, (rows, columns), rank = matrices[0], matrices[0].shape, basis.shape[1]
    basis = basis.float().contiguous()
    pointers, f, reference = _operands(matrices, weights, base)
    precision = "ieee" if interpreted else "tf32x3"
    common = {"HAS_BASE": base is not None, "PRECISION": precision}
    m, n, k = blocks
    if left:
        x, y = basis, torch.empty(rank, columns, dtype=torch.float32, device=first.device)
        _project[(triton.cdiv(rank, m), triton.cdiv(columns, n))](
            basis, pointers, f, reference, y, rows, columns, rank, len(matrices),
            DTYPE=ELEMENT[first.dtype], BLOCK_R=m, BLOCK_N=n, BLOCK_K=k, **common,
        )  # fmt: skip
    else:
        x = torch.empty(rows, rank, dtype=torch.float32, device=first.device)
        _gather[(triton.cdiv(rows, m), triton.cdiv(rank, n))](
            pointers, reference, basis, x, rows, columns, rank, len(matrices),
            DTYPE=ELEMENT[first.dtype], BLOCK_M=m, BLOCK_R=n, BLOCK_K=k, **common,
        )  # fmt: skip
        y = torch.zeros(rank, columns, dtype=torch.float32, device=first.device)
        for part, weight in zip(torch.split(basis, columns), weights, strict=True):
            y.add_(part.T, alpha=weight)
    out = torch.empty(rows, columns, dtype=out_dtype, device=first.device)
    _expand[(triton.cdiv(rows, m), triton.cdiv(columns, n))](
        x, y, reference, out, rows, columns, rank, scale, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, **common
    )
    return out


def _operands(
    matrices: Sequence[Tensor], weights: Sequence[float], base: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    device = matrices[0].device
    pointers = torch.tensor([m.data_ptr() for m in matrices], dtype=torch.int64, device=device)
    f = torch.tensor(list(weights), dtype=torch.float32, device=device)
    return pointers, f, matrices[0] if base is None else base
