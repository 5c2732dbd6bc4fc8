"""Symmetric eigenproblems, batched, checked after the fact."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not re-exported in its stub

from mergekit_lr.errors import LinalgError
from mergekit_lr.linalg import cusolver
from mergekit_lr.linalg.checks import check_rank

ENERGY_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}
"""Allowed relative gap between tr G and the sum of eigenvalues (and between ||G||_F^2 and that of squares)."""


def symmetric_eigh(g: Tensor, *, where: str = "eigh") -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[..., n]`` in descending order and vectors ``[..., n, n]`` (columns) of symmetric ``g``.

    ``g``: fp32 or fp64, ``[n, n]`` or a batch ``[B, n, n]``. On CUDA a batch above n = 32 goes to cuSOLVER's
    batched solver where it can be had, because torch loops over it; otherwise to `torch.linalg.eigh`.
    After every CUDA solve two invariants that cost nothing are checked, ``tr G = sum lambda`` and
    ``||G||_F^2 = sum lambda^2``, since cuSOLVER has returned garbage without an error; a failed check is solved
    again by LAPACK on the CPU.

    Raises:
        LinalgError: not symmetric storage (shape), or the solver failed on the CPU as well.
    """
    if g.ndim < 2 or g.shape[-1] != g.shape[-2]:
        raise LinalgError(f"expected square matrices, got {tuple(g.shape)}", where=where)
    if g.device.type != "cuda":
        return _lapack(g, where)
    solved = cusolver.eigh_batched(g) if g.ndim == 3 and g.shape[-1] > 32 else None
    if solved is not None and energy_is_right(g, solved[0]):
        return _descending(*solved)
    try:
        values, vectors = torch.linalg.eigh(g)
        if energy_is_right(g, values):
            return _descending(values, vectors)
    except LinAlgError:  # no convergence on the GPU: LAPACK decides
        pass
    values, vectors = _lapack(g.cpu(), where)
    return values.to(g.device), vectors.to(g.device)


def largest_eigenpairs(g: Tensor, rank: int, *, where: str = "eigh") -> tuple[Tensor, Tensor]:
    """The ``rank`` largest eigenvalues ``[rank]``, descending, and vectors ``[n, rank]`` of one symmetric ``g [n,
    n]``.

    On CUDA by cuSOLVER's Xsyevdx, which transforms back only the vectors asked for, accepted if the largest residual
    ``||g u - lambda u||`` is rounding; otherwise, and elsewhere, the full solve cut to ``rank``.
    """
    check_rank(rank, g.shape[-1], where)
    solved = cusolver.eigh_largest(g, rank) if g.device.type == "cuda" else None
    if solved is not None:
        values, vectors = _descending(*solved)
        residual = torch.linalg.vector_norm(g @ vectors - vectors * values, dim=0).max()
        if bool(residual <= ENERGY_TOLERANCE[g.dtype] * values[0].abs()):
            return values, vectors
    values, vectors = symmetric_eigh(g, where=where)
    return values[:rank], vectors[:, :rank]


def energy_is_right(g: Tensor, values: Tensor) -> bool:
    """Whether the eigenvalues carry the trace and the squared norm of ``g``, to rounding, in every batch item."""
    tolerance = ENERGY_TOLERANCE[g.dtype]
    wide = values.double()
    trace = g.diagonal(dim1=-2, dim2=-1).double().sum(-1)
    norm = torch.linalg.vector_norm(g, dim=(-2, -1), dtype=torch.float64)
    right = (wide.sum(-1) - trace).abs() <= tolerance * wide.abs().sum(-1).clamp(min=norm)
    right &= (torch.linalg.vector_norm(wide, dim=-1) - norm).abs() <= tolerance * norm
    return bool(right.all())


def _lapack(g: Tensor, where: str) -> tuple[Tensor, Tensor]:
    try:
        return _descending(*torch.linalg.eigh(g))
    except LinAlgError as error:
        raise LinalgError(
            "the symmetric eigensolver did not converge",
            where=where,
            why=str(error).splitlines()[0],
            fix="check the inputs for extreme magnitudes",
        ) from error


def _descending(values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    return values.flip(-1), vectors.flip(-1)


def fix_signs(columns: Tensor, *partners: Tensor) -> None:
    """Flip columns in place so that each one's entry of largest modulus (the first such) is positive.

    ``partners`` (matrices whose *rows* go with the columns) are flipped with them. Removes the one freedom that
    solvers and devices settle differently.
    """
    if columns.numel() == 0:
        return
    pivot = columns.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(columns.gather(0, pivot) < 0, -1.0, 1.0).to(columns.dtype)
    columns.mul_(signs)
    for rows in partners:
        rows.mul_(signs.T.to(rows.dtype))
