"""One pair of factors out of the many that give the same product.

``(B G, G^-1 A)`` is the same model for every invertible G, but another pair of factors: two identical adapters that
were trained to different G have a mean that is neither. So pairs are brought to one *gauge* before they are compared:

* ``svd``: ``B = U sqrt(S)``, ``A = sqrt(S) V^T`` with ``U S V^T = scale B A``, each column of U with its entry of
  largest modulus positive. Depends on the product alone, but where singular values lie close together, tasks that are
  alike can have their components in different order or rotated.
* ``aligned``: from there, each pair is rotated, ``(B R, R^T A)`` with R orthogonal, towards the mean of the others
  (generalised Procrustes analysis). Orthogonal R are all that keep both factors balanced, and the best one is the polar
  factor of ``B^T B_mean + A A_mean^T``. The sum of squared distances to the mean never grows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_lr.errors import LinalgError
from mergekit_lr.linalg import full_svd, sum_svd
from mergekit_lr.linalg.lowrank import Pair

SWEEPS = 8


def balanced(b: Tensor, a: Tensor, scale: float = 1.0, rank: int | None = None) -> Pair:
    """``scale B A`` in the ``svd`` gauge, fp64, padded with zeros to ``rank`` columns (default: those of B).

    Exact: the pair's rank is at most min(out, r, in), and padding goes up to ``rank``, never down.

    Raises:
        LinalgError: factors that do not chain, or a ``rank`` below the pair's own.
        NonFiniteError: NaN or infinity.
    """
    width = b.shape[1] if rank is None else rank
    left, right = sum_svd([(b.double(), a.double())], [scale]).balanced()
    kept = min(left.shape[1], width)
    if kept < left.shape[1] and bool(left[:, kept:].any()):
        raise LinalgError(f"cannot pad to rank {width}", where="balanced", why="the pair has more components")
    return pad(left[:, :kept], right[:kept], width)


def pad(b: Tensor, a: Tensor, rank: int) -> Pair:
    """The same product with ``rank`` columns in B, the new ones zero."""
    extra = rank - b.shape[1]
    if extra == 0:
        return b.contiguous(), a.contiguous()
    return torch.cat([b, b.new_zeros(b.shape[0], extra)], 1), torch.cat([a, a.new_zeros(extra, a.shape[1])])


def aligned(pairs: Sequence[Pair], sweeps: int = SWEEPS) -> list[Pair]:
    """Balanced pairs of one shape, each rotated towards the mean of the others; see the module's text.

    Deterministic: tasks in order, ``sweeps`` times or until nothing moves. A task whose overlap with the others is
    zero stays as it is.
    """
    pairs = list(pairs)
    if len(pairs) < 2:
        return pairs
    total_b, total_a = sum(b for b, _ in pairs), sum(a for _, a in pairs)
    for _ in range(sweeps):
        moved = 0.0
        for i, (b, a) in enumerate(pairs):
            overlap = b.T @ (total_b - b) + a @ (total_a - a).T
            size = float(torch.linalg.vector_norm(overlap))
            if size <= 1e-14 * float(torch.linalg.vector_norm(b) * torch.linalg.vector_norm(total_b) + 1e-300):
                continue
            rotation = _nearest_rotation(overlap)
            new_b, new_a = b @ rotation, rotation.T @ a
            change = float(torch.linalg.vector_norm(new_b - b)) / max(float(torch.linalg.vector_norm(b)), 1e-300)
            moved = max(moved, change)
            total_b, total_a = total_b - b + new_b, total_a - a + new_a
            pairs[i] = (new_b, new_a)
        if moved < 1e-9:
            break
    return pairs


def _nearest_rotation(m: Tensor) -> Tensor:
    """Orthogonal R that maximises ``<R, m>``; also where m has no rank, where a polar factor would vanish."""
    u, _, vh = full_svd(m, where="aligned")
    return u @ vh
