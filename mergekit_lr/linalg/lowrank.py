"""Sums and concatenations of low-rank pairs, decomposed exactly in rank space."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_lr.errors import LinalgError
from mergekit_lr.linalg.certificate import PROMISE, Certificate, rounding_floor
from mergekit_lr.linalg.checks import check_matrix, check_same_shape, largest_entry
from mergekit_lr.linalg.eigh import fix_signs
from mergekit_lr.linalg.exact import full_svd
from mergekit_lr.linalg.rank import RankPolicy, as_policy
from mergekit_lr.linalg.truncated import TruncatedSVD

Pair = tuple[Tensor, Tensor]


def sum_svd(
    pairs: Sequence[Pair], scales: Sequence[float] | None = None, rank: int | RankPolicy | None = None
) -> TruncatedSVD:
    """SVD of ``sum_i s_i B_i A_i`` (B_i ``[m, r_i]``, A_i ``[r_i, n]``) from the factors alone.

    With ``[s_1 B_1 ... s_k B_k] = Q_B R_B`` and ``[A_1; ...; A_k]^T = Q_A R_A`` the sum is ``Q_B (R_B R_A^T)
    Q_A^T``; only the core, of order ``R = sum r_i``, is decomposed. Cost ``O((m + n) R^2 + R^3)``, fp64
    throughout, exact to 1e-15 (not a randomised method, which cannot be exact when its sketch is narrower than R).

    Args:
        pairs: low-rank factors, fp16 to fp64; ranks may differ.
        scales: s_i, 1 by default; may be negative.
        rank: kept rank or policy (it sees ``min(m, n, R)`` values as the whole spectrum); all of them by default.

    Returns:
        Factors in fp32 (fp64 if any input is), with the exact residual of the cut.

    Raises:
        LinalgError: empty list, shapes that do not chain, an impossible rank.
        NonFiniteError: NaN or infinity.
    """
    scales = _checked(pairs, scales, "sum_svd")
    if any(b.shape[0] != pairs[0][0].shape[0] or a.shape[1] != pairs[0][1].shape[1] for b, a in pairs):
        raise LinalgError("the products have different shapes", where="sum_svd", why="they cannot be added")
    q_b, r_b = _stacked_qr([b.double() * s for (b, _), s in zip(pairs, scales, strict=True)])
    q_a, r_a = _stacked_qr([a.double().T for _, a in pairs])
    left, sigma, right = full_svd(r_b @ r_a.T, where="sum_svd")
    return _cut(q_b @ left, sigma, right @ q_a.T, rank, pairs)


def concatenation_svd(
    pairs: Sequence[Pair], scales: Sequence[float] | None = None, rank: int | RankPolicy | None = None
) -> TruncatedSVD:
    """SVD of ``[s_1 B_1 A_1, ..., s_k B_k A_k]`` ``[m, sum n_i]`` from the factors alone (the alignment of KnOTS,
    arXiv 2410.19735, without a dense delta).

    With ``[B_1 ... B_k] = Q_B R_B`` and ``A_i^T = Q_i R_i`` the concatenation is ``Q_B (R_B blkdiag(s_i R_i^T))
    blkdiag(Q_i)^T``; the core has order ``R = sum r_i``. Same cost, accuracy, arguments and errors as `sum_svd`;
    n_i may differ.
    """
    scales = _checked(pairs, scales, "concatenation_svd")
    if any(b.shape[0] != pairs[0][0].shape[0] for b, _ in pairs):
        raise LinalgError("the products have different numbers of rows", where="concatenation_svd")
    q_b, r_b = _stacked_qr([b.double() for b, _ in pairs])
    qs, rs = zip(*(torch.linalg.qr(a.double().T) for _, a in pairs), strict=True)
    columns = torch.split(r_b, [b.shape[1] for b, _ in pairs], dim=1)
    core = torch.cat([c @ r.T * s for c, r, s in zip(columns, rs, scales, strict=True)], dim=1)
    left, sigma, right = full_svd(core, where="concatenation_svd")
    parts = torch.split(right, [r.shape[0] for r in rs], dim=1)
    vh = torch.cat([p @ q.T for p, q in zip(parts, qs, strict=True)], dim=1)
    return _cut(q_b @ left, sigma, vh, rank, pairs)


def _checked(pairs: Sequence[Pair], scales: Sequence[float] | None, where: str) -> Sequence[float]:
    if not pairs:
        raise LinalgError("the list of pairs is empty", where=where, fix="pass at least one pair (B, A)")
    for i, (b, a) in enumerate(pairs):
        for label, factor in (("B", b), ("A", a)):
            check_matrix(factor, f"{where} {label}_{i + 1}")
            largest_entry([factor], f"{where} {label}_{i + 1}")
        if b.shape[1] != a.shape[0]:
            raise LinalgError(f"pair {i + 1} does not chain: B is {tuple(b.shape)}, A is {tuple(a.shape)}", where=where)
        if b.device != pairs[0][0].device or a.device != pairs[0][0].device:
            raise LinalgError(f"pair {i + 1} is on another device", where=where, fix="move them to one device")
    scales = [1.0] * len(pairs) if scales is None else scales
    check_same_shape([pairs[0][0]] * len(pairs), scales, where)
    return scales


def _stacked_qr(factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(torch.cat(list(factors), dim=1))
    return q, r


def _cut(u: Tensor, sigma: Tensor, vh: Tensor, rank: int | RankPolicy | None, pairs: Sequence[Pair]) -> TruncatedSVD:
    limit = sigma.numel()
    r = limit if rank is None else as_policy(rank)(sigma.cpu().numpy(), limit, limit)
    wide = any(t.dtype == torch.float64 for pair in pairs for t in pair)
    dtype = torch.float64 if wide else torch.float32
    u, vh = u[:, :r].contiguous(), vh[:r].contiguous()
    fix_signs(u, vh)
    residual = float(torch.linalg.vector_norm(sigma[r:]))
    norm = float(torch.linalg.vector_norm(sigma))
    floor = rounding_floor(dtype, PROMISE)
    certificate = Certificate(
        excess=0.0 if residual > floor * norm else math.inf,
        residual=residual,
        norm=norm,
        promise=PROMISE,
        floor=floor,
        route=f"core of order {limit}",
        bound_residual=residual,
    )
    return TruncatedSVD(u.to(dtype), sigma[:r].to(dtype), vh.to(dtype), certificate)
