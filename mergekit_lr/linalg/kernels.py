"""Chooses between the Triton kernels and plain torch. Nothing here imports Triton unless a CUDA tensor asks."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from mergekit_lr.linalg.blocks import Blocks, Side

HALF = (torch.bfloat16, torch.float16)


def gram_kernel(blocks: Blocks, side: Side, dtype: torch.dtype) -> Tensor | None:
    """The fp32 Gram of half-precision matrices on CUDA, by K1 or else by tensor-core GEMMs; None for any other case."""
    kinds = {m.dtype for m in [*blocks.matrices, *([] if blocks.base is None else [blocks.base])]}
    if blocks.device.type != "cuda" or dtype != torch.float32 or blocks.scale != 1.0:
        return None
    if len(kinds) != 1 or kinds.isdisjoint(HALF):
        return None
    if _regular(blocks.matrices, blocks.base) and kernels_work(blocks.device):
        from mergekit_lr.linalg import kernel_gram

        return kernel_gram.gram_accumulate([blocks.matrices], [blocks.base], left=side is Side.LEFT)[0][0]
    return _gemm_gram(blocks, side) if blocks.base is None else None


def _gemm_gram(blocks: Blocks, side: Side) -> Tensor:
    """Half-precision GEMMs with fp32 output: twice K1's flops and one more pass over G for each matrix."""
    n = blocks.order(side)
    if side is Side.LEFT:
        out = torch.zeros(n, n, dtype=torch.float32, device=blocks.device)
        for w in blocks.matrices:
            out += torch.mm(w, w.T, out_dtype=torch.float32)
        return out
    out = torch.empty(n, n, dtype=torch.float32, device=blocks.device)
    starts = [sum(blocks.widths[:i]) for i in range(len(blocks.widths) + 1)]
    for i, a in enumerate(blocks.matrices):
        for j, b in enumerate(blocks.matrices[: i + 1]):
            block = torch.mm(a.T, b, out_dtype=torch.float32)
            out[starts[i] : starts[i + 1], starts[j] : starts[j + 1]] = block
            out[starts[j] : starts[j + 1], starts[i] : starts[i + 1]] = block.T
    return out


def project_combine_kernel(
    side: Side,
    basis: Tensor | None,
    matrices: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None,
    scale: float,
    out_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor | None:
    """K2, or None where torch does it: not CUDA, mixed dtypes or layouts, fp64, no working Triton."""
    first = matrices[0]
    if first.device.type != "cuda" or dtype != torch.float32 or out_dtype == torch.float64:
        return None
    if any(m.dtype != first.dtype for m in matrices) or (base is not None and base.dtype != first.dtype):
        return None
    if not _regular(matrices, base) or not kernels_work(first.device):
        return None
    from mergekit_lr.linalg import kernel_combine

    if basis is None:
        return kernel_combine.weighted_sum(matrices, weights, base, scale=scale, out_dtype=out_dtype)
    return kernel_combine.project_combine(
        basis, matrices, weights, base, left=side is Side.LEFT, scale=scale, out_dtype=out_dtype
    )


def _regular(matrices: Sequence[Tensor], base: Tensor | None) -> bool:
    shape = matrices[0].shape
    every = [*matrices, *([] if base is None else [base])]
    return all(m.shape == shape and m.is_contiguous() for m in every)


@cache
def kernels_work(device: torch.device) -> bool:
    """Whether Triton is installed and its kernels, on a small case, give this device's right answer. Tried once.

    A kernel that does not compile or that disagrees with fp64 is reported and never used: the torch path is slower,
    not different.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    from triton.errors import TritonError

    from mergekit_lr.linalg import kernel_combine, kernel_gram

    i = torch.arange(96 * 160, device=device).reshape(96, 160)
    a, b = ((torch.cos(i * step) + 1.0).to(torch.bfloat16) for step in (0.7, 1.3))
    wide = [m.double() for m in (a, b)]
    try:
        right = kernel_gram.gram_accumulate([[a, b]], left=True)[0][0]
        delta = kernel_gram.gram_accumulate([[a]], [b], left=False)[0][0]
        mean = kernel_combine.weighted_sum([a, b], [0.25, 0.75], out_dtype=torch.float32)
        torch.cuda.synchronize(device)
    except (TritonError, RuntimeError) as error:
        warnings.warn(f"Triton kernels are off: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)
        return False
    gram = wide[0] @ wide[0].T + wide[1] @ wide[1].T
    difference = wide[0] - wide[1]
    agree = [
        bool((got.double() - want).abs().max() <= 3e-5 * want.abs().max())
        for got, want in (
            (right, gram),
            (delta, difference.T @ difference),
            (mean, 0.25 * wide[0] + 0.75 * wide[1]),
        )
    ]
    if not all(agree):
        warnings.warn("Triton kernels are off: they disagree with fp64 on this device", RuntimeWarning, stacklevel=2)
    return all(agree)
