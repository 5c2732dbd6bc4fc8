"""Karcher: the Riemannian mean of directions, at the mean norm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_lr.combine import summable, weighted_sum
from mergekit_lr.method import Base, Call, Method, Parameters, Piece, Source, Statistics, parameter
from mergekit_lr.statistics import Float64, Gram

if TYPE_CHECKING:
    from torch import Tensor

CANCELLED = 1e-3  # a mean direction shorter than this is lost in the rounding of the Gram matrix
ANTIPODAL = 1e-3  # within this angle of -m the direction towards a point is lost in rounding


class Karcher(Method):
    r"""Karcher (Frechet) mean on the sphere, tensor by tensor: the m that minimises ``sum_i a(m, u_i)^2``.

    ``u_i = W_i / |W_i|`` over the flattened tensor, a(.,.) the angle. From the normalised arithmetic mean,
    ``m <- exp_m(mean_i log_m(u_i))``, that is ``T = mean_i (a_i / sin a_i) (u_i - cos a_i m)`` and
    ``m <- cos|T| m + sin|T| T / |T|``, until ``|T| < tol`` or ``max_iter`` steps. The result is
    ``mean_i |W_i|`` times m. Tensors of norm up to ``tol`` have no direction and count for the norm alone; all
    of them so: zeros. If the directions cancel (their mean is shorter than 1e-3) the start is the first
    model's. A direction opposite to m (to 1e-3) has no shortest way to it and pulls nowhere.

    Every iterate lies in the span of the inputs, so the iteration runs in fp64 on n coefficients with one
    Gram matrix; the tensors are looked at twice, whatever ``max_iter``. Elementwise in fp32, any shape.

    Source: Karcher, "Riemannian center of mass and mollifier smoothing", Comm. Pure Appl. Math. 30 (1977),
    https://doi.org/10.1002/cpa.3160300502; for models, Wang, Ye and Yin, arXiv:2603.04972.
    """

    name = "karcher"
    summary = "Riemannian mean of the directions, at the mean norm"
    source = Source("Riemannian center of mass and mollifier smoothing", url="https://doi.org/10.1002/cpa.3160300502")
    base = Base.UNUSED
    exposes_nonfinite = True

    class Merge(Parameters):
        max_iter: int = parameter(10, ge=0, description="most steps of the iteration")
        tol: float = parameter(
            1e-5, gt=0, lt=1, description="step length (radians) that ends it; also the norm that counts as zero"
        )

    def statistics(self, call: Call, model_state: Any) -> Statistics | None:
        return self._coefficients(call) if len(call.models) > 1 else None

    def _coefficients(self, call: Call) -> Statistics:
        gram = yield Gram()
        return [float(c) for c in karcher_mean(gram, call.merge.max_iter, call.merge.tol)]

    def coefficients(self, call: Call, state: Any) -> list[float] | None:
        return None if state is None else summable(state)

    def merge(self, call: Call, piece: Piece, state: Any) -> Tensor:
        return piece.tensors[0].clone() if state is None else weighted_sum(piece.tensors, state)


def karcher_mean(gram: Float64, max_iter: int, tol: float) -> Float64:
    """Coefficients of the inputs in the result: float64 ``[n]`` from their Gram matrix ``[n, n]``."""
    if not np.isfinite(gram).all():
        return np.full(len(gram), math.nan)  # what is not finite must reach the output
    norms = np.sqrt(gram.diagonal())
    valid = norms > tol
    if not valid.any():
        return np.zeros(len(norms))
    unit = norms[valid]
    m = _mean_on_sphere(gram[np.ix_(valid, valid)] / np.outer(unit, unit), max_iter, tol)
    out = np.zeros(len(norms))
    out[valid] = m / unit * norms.mean()
    return out


def _mean_on_sphere(gram: Float64, max_iter: int, tol: float) -> Float64:
    """Coefficients of the mean in unit vectors with this Gram matrix."""
    n = len(gram)

    def length(x: Float64) -> float:
        return math.sqrt(max(float(x @ gram @ x), 0.0))

    m = np.full(n, 1 / n)
    size = length(m)
    m = m / size if size >= max(tol, CANCELLED) else np.eye(n)[0]
    for _ in range(max_iter):
        cos = np.clip(gram @ m, -1, 1)
        angle = np.arccos(cos)
        sin = np.sqrt(1 - cos**2)
        pulls = (angle >= tol) & ((cos > 0) | (sin >= ANTIPODAL))
        pull = np.where(pulls, angle / np.where(pulls, sin, 1), 0) / n
        step = pull - float(pull @ cos) * m
        size = length(step)
        if size < tol:
            break
        m = math.cos(size) * m + math.sin(size) / size * step
        size = length(m)
        m = m / size if size > tol else m
    return m
