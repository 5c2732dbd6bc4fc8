"""The low-rank pair nearest to a full fine-tune's change of one matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mergekit_lr.linalg import RankPolicy, energy, truncated_svd
from mergekit_lr.linalg import ratio as ratio_policy
from mergekit_lr.linalg.lowrank import Pair


@dataclass(frozen=True)
class RankRule:
    """Which rank a matrix gets: ``rank``, or the smallest that keeps ``energy`` of the squared norm, or ``ratio`` of
    the smaller side; with one of these ``rank`` is the most."""

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None

    def policy(self, rows: int, columns: int) -> int | RankPolicy:
        limit = min(rows, columns)
        most = limit if self.rank is None else min(self.rank, limit)
        if self.energy is not None:
            by_energy = energy(self.energy)
            name = f"{by_energy.name}, at most {most}"
            return RankPolicy(name, lambda s, m, n: min(most, by_energy(s, m, n)), True)
        if self.ratio is not None:
            return min(most, ratio_policy(self.ratio)(None, rows, columns))
        return most

    def most(self, rows: int, columns: int) -> int:
        """The largest rank that the rule can give."""
        found = self.policy(rows, columns)
        return found if isinstance(found, int) else min(rows, columns, self.rank or min(rows, columns))


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
