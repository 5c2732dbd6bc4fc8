"""Whether an alignment is good enough to interpolate: how far singular directions agree, before and after.

Permutations (and signs) of rows and columns leave singular values alone: ``P W Q^T = (P U) S (Q V)^T``. Hence for
``W_a = sum_i s_i u_i v_i^T`` and ``P W_b Q^T = sum_j t_j x_j y_j^T``

    <W_a, P W_b Q^T> = sum_ij s_i t_j (u_i . x_j)(v_i . y_j)  <=  sum_i s_i t_i       (von Neumann)

so matching aligns the directions of large singular values first. Source: Ito, Yamada, Kumagai, "Analysis of Linear
Mode Connectivity via Permutation-Based Weight Matching", arXiv 2402.04051; both scores are this package's versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mergekit_lr.linalg.exact import full_svd, singular_values
from mergekit_lr.matching.member import Read
from mergekit_lr.matching.steps import inner_product

GAMMA = 0.3


@dataclass(frozen=True)
class Agreement:
    """Of one matrix. ``weighted``: ``<A, B> / sum_i s_i t_i`` in [-1, 1]. ``top``: agreement of the directions whose
    singular values exceed gamma times the largest, ``sum (u_i.x_j)(v_i.y_j) / max(k_a, k_b)``; 1 where aligned."""

    name: str
    weighted: float
    top: float | None


def weighted_agreement(a: Tensor, b: Tensor) -> float:
    """``<A, B> / sum_i s_i(A) s_i(B)``: 1 iff B is as near to A as its singular values allow. 0 for a zero matrix."""
    s, t = singular_values(_matrix(a)), singular_values(_matrix(b))
    bound = float((s * t).sum())
    return inner_product(a, b) / bound if bound > 0 else 0.0


def top_agreement(a: Tensor, b: Tensor, gamma: float = GAMMA) -> float:
    """``sum_{i, j in the top sets} (u_i . x_j)(v_i . y_j) / max(k_a, k_b)``."""
    left, right = full_svd(_matrix(a)), full_svd(_matrix(b))
    k = [int((s > gamma * s[0]).sum()) for _, s, _ in (left, right)]
    if min(k) == 0:
        return 0.0
    u = left[0][:, : k[0]].T @ right[0][:, : k[1]]
    v = left[2][: k[0]] @ right[2][: k[1]].T
    return float((u * v).sum()) / max(k)


def _matrix(x: Tensor) -> Tensor:
    return x.detach().double().reshape(x.shape[0], -1)


def agreements(names: list[str], read_a: Read, read_b: Read, *, top: bool = False, most: int = 2048) -> list[Agreement]:
    """Of every matrix among ``names`` that is at least 2 wide; ``top`` only up to order ``most``."""
    found = []
    for name in names:
        a = read_a(name)
        if a.ndim < 2 or min(a.shape[0], a.numel() // a.shape[0]) < 2 or not a.is_floating_point():
            continue
        b = read_b(name)
        small = min(a.shape[0], a.numel() // a.shape[0]) <= most
        found.append(Agreement(name, weighted_agreement(a, b), top_agreement(a, b) if top and small else None))
    return found


def mean_agreement(found: list[Agreement]) -> Mapping[str, float]:
    """Means over the matrices."""
    tops = [f.top for f in found if f.top is not None]
    means = {"weighted": sum(f.weighted for f in found) / len(found)} if found else {}
    return means | ({"top": sum(tops) / len(tops)} if tops else {})
