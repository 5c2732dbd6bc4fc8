"""K1 ``gram_accumulate``: Grams of many groups of matrices in one launch (Triton; optional)."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENT = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
FLUSH = 2048
"""Depth after which the tensor cores' accumulator is added to a second one: theirs truncates."""


@triton.jit
def _load(pointers, bases, expert, at, mask, HAS_BASE: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of ``W`` (hi, and zero), or of ``W - base`` as hi + lo, both in DTYPE: together exact for a fine-tune."""
    w = tl.load(tl.load(pointers + expert).to(tl.pointer_type(DTYPE)) + at, mask=mask, other=0.0)
    if HAS_BASE:
        b = tl.load(tl.load(bases + expert).to(tl.pointer_type(DTYPE)) + at, mask=mask, other=0.0)
        delta = w.to(tl.float32) - b.to(tl.float32)
        hi = delta.to(DTYPE)
        lo = (delta - hi.to(tl.float32)).to(DTYPE)
    else:
        hi = w
        lo = w
    return hi, lo


@triton.jit
def _product(a, b, UPCAST: tl.constexpr):
    """``a b^T`` of half-precision tiles, exact products, fp32 sums."""
    if UPCAST:  # the interpreter's bf16 dot reads the bits as integers
        return tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), input_precision="ieee")
    return tl.dot(a, tl.trans(b))


@triton.jit
def _gram_accumulate(
    pointers,
    bases,
    out,
    traces,
    order,
    width,
    depth,
    experts,
    stride_i,
    stride_k,
    tiles_per_expert,
    LEFT: tl.constexpr,
    HAS_BASE: tl.constexpr,
    DTYPE: tl.constexpr,
    UPCAST: tl.constexpr,
    FLUSH_AT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pair, group = tl.program_id(0), tl.program_id(1)
    row = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > pair, row - 1, row)  # the square root may be one off either way
    row = tl.where((row + 1) * (row + 2) // 2 <= pair, row + 1, row)
    column = pair - row * (row + 1) // 2

    expert_i, expert_j = group * experts, group * experts
    local_i = row * BLOCK + tl.arange(0, BLOCK)
    local_j = column * BLOCK + tl.arange(0, BLOCK)
    start_i, start_j, loops = 0, 0, experts
    if not LEFT:  # rows of the Gram run over the columns of every matrix; one pair of matrices meets in a tile
        expert_i += row // tiles_per_expert
        expert_j += column // tiles_per_expert
        start_i, start_j, loops = (row // tiles_per_expert) * width, (column // tiles_per_expert) * width, 1
        local_i = (row % tiles_per_expert) * BLOCK + tl.arange(0, BLOCK)
        local_j = (column % tiles_per_expert) * BLOCK + tl.arange(0, BLOCK)

    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for e in range(loops):
        for flush in range(0, depth, FLUSH_AT):
            part = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
            for k in range(flush, tl.minimum(flush + FLUSH_AT, depth), BLOCK_K):
                deep = k + tl.arange(0, BLOCK_K)
                at_i = local_i.to(tl.int64)[:, None] * stride_i + deep.to(tl.int64)[None, :] * stride_k
                at_j = local_j.to(tl.int64)[:, None] * stride_i + deep.to(tl.int64)[None, :] * stride_k
                mask_i = (local_i < width)[:, None] & (deep < depth)[None, :]
                mask_j = (local_j < width)[:, None] & (deep < depth)[None, :]
                a, a_lo = _load(pointers, bases, expert_i + e, at_i, mask_i, HAS_BASE, DTYPE)
                b, b_lo = _load(pointers, bases, expert_j + e, at_j, mask_j, HAS_BASE, DTYPE)
                part += _product(a, b, UPCAST)
                if HAS_BASE:
                    part += _product(a, b_lo, UPCAST) + _product(a_lo, b, UPCAST)
            total += part

    i, j = start_i + local_i, start_j + local_j
    lower = (local_i < width)[:, None] & (local_j < width)[None, :] & (i[:, None] >= j[None, :])
    place = out + group.to(tl.int64) * order * order
    tl.store(place + i.to(tl.int64)[:, None] * order + j[None, :], total, mask=lower)
    tl.store(place + j.to(tl.int64)[None, :] * order + i[:, None], total, mask=lower)
    if row == column:
        on_diagonal = (i[:, None] == j[None, :]) & (local_i < width)[:, None]
        count = tl.num_programs(0)  # more than enough places: one for each tile, most of them unused
        tl.store(traces + group * count + row, tl.sum(tl.where(on_diagonal, total, 0.0)))


def gram_accumulate(
    groups: Sequence[Sequence[Tensor]],
    bases: Sequence[Tensor | None] | None = None,
    *,
    left: bool = True,
    interpreted: bool = False,
    block: int = 128,
    block_k: int = 64,
    flush: int = FLUSH,
) -> tuple[Tensor, Tensor]:
    """Grams fp32 ``[groups, n, n]`` and their traces fp64 ``[groups]`` of ``M_g = [W_1 ... W_k]`` (each minus its
    base).

    LEFT: ``sum_i W_i W_i^T``, n rows; otherwise ``M^T M``, ``n = k d``. Only tiles of the lower triangle are
    computed; each is written with its transpose, so G is symmetric to the bit. Products of bf16 or fp16 are exact
    in fp32; ``W - base`` is formed in registers as hi + lo (three products; ``lo lo^T``, at most 2^-16 of G, is
    left out). fp32 sums, flushed every ``flush`` of the depth. Agrees with the fp64 Gram to ``2e-6 ||G||``, with a
    base to ``2e-5 ||G||``.

    Args:
        groups: lists of k tensors ``[rows, d]``, one shape and dtype (bf16 or fp16) throughout, contiguous.
        bases: one per group or None.
        interpreted: run by Triton's interpreter (the process was started with ``TRITON_INTERPRET=1``).
        block, block_k: tile sizes, powers of two from 16.
    """
    first = groups[0][0]
    rows, width = first.shape
    experts = len(groups[0])
    order, local, depth = (rows, rows, width) if left else (experts * width, width, rows)
    device = first.device
    has_base = bases is not None and bases[0] is not None
    addresses = [w.data_ptr() for group in groups for w in group]
    pointers = torch.tensor(addresses, dtype=torch.int64, device=device)
    if has_base:
        assert bases is not None
        reference = [b.data_ptr() for b in bases if b is not None for _ in range(experts)]
        base_pointers = torch.tensor(reference, dtype=torch.int64, device=device)
    else:
        base_pointers = pointers
    per_expert = triton.cdiv(local, block)
    tiles = per_expert if left else per_expert * experts
    pairs = tiles * (tiles + 1) // 2
    out = torch.empty(len(groups), order, order, dtype=torch.float32, device=device)
    traces = torch.zeros(len(groups), pairs, dtype=torch.float32, device=device)
    _gram_accumulate[(pairs, len(groups))](
        pointers,
        base_pointers,
        out,
        traces,
        order,
        local,
        depth,
        experts,
        width if left else 1,
        1 if left else width,
        per_expert,
        LEFT=left,
        HAS_BASE=has_base,
        DTYPE=ELEMENT[first.dtype],
        UPCAST=interpreted,
        FLUSH_AT=flush,
        BLOCK=block,
        BLOCK_K=block_k,
    )
    return out, traces.double().sum(dim=1)
