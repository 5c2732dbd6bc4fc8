"""Matrices side by side that are never put side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum

import torch
from torch import Tensor

from mergekit_lr.linalg.checks import check_blocks, largest_entry, power_of_two_scale

PIECE = 1 << 21
"""Elements of one converted piece: large enough for a fast GEMM, small next to any model."""


class Side(StrEnum):
    """Which Gram is formed: LEFT is ``M M^T`` (rows), RIGHT is ``M^T M`` (columns)."""

    LEFT = "left"
    RIGHT = "right"


class Blocks:
    """``M = scale * [W_1 - base, ..., W_k - base]``, ``[rows, sum of columns]``, read in pieces.

    Args:
        matrices: k tensors ``[rows, d_i]`` of fp16, bf16, fp32 or fp64; not changed, not copied.
        base: subtracted from each (then all have its shape).
        where: name for errors.

    ``scale`` is 1 unless entries are so large or small that squares would leave fp32's range; then it is a
    power of two, which is exact to apply and to undo. ``dtype`` is fp64 if any input is, else fp32.

    Raises:
        LinalgError: empty list, mixed rows or devices, not matrices, not floating point.
        NonFiniteError: NaN or infinity in an input.
    """

    def __init__(self, matrices: Sequence[Tensor], base: Tensor | None = None, *, where: str = "matrix") -> None:
        check_blocks(matrices, base, where)
        self.matrices, self.base, self.where = list(matrices), base, where
        self.rows = matrices[0].shape[0]
        self.widths = [m.shape[1] for m in matrices]
        self.columns = sum(self.widths)
        self.device = matrices[0].device
        wide = any(m.dtype == torch.float64 for m in [*matrices, *([] if base is None else [base])])
        self.dtype = torch.float64 if wide else torch.float32
        largest = largest_entry(self.matrices, where)
        if base is not None:
            largest += largest_entry([base], f"{where} base")
        self.scale = power_of_two_scale(largest)

    @property
    def small_side(self) -> Side:
        """The side whose Gram is smaller."""
        return Side.LEFT if self.rows <= self.columns else Side.RIGHT

    def order(self, side: Side) -> int:
        """Order n of the Gram of that side."""
        return self.rows if side is Side.LEFT else self.columns

    def _slice(self, i: int, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        part = self.matrices[i][rows, columns].to(dtype)
        if self.base is not None:
            part = part - self.base[rows, columns].to(dtype)
        return part if self.scale == 1.0 else part * self.scale

    def pieces(self, side: Side, dtype: torch.dtype, elements: int = PIECE) -> Iterator[Tensor]:
        """Matrices X ``[order(side), c]`` in ``dtype`` with ``Gram = sum X X^T``; used and dropped in turn."""
        everything = slice(None)
        if side is Side.LEFT:
            step = max(1, elements // self.rows)
            for i, width in enumerate(self.widths):
                if self._as_it_is(i, dtype):
                    yield self.matrices[i]
                    continue
                for start in range(0, width, step):
                    yield self._slice(i, everything, slice(start, start + step), dtype)
            return
        if len(self.matrices) == 1 and self._as_it_is(0, dtype):
            yield self.matrices[0].T
            return
        step = max(1, elements // self.columns)
        for start in range(0, self.rows, step):
            rows = slice(start, start + step)
            parts = [self._slice(i, rows, everything, dtype) for i in range(len(self.matrices))]
            yield (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).T

    def _as_it_is(self, i: int, dtype: torch.dtype) -> bool:
        return self.base is None and self.scale == 1.0 and self.matrices[i].dtype == dtype

    def times(self, x: Tensor) -> Tensor:
        """``M x`` for x ``[columns, b]``, in x's dtype (accumulated over the blocks in order)."""
        out = torch.zeros(self.rows, x.shape[1], dtype=x.dtype, device=self.device)
        step = max(1, PIECE // self.rows)
        start = 0
        for i, width in enumerate(self.widths):
            if self._as_it_is(i, x.dtype):
                out.addmm_(self.matrices[i], x[start : start + width])
            else:
                for c in range(0, width, step):
                    part = self._slice(i, slice(None), slice(c, c + step), x.dtype)
                    out.addmm_(part, x[start + c : start + c + part.shape[1]])
            start += width
        return out

    def transposed_times(self, y: Tensor) -> Tensor:
        """``M^T y`` for y ``[rows, b]``, in y's dtype: a ``[columns, b]`` view of contiguous ``y^T M`` (twice as fast
        on the CPU as the product with transposed blocks).
        """
        out = torch.empty(y.shape[1], self.columns, dtype=y.dtype, device=self.device)
        rows, step, start = y.T, max(1, PIECE // self.rows), 0
        for i, width in enumerate(self.widths):
            if self._as_it_is(i, y.dtype):
                out[:, start : start + width] = rows @ self.matrices[i]
            else:
                for c in range(0, width, step):
                    part = self._slice(i, slice(None), slice(c, c + step), y.dtype)
                    out[:, start + c : start + c + part.shape[1]] = rows @ part
            start += width
        return out.T

    def towards(self, side: Side, x: Tensor) -> Tensor:
        """M x if ``side`` is LEFT, else M^T x: the product that lands on that side."""
        return self.times(x) if side is Side.LEFT else self.transposed_times(x)

    def away(self, side: Side, x: Tensor) -> Tensor:
        """M^T x if ``side`` is LEFT, else M x: the product that leaves that side."""
        return self.transposed_times(x) if side is Side.LEFT else self.times(x)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """M itself, for the full solve that ends every escalation."""
        parts = [self._slice(i, slice(None), slice(None), dtype) for i in range(len(self.matrices))]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
