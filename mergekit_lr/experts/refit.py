"""Least squares of ``down_proj`` against what the layer gave before: the routed, gate-weighted output.

With kept hidden activations ``h`` and gate weights ``g``, a reduced layer gives ``sum_m g_m(t) W_m h_m(t)``: linear in
the ``W``. So the best ``W`` for ``T_t = sum_i g_i(t) E_i(x_t)`` of the original layer solves one linear system. Three
ways: ``own`` (each expert against its own former output), ``joint`` (all experts of a layer in one system), and
``blocks`` (one expert after the other against what the others leave: coordinate descent to the joint solution, with
``I^2`` numbers of memory instead of ``(E I)^2``).

Every fit is guarded. Ridge is relative to the mean diagonal and pulls towards the unmodified weight; it grows when
tokens are fewer than 20 times the columns; and a fit counts only if it lowers the error on tokens that it has not
seen. Normal equations are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""Ridges that are tried; the held-out tokens decide."""

TOKENS_PER_COLUMN = 20
"""Below this many tokens for each unknown column, ridge grows in proportion."""


@dataclass
class Normal:
    """Normal equations of ``sum_t ||W phi_t - y_t||^2``: all that fitting and judging a fit needs.

    ``gram`` ``A = sum phi phi^T`` ``[P, P]``, ``cross`` ``B = sum phi y^T`` ``[P, H]``, ``power`` ``sum ||y||^2``, all
    float64; ``tokens`` counts the ``t``.
    """

    gram: Tensor
    cross: Tensor
    power: float
    tokens: int

    @classmethod
    def of(cls, features: Tensor, target: Tensor) -> Normal:
        """From ``features`` ``[tokens, P]`` and ``target`` ``[tokens, H]``."""
        phi, y = features.double(), target.double()
        return cls(phi.T @ phi, phi.T @ y, float(y.square().sum()), len(phi))

    def __add__(self, other: Normal) -> Normal:
        return Normal(
            self.gram + other.gram, self.cross + other.cross, self.power + other.power, self.tokens + other.tokens
        )

    def error(self, weights: Tensor) -> float:
        """``sum_t ||W phi_t - y_t||^2`` of ``weights`` ``W^T`` ``[P, H]``."""
        fitted = self.gram @ weights - 2 * self.cross
        return max(0.0, float((weights * fitted).sum()) + self.power)

    def keep(self, columns: Tensor) -> Normal:
        """The equations of some features only."""
        return Normal(self.gram[columns][:, columns], self.cross[columns], self.power, self.tokens)


def solve(normal: Normal, start: Tensor, ridge: float) -> Tensor:
    """``argmin_W sum ||W phi - y||^2 + lam ||W - W0||^2``, float64 ``[P, H]``: ``W0 + (A + lam I)^-1 (B - A W0)``.

    ``lam`` is ``ridge`` times the mean diagonal of ``A``; where that is zero (no token came) ``W0`` is returned.
    """
    scale = float(normal.gram.diagonal().mean())
    if scale == 0.0:
        return start
    damped = normal.gram + ridge * scale * torch.eye(len(normal.gram), dtype=torch.float64)
    factor = torch.linalg.cholesky(damped)
    return start + torch.cholesky_solve(normal.cross - normal.gram @ start, factor)


def scarcity(tokens: int, columns: int) -> float:
    """Factor on the ridge: 1 with 20 tokens or more for each column, in proportion more below."""
    return max(1.0, TOKENS_PER_COLUMN * columns / max(1, tokens))


@dataclass(frozen=True)
class Fit:
    """A guarded fit. ``weights`` are ``W^T`` ``[P, H]``; errors are held-out squared errors over held-out power.

    ``ridge`` is None where no fit was better than the start, which then stays.
    """

    weights: Tensor
    before: float
    after: float
    ridge: float | None

    @property
    def accepted(self) -> bool:
        return self.ridge is not None


def guarded_fit(fit: Normal, held: Normal, start: Tensor, ridges: Sequence[float] = RIDGES) -> Fit:
    """Fit on one half of the tokens, judge on the other, and keep ``start`` where no ridge improves on it.

    The chosen ridge is then used on all tokens: both halves together are more data than either.
    """
    start = start.double()
    power = max(held.power, 1e-300)
    before = held.error(start) / power
    best, chosen, after = start, None, before
    for ridge in ridges:
        scaled = ridge * scarcity(fit.tokens, len(fit.gram))
        candidate = solve(fit, start, scaled)
        error = held.error(candidate) / power
        if error < after:
            best, chosen, after = candidate, ridge, error
    if chosen is None:
        return Fit(start, before, before, None)
    both = fit + held
    best = solve(both, start, chosen * scarcity(both.tokens, len(both.gram)))
    return Fit(best, before, after, chosen)
