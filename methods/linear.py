"""Linear: the weighted average of models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_lr.combine import summable, weighted_sum
from mergekit_lr.method import Base, Call, Method, Parameters, Piece, Source, parameter

if TYPE_CHECKING:
    from torch import Tensor


class Linear(Method):
    r"""Model soup: ``sum_i w_i W_i``, divided by ``sum_i w_i`` when ``normalize``.

    Elementwise in fp32; one look at each tensor.

    Source: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy
    without increasing inference time", 2022, arXiv:2203.05482.
    """

    name = "linear"
    summary = "weighted average of the models"
    source = Source("Model soups", arxiv="2203.05482")
    base = Base.UNUSED
    exposes_nonfinite = True

    class Merge(Parameters):
        normalize: bool = parameter(True, description="divide by the sum of weights")

    class PerModel(Parameters):
        weight: float = parameter(allow_inf_nan=False, description="share of this model")

    def coefficients(self, call: Call, state: Any) -> list[float] | None:
        return summable(_shares(call))

    def merge(self, call: Call, piece: Piece, state: Any) -> Tensor:
        return weighted_sum(piece.tensors, _shares(call))

    def problems(self, merge: Any, models: tuple[Any, ...]) -> list[str]:
        if merge.normalize and abs(sum(m.weight for m in models)) < 1e-8:
            return ["the weights sum to zero, so normalize has nothing to divide by; set normalize: false"]
        return []


def _shares(call: Call) -> list[float]:
    weights = call.values("weight")
    total = sum(weights) if call.merge.normalize else 1.0
    return [w / total for w in weights]
