"""The low-rank pair nearest to a full fine-tune's change of one matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mergekit_lr.linalg import truncated_svd
from mergekit_lr.linalg.lowrank import Pair
from mergekit_lr.lowrank.ranks import RankRule


@dataclass(frozen=True)
class Decomposed:
    """``pair``: B ``[rows, r]`` and A ``[r, columns]``, fp32, balanced. ``residual`` and ``norm``: Frobenius norms of
    what is cut off and of the whole change."""

    pair: Pair
    residual: float
    norm: float

    @property
    def rank(self) -> int:
        return self.pair[0].shape[1]


def decompose(weight: Tensor, base: Tensor, rule: RankRule, name: str, seed: int = 0) -> Decomposed:
    """Truncated SVD of ``weight - base``, split evenly: ``B = U sqrt(S)``, ``A = sqrt(S) V^T``.

    Nothing dense beside the two is formed where the linalg core can avoid it. Certified to 1e-3 of the best error.

    Raises:
        NonFiniteError: NaN or infinity in either.
    """
    found = truncated_svd(weight, rule.policy(*weight.shape), base=base, seed=seed, name=name)
    b, a = found.balanced()
    return Decomposed((b.float(), a.float()), found.certificate.residual, found.certificate.norm)


def working_bytes(rows: int, columns: int, item: int) -> int:
    """About what `decompose` holds: both matrices, an fp32 copy of their difference, and Grams of the smaller side."""
    small = min(rows, columns)
    return rows * columns * (2 * item + 8) + 24 * small * small
