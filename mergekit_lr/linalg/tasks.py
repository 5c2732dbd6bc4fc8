"""Task vectors as points: their T x T Gram, and principal components from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lr.errors import LinalgError, NonFiniteError
from mergekit_lr.linalg.checks import FLOATING, check_rank

CHUNK = 1 << 15
"""Elements of each vector converted at a time: T x CHUNK doubles stay in a core's cache for T <= 8."""


def task_gram(vectors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """``G_ij = <t_i, t_j>``, fp64 ``[T, T]``, for T tensors of one shape (flattened), ``t_i = vector_i - base``.

    One read of each vector, in chunks of `CHUNK` elements on a fixed grid, products and sums in fp64: relative error
    1e-15, where an fp32 SVD of the T x N matrix is off by 2e-2 in the smallest of 20 singular values. Cost ``T (T
    + 1) N`` flops; nothing of size T x N is formed.

    Raises:
        LinalgError: empty list, mixed shapes or devices, integers.
        NonFiniteError: NaN or infinity in any vector.
    """
    _check_vectors(vectors, base)
    flat = [v.reshape(-1) for v in vectors]
    reference = None if base is None else base.reshape(-1)
    count, device = len(flat), flat[0].device
    out = torch.zeros(count, count, dtype=torch.float64, device=device)
    chunk = CHUNK if device.type == "cpu" else 1 << 22
    scratch = torch.empty(count, min(chunk, flat[0].numel()), dtype=torch.float64, device=device)
    for start in range(0, flat[0].numel(), chunk):
        part = scratch[:, : min(chunk, flat[0].numel() - start)]
        for row, vector in zip(part, flat, strict=True):
            row.copy_(vector[start : start + chunk])
        if reference is not None:
            part -= reference[start : start + chunk].double()
        out.addmm_(part, part.T)
    if not bool(torch.isfinite(out).all()):
        raise NonFiniteError("a task vector holds NaN or infinity", where="task_gram")
    return 0.5 * (out + out.T)


def _check_vectors(vectors: Sequence[Tensor], base: Tensor | None) -> None:
    if not vectors:
        raise LinalgError("the list of task vectors is empty", where="task_gram")
    for i, vector in enumerate([*vectors, *([] if base is None else [base])]):
        if vector.dtype not in FLOATING:
            raise LinalgError(f"task vector {i} has dtype {vector.dtype}", where="task_gram", why="not real")
        if vector.shape != vectors[0].shape or vector.device != vectors[0].device or vector.numel() == 0:
            raise LinalgError(
                f"task vector {i} is {tuple(vector.shape)} on {vector.device}",
                where="task_gram",
                why=f"the first is {tuple(vectors[0].shape)} on {vectors[0].device}, and none may be empty",
            )


@dataclass(frozen=True)
class TaskComponents:
    """Principal directions ``b_j = sum_i coefficients[i, j] t_i`` of T task vectors, orthonormal, by decreasing
    sigma.

    Attributes:
        sigma: singular values of the T x N matrix, fp64 ``[r]``.
        coefficients: fp64 ``[T, r]``, ``W diag(1 / sigma)`` with W the Gram's eigenvectors.
        coordinates: fp64 ``[T, r]``, ``t_i = sum_j coordinates[i, j] b_j`` plus what the kept directions miss.
    """

    sigma: Tensor
    coefficients: Tensor
    coordinates: Tensor


def task_components(gram: Tensor, rank: int | None = None) -> TaskComponents:
    """Uncentred PCA over tasks from their Gram alone (the bases are never needed to find the coefficients).

    Directions with ``sigma <= 1e-7 sigma_1`` (the square root of fp64's rounding of G) are numerically absent and
    dropped, so that nothing is divided by zero; all-zero vectors give no components.

    Raises:
        LinalgError: ``gram`` is not square, or rank is not in 1 .. T.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise LinalgError(f"expected a T x T Gram, got {tuple(gram.shape)}", where="task_components")
    limit = gram.shape[0] if rank is None else check_rank(rank, gram.shape[0], "task_components")
    values, vectors = torch.linalg.eigh(gram.double())
    sigma = values.flip(0).clamp(min=0.0).sqrt()[:limit]
    w = vectors.flip(1)[:, :limit]
    present = sigma > 1e-7 * sigma[0]
    sigma, w = sigma[present], w[:, present]
    signs = torch.where(w.gather(0, w.abs().argmax(dim=0, keepdim=True)) < 0, -1.0, 1.0).to(w.dtype)
    w = w * signs
    return TaskComponents(sigma, w / sigma, w * sigma)
