"""The full singular value decomposition: the one place of this package that calls it.

Everything else goes through Grams, Krylov spaces or small cores; a full solve ends an escalation, or serves a
core whose order is small.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not re-exported in its stub

from mergekit_lr.errors import LinalgError
from mergekit_lr.linalg import cusolver
from mergekit_lr.linalg.checks import check_matrix, largest_entry

ENERGY_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}


def full_svd(matrix: Tensor, *, where: str = "svd") -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD ``A = U diag(S) Vh``: U ``[m, p]``, S ``[p]`` descending, Vh ``[p, n]``, ``p = min(m, n)``.

    ``matrix``: fp32 or fp64 (half precisions are widened to fp32). CPU: LAPACK gesdd, and gesvd where gesdd does
    not converge (clusters of equal singular values). CUDA: cuSOLVER's polar SVD (Xgesvdp), then torch's
    ``gesvd`` driver, then the CPU; each is checked by ``||A||_F^2 = sum S^2``, which is free.

    Raises:
        LinalgError: no solver converged, or ``matrix`` is not a real matrix.
        NonFiniteError: NaN or infinity in ``matrix``.
    """
    check_matrix(matrix, where)
    largest_entry([matrix], where)
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    if matrix.device.type == "cuda":
        on_device = _cuda(matrix)
        if on_device is not None:
            return on_device
        u, s, vh = _lapack(matrix.cpu(), where)
        return u.to(matrix.device), s.to(matrix.device), vh.to(matrix.device)
    return _lapack(matrix, where)


def singular_values(matrix: Tensor, *, where: str = "svd") -> Tensor:
    """Singular values alone, descending, by the full solver."""
    return full_svd(matrix, where=where)[1]


def _energy_is_right(matrix: Tensor, s: Tensor) -> bool:
    norm = torch.linalg.vector_norm(matrix, dtype=torch.float64)
    gap = (torch.linalg.vector_norm(s, dtype=torch.float64) - norm).abs()
    return bool(gap <= ENERGY_TOLERANCE[matrix.dtype] * norm)


def _cuda(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    polar = cusolver.gesvdp(matrix)
    if polar is not None and _energy_is_right(matrix, polar[1]):
        return polar
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False, driver="gesvd")
    except LinAlgError:
        return None
    return (u, s, vh) if _energy_is_right(matrix, s) else None


def _lapack(matrix: Tensor, where: str) -> tuple[Tensor, Tensor, Tensor]:
    wide = matrix.shape[0] < matrix.shape[1]  # LAPACK's wide path takes up to four times as long as its tall one
    try:
        u, s, vh = torch.linalg.svd(matrix.T if wide else matrix, full_matrices=False)
        if _energy_is_right(matrix, s):
            return (vh.T, s, u.T) if wide else (u, s, vh)
    except LinAlgError:  # divide and conquer fails on some clusters; QR iteration does not
        pass
    try:
        factors = scipy.linalg.svd(matrix.numpy(), full_matrices=False, lapack_driver="gesvd")
    except scipy.linalg.LinAlgError as error:
        raise LinalgError("the full SVD did not converge", where=where, why=str(error)) from error
    u, s, vh = (torch.from_numpy(np.ascontiguousarray(f)) for f in factors)
    return u, s, vh
