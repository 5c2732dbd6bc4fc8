"""What every entry point refuses, in one place, so that CPU and GPU refuse the same things."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_lr.errors import LinalgError, NonFiniteError

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_EXPONENT = 24
"""Entries beyond 2^+-24 are scaled by a power of two, so that no square over- or underflows in fp32."""


def check_matrix(matrix: Tensor, where: str) -> None:
    """LinalgError unless ``matrix`` is a non-empty 2-D tensor of fp16, bf16, fp32 or fp64."""
    if matrix.ndim != 2:
        raise LinalgError(
            f"expected a matrix, got {matrix.ndim} dimension(s)",
            where=where,
            why=f"shape {tuple(matrix.shape)}",
            fix="pass one 2-D tensor per matrix",
        )
    if matrix.dtype not in FLOATING:
        raise LinalgError(
            f"cannot decompose dtype {matrix.dtype}",
            where=where,
            why="only fp16, bf16, fp32 and fp64 hold real matrices here",
            fix="copy integer tensors by rule; decode quantised ones first",
        )
    if matrix.numel() == 0:
        raise LinalgError("the matrix is empty", where=where, why=f"shape {tuple(matrix.shape)}")


def check_blocks(matrices: Sequence[Tensor], base: Tensor | None, where: str) -> None:
    """LinalgError unless ``matrices`` is a non-empty list of matrices with equal rows, on one device."""
    if not matrices:
        raise LinalgError("the list of matrices is empty", where=where, fix="pass at least one matrix")
    for i, matrix in enumerate(matrices):
        check_matrix(matrix, f"{where}[{i}]")
        if matrix.shape[0] != matrices[0].shape[0]:
            raise LinalgError(
                f"matrix {i} has {matrix.shape[0]} rows where the first has {matrices[0].shape[0]}",
                where=where,
                why="a joint left subspace needs one output dimension",
                fix="group matrices of equal output dimension",
            )
        if matrix.device != matrices[0].device:
            raise LinalgError(
                f"matrix {i} is on {matrix.device}, the first on {matrices[0].device}",
                where=where,
                fix="move them to one device",
            )
    if base is not None:
        check_matrix(base, f"{where} base")
        if any(m.shape != base.shape or m.device != base.device for m in matrices):
            raise LinalgError("base and matrices differ in shape or device", where=where)


def check_same_shape(matrices: Sequence[Tensor], weights: Sequence[float], where: str) -> None:
    """LinalgError unless a weighted sum of ``matrices`` makes sense."""
    if len(weights) != len(matrices):
        raise LinalgError(f"{len(weights)} weights for {len(matrices)} matrices", where=where)
    if not all(math.isfinite(w) for w in weights):
        raise NonFiniteError("a weight is not finite", where=where)
    for i, matrix in enumerate(matrices):
        if matrix.shape != matrices[0].shape:
            raise LinalgError(
                f"matrix {i} is {tuple(matrix.shape)}, the first {tuple(matrices[0].shape)}",
                where=where,
                why="a weighted sum needs equal shapes",
            )


def check_rank(rank: int, limit: int, where: str) -> int:
    """``rank`` if 1 <= rank <= limit, else LinalgError."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise LinalgError(f"rank must be an integer, got {rank!r}", where=where)
    if not 1 <= rank <= limit:
        raise LinalgError(f"rank {rank} is impossible here", where=where, why=f"it must be between 1 and {limit}")
    return rank


def largest_entry(matrices: Sequence[Tensor], where: str) -> float:
    """max |entry| over all ``matrices``; NonFiniteError if any entry is NaN or infinite. One read."""
    largest = 0.0
    for i, matrix in enumerate(matrices):
        low, high = (float(x) for x in torch.aminmax(matrix))  # propagates NaN
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NonFiniteError(
                "the matrix holds NaN or infinity", where=f"{where}[{i}]" if len(matrices) > 1 else where
            )
        largest = max(largest, -low, high)
    return largest


def power_of_two_scale(largest: float) -> float:
    """1 for ordinary magnitudes, else the power of two that brings ``largest`` to about 1 (exact to apply)."""
    if largest == 0.0:
        return 1.0
    exponent = math.frexp(largest)[1]
    return 1.0 if abs(exponent) <= LARGEST_EXPONENT else math.ldexp(1.0, max(-1000, min(1000, -exponent)))
