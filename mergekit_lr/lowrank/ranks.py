"""Which rank a matrix gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergekit_lr.linalg.rank import RankPolicy


@dataclass(frozen=True)
class RankRule:
    """Which rank a matrix gets: ``rank``, or the smallest that keeps ``energy`` of the squared norm, or ``ratio`` of
    the smaller side; with one of these ``rank`` is the most."""

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None

    def policy(self, rows: int, columns: int) -> int | RankPolicy:
        from mergekit_lr.linalg.rank import RankPolicy, energy
        from mergekit_lr.linalg.rank import ratio as ratio_policy

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
        if self.energy is not None:
            return min(rows, columns, self.rank or rows)
        found = self.policy(rows, columns)
        assert isinstance(found, int)
        return found
