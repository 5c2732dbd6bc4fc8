"""How many singular values to keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy.integrate import quad
from scipy.optimize import brentq

from mergekit_lr.errors import LinalgError
from mergekit_lr.linalg.checks import check_rank

Spectrum = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RankPolicy:
    """A rule for the rank of an ``[m, n]`` matrix, always in ``1 .. min(m, n)``.

    ``needs_spectrum`` says whether the rule looks at the singular values (then a truncation takes the route that
    computes all of them); otherwise shape alone decides.
    """

    name: str
    rule: Callable[[Spectrum, int, int], int]
    needs_spectrum: bool

    def __call__(self, sigma: Spectrum | None, m: int, n: int) -> int:
        """Rank for singular values ``sigma`` (descending, ``[min(m, n)]``; None for a rule on shapes)."""
        if sigma is None:
            if self.needs_spectrum:
                raise LinalgError(f"the rank policy {self.name} needs the singular values", where="rank")
            sigma = np.zeros(0)
        return max(1, min(self.rule(sigma, m, n), m, n))


def fixed(rank: int) -> RankPolicy:
    """Exactly ``rank``; larger than the matrix is an error, never a silent cut."""
    return RankPolicy(f"fixed({rank})", lambda _s, m, n: check_rank(rank, min(m, n), "rank"), False)


def ratio(share: float) -> RankPolicy:
    """``round(share * min(m, n))``, at least 1; 0 < share <= 1."""
    if not 0.0 < share <= 1.0:
        raise LinalgError(f"a rank ratio must be in (0, 1], got {share!r}", where="rank")
    return RankPolicy(f"ratio({share})", lambda _s, m, n: round(share * min(m, n)), False)


def energy(share: float) -> RankPolicy:
    """The smallest r with ``sum_{i<=r} sigma_i^2 >= share * sum sigma_i^2``; 0 < share <= 1."""
    if not 0.0 < share <= 1.0:
        raise LinalgError(f"an energy share must be in (0, 1], got {share!r}", where="rank")

    def rule(sigma: Spectrum, m: int, n: int) -> int:
        cumulative = np.cumsum(sigma**2)
        # a share of exactly 1 must not ask for values that only rounding added
        return int(np.searchsorted(cumulative, share * cumulative[-1] * (1 - 1e-12))) + 1

    return RankPolicy(f"energy({share})", rule, True)


def participation() -> RankPolicy:
    """``ceil((sum sigma^2)^2 / sum sigma^4)``: the number of directions that share the energy evenly."""

    def rule(sigma: Spectrum, m: int, n: int) -> int:
        peak = float(sigma[0]) if sigma.size else 0.0
        if peak == 0.0:
            return 1
        squares = (sigma / peak) ** 2
        return math.ceil(float(squares.sum() ** 2 / (squares**2).sum()) - 1e-9)

    return RankPolicy("participation", rule, True)


def gavish_donoho(noise: float | None = None) -> RankPolicy:
    """Values above the optimal hard threshold (Gavish and Donoho 2014, arXiv 1305.5870).

    With ``beta = min(m, n) / max(m, n)`` the threshold is ``lambda*(beta) sqrt(max(m, n)) noise`` when the noise
    level (standard deviation of an entry) is known (eq. 10, 11), else ``lambda*(beta) / sqrt(mu_beta) *
    median(sigma)`` with mu_beta the median of the Marchenko-Pastur law (eq. 5, 6); 2.858 median(sigma) for square
    matrices.
    """

    def rule(sigma: Spectrum, m: int, n: int) -> int:
        beta, large = min(m, n) / max(m, n), max(m, n)
        if noise is None:
            cut = threshold_coefficient(beta) / math.sqrt(marchenko_pastur_median(beta)) * float(np.median(sigma))
        else:
            cut = threshold_coefficient(beta) * math.sqrt(large) * noise
        return int((sigma > cut).sum())

    return RankPolicy("gavish_donoho", rule, True)


def threshold_coefficient(beta: float) -> float:
    """``lambda*(beta) = sqrt(2 (beta + 1) + 8 beta / (beta + 1 + sqrt(beta^2 + 14 beta + 1)))``; 4/sqrt(3) at 1."""
    return math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta * beta + 14 * beta + 1)))


@cache
def marchenko_pastur_median(beta: float) -> float:
    """Median of the Marchenko-Pastur law with aspect ratio ``0 < beta <= 1`` and unit variance."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    middle, half = (low + high) / 2, (high - low) / 2

    def mass(angle: float) -> float:  # x = middle - half cos(angle) takes the square roots out of the integrand
        def density(a: float) -> float:
            x = middle - half * math.cos(a)
            return half**2 * math.sin(a) ** 2 / (2 * math.pi * beta * x) if x > 0 else 1 / (math.pi * beta) * half

        return float(quad(density, 0.0, angle, epsabs=1e-12)[0])

    angle = float(brentq(lambda a: mass(a) - 0.5, 0.0, math.pi, xtol=1e-13))
    return middle - half * math.cos(angle)


def as_policy(rank: int | RankPolicy) -> RankPolicy:
    """An integer as `fixed`; a policy as it is."""
    return rank if isinstance(rank, RankPolicy) else fixed(rank)
