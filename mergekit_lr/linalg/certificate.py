"""Upper bounds on how far a truncation is from the best one, evaluated after the solve.

Notation: M ``[m, d]``, ``G = M M^T`` with eigenvalues ``lambda_1 >= lambda_2 >= ...``, ``tau_r^2 = tr G - sum_{i<=r}
lambda_i`` the squared error of the best rank-r approximation (Eckart-Young). In an orthonormal basis ``[Q, Q_perp]``,

    G = [[Theta, B^T], [B, C]],   Theta = diag(theta),   C <= mu I,   b_i = ||B e_i||.

Because ``C <= mu I``, G is at most ``[[Theta, B^T], [B, mu I]]`` in the Loewner order, and its largest eigenvalues
with it. That gives two bounds, neither of which needs a gap in the spectrum:

*Whole Ritz space* (Krylov; Q has l >= r columns, B is known). ``sum_{i<=r} lambda_i`` is at most the sum of the r
largest eigenvalues of ``[[Theta, K], [K, mu I]]``, ``K = (B^T B)^{1/2}``: a problem of order 2l
(`coupled_ritz_sum`). The usual ``sum theta_i + sum sigma_i(B)^2 / (theta_r - mu)`` follows from it and is never
better.

*Kept space* (Gram and eigensolver; Q = U_r). For any orthonormal ``[X; Y]`` with r columns, the CS decomposition and
Jensen's inequality give ``||Y (X^T)_i|| <= x_i sqrt(1 - x_i^2)``, ``x_i^2 = (X X^T)_ii``; hence by Ky Fan

    sum_{i<=r} lambda_i - sum_{i<=r} theta_i <= sum_i g(theta_i - mu, b_i),   g(d, b) = sqrt(d^2 / 4 + b^2) - d / 2.

Only ``||B||_F`` is known here; g is concave in b^2, so the worst distribution of it is a water filling
(`capture_loss`). B is what the computed decomposition got wrong: for ``H = G - U Lambda U^T`` (whole
decomposition), ``||B||_F <= ||H||_F / sqrt 2`` and ``theta_i - mu >= lambda^_i - lambda^_{r+1} - 2 ||H||_F``.
``||H||_F`` is not assumed: it is estimated from images of random signs under the exact G (Hutchinson: ``E ||H
x||^2 = ||H||_F^2``), times `SAFETY`. So the rounding of the Gram, the backward error of the eigensolver, and a
wrong answer of either, are all in it. First order errors cancel: the excess is quadratic in H except within ||H||
of a vanishing gap. Where this is too coarse, the part of H that the eigensolver made is computed entry by entry
from ``U^T G^ U`` and only the Gram's own rounding is estimated (`refined_loss`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_lr.linalg.gram import Probe, outer_product

PROBES = 8
SAFETY = 3.0
"""On the estimated ||H||_F. 8 probes estimate a rank-one H three times too low with probability 1e-3, a full-rank
H (which is what rounding gives) never in practice; sqrt(r) is slack in either case."""

PROMISE = 1e-3
EXACT_PROMISE = 1e-6
ORTHONORMALITY = 1e-5

ROUNDING = {
    (torch.float32, torch.float32): 3e-6,
    (torch.float64, torch.float32): 3e-7,
    (torch.float64, torch.float64): 1e-14,
}
"""Size, relative to ||M||_F, of rounding in factors by the dtypes (computed in, returned in). It lies inside their
span, so it adds to the residual in quadrature."""


@dataclass(frozen=True)
class Certificate:
    """What is known about ``residual / optimal - 1`` for a truncation of rank r.

    Attributes:
        excess: upper bound on residual / tau_r - 1; infinity where none could be given.
        residual: ``||M - M_r||_F`` as computed, in the units of M.
        norm: ``||M||_F``.
        promise: the excess asked for.
        floor: residuals up to ``floor * norm`` are at the rounding of the factors' dtype: M has rank r numerically
            and a relative excess has no meaning.
        route: what computed it, such as ``gram fp32``, ``krylov 3 blocks of 72``, ``full fp64``.
        bound_residual: upper bound on the residual itself.
    """

    excess: float
    residual: float
    norm: float
    promise: float
    floor: float
    route: str
    bound_residual: float = math.inf

    @property
    def holds(self) -> bool:
        """Whether the promise is certified."""
        return self.excess <= self.promise or self.bound_residual <= self.floor * self.norm

    def in_units(self, unit: float) -> Certificate:
        """The same certificate with its norms multiplied by ``unit``."""
        return replace(
            self,
            residual=self.residual * unit,
            norm=self.norm * unit,
            bound_residual=self.bound_residual * unit,
        )


def rounding_floor(returned: torch.dtype, promise: float) -> float:
    """The residual, relative to ``||M||_F``, below which rounding of the factors alone breaks a relative promise.

    ``1.05 rho / sqrt((1 + promise)^2 - 1)``: 7e-6 for fp32 factors and 1e-3, 7e-12 for fp64 ones and 1e-6.
    """
    return 1.05 * ROUNDING[torch.float64, returned] / math.sqrt((1.0 + promise) ** 2 - 1.0)


def gram_rounding(probe: Probe, g: Tensor) -> float:
    """`SAFETY` times the estimated ``||G - g||_F`` of a computed Gram g."""
    error = probe.images - g.double() @ probe.signs
    return SAFETY * float(torch.linalg.vector_norm(error)) / math.sqrt(probe.signs.shape[1]) + _noise(probe)


def perturbation(probe: Probe, values: Tensor, vectors: Tensor) -> float:
    """`SAFETY` times the estimated ``||G - U Lambda U^T||_F``, U made orthonormal; units of G.

    Args:
        probe: images of signs under the exact G.
        values: computed eigenvalues ``[n]``.
        vectors: computed eigenvectors ``[n, n]``; a departure from orthonormality is measured by the same signs
            (``U^T U Lambda x - Lambda x``) and counted in.
    """
    u, lam = vectors.double(), values.double().unsqueeze(1)
    k = probe.signs.shape[1]
    error = probe.images - u @ (lam * (u.T @ probe.signs))
    scaled = lam * probe.signs
    skew = u.T @ (u @ scaled) - scaled
    total = torch.linalg.vector_norm(error) + torch.linalg.vector_norm(skew)
    return SAFETY * float(total) / math.sqrt(k) + _noise(probe)


def _noise(probe: Probe) -> float:
    """Rounding of the fp64 measurement itself."""
    return 4.0 * torch.finfo(torch.float64).eps * probe.trace


def capture_loss(gaps: Tensor, coupling: float) -> float:
    """Bound on ``sum_{i<=r} lambda_i(G) - tr(U_r^T G U_r)``, the energy that a better basis could capture.

    Args:
        gaps: lower bounds on ``theta_i - mu``, ``[r]``, fp64, descending; negative ones allowed.
        coupling: bound on ``||B||_F``.
    """
    half = gaps.flip(0).cpu() / 2.0
    lost = float((-2.0 * half).clamp(min=0.0).sum())  # g(d, 0) = -d: directions that may simply be the wrong ones
    half = half.clamp(min=0.0)
    # water filling: b_i^2 = level^2 - half_i^2 over the smallest gaps, with sum b_i^2 = coupling^2
    counts = torch.arange(1, half.numel() + 1, dtype=torch.float64)
    levels = (coupling**2 + (half * half).cumsum(0)) / counts
    active = int((levels >= half * half).sum())
    level = math.sqrt(float(levels[active - 1]))
    return lost + float((level - half[:active]).clamp(min=0.0).sum())


def coarse_loss(lam: Tensor, rank: int, h: float) -> float:
    """`capture_loss` from the computed eigenvalues ``[n]`` and a bound h on ``||H||_F`` alone."""
    return capture_loss(lam[:rank] - lam[rank] - 2.0 * h, h / math.sqrt(2.0))


def refined_loss(g: Tensor, vectors: Tensor, rank: int, rounding: float) -> tuple[float, float]:
    """`capture_loss` and ``tr(U_r^T G U_r)`` with the eigensolver's error computed: products of order n, in fp64.

    With ``T = U^T G^ U`` and ``D = U^T U - I``, the orthonormal basis nearest to U sees ``T_ij - D_ij (T_ii +
    T_jj) / 2`` up to second order in D. Its diagonal blocks give Theta and mu exactly, its off-diagonal block
    ``||B||_F``.

    Args:
        g: the computed Gram ``[n, n]``.
        vectors: ``[n, n]``.
        rounding: bound on ``||G - g||_F``.
    """
    u = vectors.double()  # in fp32 these products would be as wrong as what they measure
    t = u.T @ (g.double() @ u)
    d = outer_product(u.T.contiguous())
    d.diagonal().sub_(1.0)
    if not float(d.abs().max()) <= ORTHONORMALITY:  # not eigenvectors at all: the expansion in D does not hold
        return math.inf, 0.0
    diagonal = t.diagonal().clone()
    t -= 0.5 * d * (diagonal.unsqueeze(0) + diagonal.unsqueeze(1))
    diagonal = t.diagonal().clone()
    t.diagonal().zero_()
    theta = torch.linalg.eigvalsh(_with_diagonal(t[:rank, :rank], diagonal[:rank])).flip(0)
    mu = torch.linalg.eigvalsh(_with_diagonal(t[rank:, rank:], diagonal[rank:]))[-1]
    across = float(torch.linalg.vector_norm(t[rank:, :rank]))
    loss = capture_loss(theta - mu - 2.0 * rounding, across + rounding / math.sqrt(2.0))
    return loss, float(diagonal[:rank].sum())


def _with_diagonal(t: Tensor, diagonal: Tensor) -> Tensor:
    block = 0.5 * (t + t.T)
    block.diagonal().copy_(diagonal)
    return block


def excess_bound(tail: float, loss: float, extra: float = 0.0) -> float:
    """Bound on residual / tau_r - 1 when ``residual^2 <= t + extra`` and ``tau_r^2 >= t - loss`` for some t >= tail."""
    if not math.isfinite(tail) or not tail - loss > 0.0:
        return math.inf
    return math.sqrt((tail + extra) / (tail - loss)) - 1.0


def certify(
    *,
    norm_squared: float,
    tail: float,
    slack: float,
    loss: float,
    computed: torch.dtype,
    returned: torch.dtype,
    promise: float,
    route: str,
) -> Certificate:
    """The certificate of a projection whose squared residual is within ``slack`` of ``tail``.

    Args:
        norm_squared: ``||M||_F^2``; like all of these in the units of G.
        tail: computed ``tr G - sum_{i<=r} theta_i``.
        slack: bound on the error of ``tail``, either way.
        loss: bound on squared residual minus ``tau_r^2``.
        computed: dtype of the computation.
        returned: dtype of the factors; the rounding of both is added.
    """
    extra = ROUNDING[computed, returned] ** 2 * norm_squared
    return Certificate(
        excess=excess_bound(tail - slack, loss, extra),
        residual=math.sqrt(max(tail, 0.0) + extra),
        norm=math.sqrt(norm_squared),
        promise=promise,
        floor=rounding_floor(returned, promise),
        route=route,
        bound_residual=math.sqrt(max(tail + slack, 0.0) + extra),
    )


def coupled_ritz_sum(theta: Tensor, gram_of_residual: Tensor, mu: float, rank: int) -> float:
    """Upper bound on ``sum_{i<=r} lambda_i(G)`` from Ritz values, residual Gram and a bound on the complement.

    Args:
        theta: Ritz values ``[l]``, l >= rank.
        gram_of_residual: ``R^T R`` in the Ritz basis, ``[l, l]``, fp64.
        mu: at least the largest eigenvalue of G on the complement of the whole Ritz space.
    """
    kappa, rotation = torch.linalg.eigh(gram_of_residual)
    kappa = kappa.clamp(min=0.0)
    # Directions below fp32's rounding of G are dropped from the problem and counted by the sum of their norms (Ky Fan).
    kept = kappa > (1e-6 * float(theta[0])) ** 2
    dropped = float(kappa[~kept].sqrt().flip(0)[:rank].sum())
    coupling = rotation[:, kept] * kappa[kept].sqrt()
    order = theta.numel()
    extended = torch.zeros(order + coupling.shape[1], order + coupling.shape[1], dtype=torch.float64)
    extended[:order, :order] = torch.diag(theta)
    extended[:order, order:] = coupling
    extended[order:, :order] = coupling.T
    extended[order:, order:].fill_diagonal_(mu)
    # the rest of the complement carries further eigenvalues mu
    return dropped + float(torch.linalg.eigvalsh(extended).flip(0)[:rank].clamp(min=mu).sum())
