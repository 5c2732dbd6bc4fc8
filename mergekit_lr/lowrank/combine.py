"""Merges of adapters in the space of their factors: exact, and without a dense delta.

All take pairs ``(B_i, A_i)`` of one module (``B_i [out, r_i]``, ``A_i [r_i, in]``, ranks may differ) and factors
``s_i`` (the adapter's own scale times its weight in the merge), and give one pair with scale 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mergekit_lr.linalg import RankPolicy, concatenation_svd, sum_svd
from mergekit_lr.linalg.lowrank import Pair

Rule = Callable[[list[Tensor]], Tensor]
"""Merges tensors of one shape entry by entry."""

KNOTS_CUT = 1e-5
"""KnOTS drops singular values up to this (absolute, as its authors do), relative to the largest here."""


def concatenated(pairs: Sequence[Pair], scales: Sequence[float]) -> Pair:
    """``[s_1 B_1 ... s_k B_k], [A_1; ...; A_k]``: the product is exactly ``sum_i s_i B_i A_i``, of rank ``sum r_i``.

    ``sqrt|s|`` goes to each side and the sign to B, so that neither factor loses range in 16 bits. fp64.
    """
    b = torch.cat(
        [f.double() * math.copysign(math.sqrt(abs(s)), s) for (f, _), s in zip(pairs, scales, strict=True)], 1
    )
    a = torch.cat([f.double() * math.sqrt(abs(s)) for (_, f), s in zip(pairs, scales, strict=True)], 0)
    return b, a


def compressed(pairs: Sequence[Pair], scales: Sequence[float], rank: int | RankPolicy | None) -> tuple[Pair, float]:
    """The best pair of that rank for ``sum_i s_i B_i A_i`` (stacked QR and a small core) and its relative error.

    A rank above what the sum can have is lowered to that. fp64.
    """
    limit = min(sum(b.shape[1] for b, _ in pairs), pairs[0][0].shape[0], pairs[0][1].shape[1])
    wanted = min(rank, limit) if isinstance(rank, int) else rank
    found = sum_svd([(b.double(), a.double()) for b, a in pairs], scales, wanted)
    norm = found.certificate.norm
    return found.balanced(), found.certificate.residual / norm if norm else 0.0


def knots(pairs: Sequence[Pair], scales: Sequence[float], rule: Rule) -> Pair:
    """Merge on aligned parts: ``[s_1 B_1 A_1 ... s_k B_k A_k] = U S [V_1^T ... V_k^T]``, ``(U, rule(S V_i^T))``.

    The tasks share the columns of U, so entry (j, c) of ``S V_i^T`` means the same in each, and an elementwise rule
    (TIES, DARE) makes sense there, which it does not on the factors. Any linear rule gives what it gives on dense
    deltas. Directions with ``sigma <= 1e-5 sigma_1`` are dropped. fp64 throughout but for the rule, which is fp32.

    Source: Stoica et al., "Model merging with SVD to tie the knots", ICLR 2025, arXiv:2410.19735, section 4.
    """
    joint = concatenation_svd([(b.double(), a.double()) for b, a in pairs], scales)
    keep = max(1, int((joint.s > KNOTS_CUT * joint.s[0]).sum()))
    parts = torch.split(joint.s[:keep, None] * joint.vh[:keep], [a.shape[1] for _, a in pairs], dim=1)
    return joint.u[:, :keep].contiguous(), rule([p.float().contiguous() for p in parts]).double()


def cross_terms(pairs: Sequence[Pair], scales: Sequence[float]) -> Pair:
    """PEFT's ``linear``: ``(sum_i sqrt|s_i| B_i, sum_i sign(s_i) sqrt|s_i| A_i)``, ranks equal.

    Its product holds ``sqrt|s_i s_j| B_i A_j`` for every pair i != j, which no adapter was trained for. For comparison
    with PEFT only.
    """
    b = torch.stack([f.double() * math.sqrt(abs(s)) for (f, _), s in zip(pairs, scales, strict=True)])
    a = torch.stack([f.double() * math.copysign(math.sqrt(abs(s)), s) for (_, f), s in zip(pairs, scales, strict=True)])
    return b.sum(0), a.sum(0)


def distance(one: Pair, other: Pair) -> tuple[float, float]:
    """``||B A - B' A'||_F`` and ``||B A||_F`` from Grams of the factors; nothing dense.

    ``<B A, B' A'> = sum((B^T B') * (A A'^T))``. The difference is taken as one stacked pair, so its square is a sum
    over ``(r + r')^2`` numbers and loses half the digits: below about 1e-8 of the norm it is rounding.
    """
    (b, a), (c, d) = one, other
    left, right = torch.cat([b.double(), -c.double()], 1), torch.cat([a.double(), d.double()])
    difference = float(((left.T @ left) * (right @ right.T)).sum())
    norm = float(((b.double().T @ b.double()) * (a.double() @ a.double().T)).sum())
    return math.sqrt(max(difference, 0.0)), math.sqrt(max(norm, 0.0))
