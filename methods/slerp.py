"""Slerp: along the great circle from the base to one other model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mergekit_lr.combine import summable, weighted_sum
from mergekit_lr.method import Base, Call, Method, Parameters, Piece, Source, Statistics, parameter
from mergekit_lr.statistics import Gram

if TYPE_CHECKING:
    from torch import Tensor

COLINEAR = 0.9995  # beyond this |cos| the two coefficients are those of a straight line (as in mergekit)
NO_NORM = 1e-8  # norms up to this count as 1 in the cosine


class Slerp(Method):
    r"""Spherical interpolation of two models, tensor by tensor.

    ``sin((1 - t) a) / sin(a) * W_0 + sin(t a) / sin(a) * W_1`` with W_0 the base, W_1 the other model and
    ``a = acos(<W_0, W_1> / (|W_0| |W_1|))``, the angle of the flattened tensors; t = 0 gives the base and t
    = 1 the other. Where ``|cos a| > 0.9995`` the line ``(1 - t) W_0 + t W_1`` is taken instead. A tensor of
    norm up to 1e-8 counts as orthogonal to the other. t outside 0 .. 1 extrapolates along the circle.

    Elementwise in fp32, any shape, with norms and angle in fp64 from sums over blocks; one extra look.

    Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985,
    https://doi.org/10.1145/325165.325242, section 3.3.
    """

    name = "slerp"
    summary = "along the great circle from the base to one other model"
    source = Source("Animating rotation with quaternion curves", url="https://doi.org/10.1145/325165.325242")
    base = Base.OPERAND
    min_models = 2
    max_models = 2
    commutes = False
    exposes_nonfinite = True

    class Merge(Parameters):
        t: float = parameter(allow_inf_nan=False, description="place on the way: 0 is the base, 1 the other model")

    def statistics(self, call: Call, model_state: Any) -> Statistics | None:
        return self._coefficients(call)

    def _coefficients(self, call: Call) -> Statistics:
        gram = yield Gram()
        n0, n1 = (math.sqrt(g) for g in gram.diagonal())
        cos = float(gram[0, 1]) / ((n0 if n0 > NO_NORM else 1.0) * (n1 if n1 > NO_NORM else 1.0))
        t = call.merge.t
        if abs(cos) > COLINEAR:
            return [1 - t, t]
        angle = math.acos(cos)
        return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]

    def coefficients(self, call: Call, state: Any) -> list[float] | None:
        return summable(state)

    def merge(self, call: Call, piece: Piece, state: Any) -> Tensor:
        return weighted_sum(piece.tensors, state)
