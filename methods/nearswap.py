"""NearSwap: go to the other model where it is near, stay with the base where it is far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_lr.method import Base, Call, Method, Parameters, Piece, Source, parameter

if TYPE_CHECKING:
    from torch import Tensor

NO_DIFFERENCE = 1e-6  # the least distance that t is divided by (as in mergekit)


class NearSwap(Method):
    r"""NearSwap: entry by entry ``w W_1 + (1 - w) W_0`` with ``w = min(1, t / max(|W_1 - W_0|, 1e-6))``.

    W_0 is the base, W_1 the other model. Entries that differ by at most t become the other model's; from there on
    the result stays exactly t away from the base, on the other model's side. t = 0 gives the base.

    Elementwise in fp32, any shape; one look at each tensor.

    Source: the model card of QuartetAnemoi-70B, where the method was introduced,
    https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.
    """

    name = "nearswap"
    summary = "the other model's entries where they are near the base's, else a step of size t towards them"
    source = Source("QuartetAnemoi-70B", url="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001")
    base = Base.OPERAND
    min_models = 2
    max_models = 2
    commutes = False
    exposes_nonfinite = True

    class Merge(Parameters):
        t: float = parameter(
            ge=0, allow_inf_nan=False, description="the difference up to which entries are the other model's"
        )

    def merge(self, call: Call, piece: Piece, state: Any) -> Tensor:
        base, other = piece.tensors
        share = (other - base).abs_().clamp_(min=NO_DIFFERENCE).reciprocal_().mul_(call.merge.t).clamp_(max=1)
        return (1 - share).mul_(base).add_(share.mul_(other))
