"""Least squares in which every model counts as its inputs' second moments say.

    minimise over W   sum_i a_i tr (W - W_i) G_i (W - W_i)^T,      G_i [n, n] symmetric, >= 0

With ``C = sum_i a_i G_i`` and ``D = sum_i a_i W_i G_i`` the solutions satisfy ``W C = D``. From a start ``W_0``, with
``C = V diag(l) V^T`` and a filter ``0 <= f(l) <= 1`` on its directions,

    W = W_0 + (D - W_0 C) V diag(f / l) V^T

so directions that the filter leaves out (unseen, or too weak to be told from noise) keep the start's values. RegMean
has activation Grams here; WUDI's closed form has ``G_i = t_i^T t_i / ||t_i||^2`` of the task vectors themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mergekit_lr.errors import LinalgError
from mergekit_lr.linalg.eigh import symmetric_eigh
from mergekit_lr.linalg.rank import gavish_donoho

Filter = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
"""Eigenvalues, descending and > 0, to the share of each direction's step that is taken."""

UNSEEN = 1e-12
"""Eigenvalues below this share of the largest are rounding: their directions keep the start's values."""


@contextmanager
def one_thread() -> Iterator[None]:
    """A split of a product among threads would change its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def gram_weighted_mean(
    weights: Sequence[Tensor], grams: Sequence[Tensor], shares: Sequence[float], *, where: str = "gram_weighted_mean"
) -> Tensor:
    """The minimiser above by the pseudo-inverse, from the mean by ``shares`` as start: fp64 ``[m, n]``.

    ``weights`` fp32 or fp64 ``[m, n]``, ``grams`` ``[n, n]``, ``shares`` >= 0, not all zero.

    Raises:
        LinalgError: shapes do not fit, or every Gram is zero.
    """
    n = weights[0].shape[1]
    if any(g.shape != (n, n) for g in grams):
        shapes = [list(g.shape) for g in grams]
        raise LinalgError(f"Grams {shapes} for a weight with {n} inputs", where=where)
    with one_thread():
        total = math.fsum(shares)
        start = sum(w.double() * (a / total) for w, a in zip(weights, shares, strict=True))
        assert isinstance(start, Tensor)
        c = torch.zeros(n, n, dtype=torch.float64, device=start.device)
        residual = torch.zeros_like(start)
        for w, g, a in zip(weights, grams, shares, strict=True):
            wide = g.double() * a
            c += wide
            residual += (w.double() - start) @ wide
        values, vectors = symmetric_eigh(0.5 * (c + c.T), where=where)
        top = float(values[0])
        if not top > 0:
            raise LinalgError("every Gram is zero", where=where, fix="collect statistics from text that reaches it")
        seen = values > n * UNSEEN * top
        basis = vectors[:, seen]
        return start + (residual @ basis / values[seen]) @ basis.T


def self_weighted(
    tasks: Sequence[Tensor], shares: Sequence[float], start: Tensor, filter_: Filter, *, where: str = "self_weighted"
) -> Tensor:
    """The filtered solution with ``G_i = t_i^T t_i / ||t_i||_F^2``, i.e. WUDI's stationary point: fp64 ``[m, n]``.

    ``tasks`` ``[m, n]``, a task of zero counts as absent. The eigenproblem is solved on the smaller side: ``n``, or
    the rows of all tasks together (which is also the rank that C can have).
    """
    with one_thread():
        wide = [t.double() for t in tasks]
        scale = [float(t.abs().max()) for t in wide]
        norms = [s * float(torch.linalg.vector_norm(t / s)) if s else 0.0 for t, s in zip(wide, scale, strict=True)]
        present = [(t / norm, norm, a) for t, norm, a in zip(wide, norms, shares, strict=True) if norm and a]
        origin = start.double()
        if not present:
            return origin
        stacked = torch.cat([u * math.sqrt(a) for u, _, a in present])
        values, basis = _right_eigenpairs(stacked, where)
        shown = values.cpu().numpy()
        taken = torch.from_numpy(filter_(shown)).to(values)
        seen = stacked @ basis
        heights = [u.shape[0] for u, _, _ in present]
        # D V = sum_i a_i t_i u_i^T u_i V, and ``part`` holds sqrt(a_i) u_i V.
        pulled = sum(
            norm * math.sqrt(a) * (u @ (u.T @ part))
            for (u, norm, a), part in zip(present, torch.split(seen, heights), strict=True)
        )
        assert isinstance(pulled, Tensor)
        return origin + ((pulled / values - origin @ basis) * taken) @ basis.T


def _right_eigenpairs(stacked: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues > 0 of ``A^T A``, descending, and its eigenvectors ``[n, k]``, by the smaller side."""
    rows, n = stacked.shape
    tall = rows >= n
    values, vectors = symmetric_eigh(stacked.T @ stacked if tall else stacked @ stacked.T, where=where)
    kept = values > max(rows, n) * torch.finfo(torch.float64).eps * values[0]
    values, vectors = values[kept], vectors[:, kept]
    return values, vectors if tall else stacked.T @ (vectors / values.sqrt())


def soft_filter(time: float) -> Filter:
    """``1 - exp(-time l)``: gradient flow for that time. (Descent by k steps of size s is ``1 - (1 - 2 s l)^k``.)"""
    return lambda values: -np.expm1(-time * values)


def hard_filter(rank: Callable[[npt.NDArray[np.float64]], int]) -> Filter:
    """1 for the leading directions, as many as ``rank`` says, 0 for the others."""
    return lambda values: (np.arange(len(values)) < rank(values)).astype(np.float64)


def both(a: Filter, b: Filter) -> Filter:
    return lambda values: a(values) * b(values)


def participation_of_roots(values: npt.NDArray[np.float64]) -> int:
    """``ceil((sum sqrt l)^2 / sum l)``, the automatic rank of ASWUDI."""
    return math.ceil(float(np.sqrt(values).sum() ** 2 / values.sum()) - 1e-9)


def entropy_rank(values: npt.NDArray[np.float64]) -> int:
    """``ceil(exp H(l / sum l))``."""
    p = values / values.sum()
    p = p[p > 0]
    return math.ceil(float(np.exp(-(p * np.log(p)).sum())) - 1e-9)


def noise_rank(shape: tuple[int, int]) -> Callable[[npt.NDArray[np.float64]], int]:
    """Gavish and Donoho's threshold on the square roots, for a stack of tasks of this shape."""
    return lambda values: gavish_donoho()(np.sqrt(values), *shape)
