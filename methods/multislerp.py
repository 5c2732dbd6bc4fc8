"""Multislerp: the direction of the mean of unit tensors, at their mean norm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_lr.combine import summable, weighted_sum
from mergekit_lr.method import Base, Call, Method, Parameters, Piece, Source, Statistics, parameter
from mergekit_lr.statistics import Float64, Gram, SquareSum

if TYPE_CHECKING:
    from torch import Tensor

NEARLY_NOTHING = 1e-2  # a mean direction shorter than this is measured by itself, not from the Gram matrix
NOTHING = 1e-6  # and one shorter than this is rounding


class Multislerp(Method):
    r"""Barycentric interpolation on a sphere: ``(sum_i w_i |X_i|) cos(eps) m / |m|``, ``m = sum_i w_i u_i``.

    ``u_i = X_i / (|X_i| + eps)`` over the whole tensor, X_i the models or, with a base, their task vectors;
    weights divided by their sum if ``normalize_weights``. The method is stated as one step of the exponential
    map at m from the weighted mean of the u_i projected on the tangent space there; that mean projects to
    nothing, ``sum_i w_i (u_i - <u_i, m> m / |m|^2) = m - m = 0``, so the step has the length eps it is kept
    from vanishing by, and the formula above is what remains. One model is returned as it is.

    Where ``|m| < max(eps, 1e-6)`` (directions cancel, or all X_i are zero) the result is ``sum_i w_i X_i``.
    mergekit does so for two models and stops with an error for more. Elementwise in fp32, any shape,
    coefficients in fp64 from one extra look, two where directions nearly cancel.

    Source: Goddard, "Multi-SLERP", https://goddard.blog/posts/multislerp-wow-what-a-cool-idea
    """

    name = "multislerp"
    summary = "direction of the mean of unit tensors, at their mean norm"
    source = Source("Multi-SLERP", url="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea")
    base = Base.OPTIONAL
    exposes_nonfinite = True

    class Merge(Parameters):
        normalize_weights: bool = parameter(True, description="divide the weights by their sum")
        eps: float = parameter(
            1e-8, gt=0, lt=1, description="added to norms; a mean direction shorter than this is none"
        )

    class PerModel(Parameters):
        weight: float = parameter(allow_inf_nan=False, description="share of this model")

    def statistics(self, call: Call, model_state: Any) -> Statistics | None:
        return self._coefficients(call) if len(call.models) > 1 else None

    def _coefficients(self, call: Call) -> Statistics:
        gram = yield Gram()
        weights, eps = _weights(call), call.merge.eps
        if not np.isfinite(gram).all():
            return [math.nan] * len(weights)  # what is not finite must reach the output
        norms = np.sqrt(gram.diagonal())
        m = np.where(norms > 0, weights / (norms + eps), 0)
        length = math.sqrt(max(float(m @ gram @ m), 0.0))
        if length < NEARLY_NOTHING * float(np.abs(weights).sum()):
            length = yield from _length(m)
        if length < max(eps, NOTHING):
            return weights.tolist()
        return [float(c) for c in m * (float(weights @ norms) * math.cos(eps) / length)]

    def coefficients(self, call: Call, state: Any) -> list[float] | None:
        return None if state is None else summable(state)

    def merge(self, call: Call, piece: Piece, state: Any) -> Tensor:
        return piece.tensors[0].clone() if state is None else weighted_sum(piece.tensors, state)

    def problems(self, merge: Any, models: tuple[Any, ...]) -> list[str]:
        if merge.normalize_weights and len(models) > 1 and abs(sum(m.weight for m in models)) < 1e-8:
            return ["the weights sum to zero, so there is nothing to divide by; set normalize_weights: false"]
        return []


def _weights(call: Call) -> Float64:
    weights = np.array(call.values("weight"))
    return weights / weights.sum() if call.merge.normalize_weights else weights


def _length(coefficients: Float64) -> Statistics:
    """Norm of a linear combination, from the vector itself: a Gram matrix loses it where the terms cancel."""

    def combination(call: Call, piece: Piece) -> list[Tensor]:
        return [weighted_sum(piece.tensors, coefficients.tolist())]

    squares = yield SquareSum(combination)
    return math.sqrt(squares[0])
