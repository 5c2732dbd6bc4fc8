"""RAM+ (tensor-local): RAM that makes up, tensor by tensor, for what sharing an entry dilutes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_lr.method import Base, Call, Method, Parameters, Piece, Source, Statistics, parameter
from mergekit_lr.reinforced import changed, changers, mean_of_changes
from mergekit_lr.statistics import CountNonzero

if TYPE_CHECKING:
    from torch import Tensor


class RamPlusTl(Method):
    r"""RAM+, with the overlap counted in each tensor by itself.

    As `ram`, but an entry that only model i changed is multiplied by
    ``lambda_i = 1 + r min(alpha, shared_i / max(unique_i, epsilon))``, where ``shared_i`` and ``unique_i`` count the
    entries of this tensor that model i changed together with others, and alone. A model whose changes are mostly
    averaged away gets its own back the stronger.

    Elementwise in fp32, any shape; counts are whole numbers; one extra look at each tensor.

    Source: Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models", 2026, arXiv:2601.13572, section 4.
    The paper counts over the whole model; counting in each tensor is mergekit's variant, and its name.
    """

    name = "ramplus_tl"
    summary = "RAM, changes that one model made alone scaled up by how much of the rest is shared"
    source = Source("Behavior Knowledge Merge in Reinforced Agentic Models (RAM+)", arxiv="2601.13572")
    base = Base.REQUIRED
    exposes_nonfinite = True

    class Merge(Parameters):
        r: float = parameter(0.1, allow_inf_nan=False, description="strength of the scaling; 0 is RAM")
        alpha: float = parameter(0.2, ge=0, allow_inf_nan=False, description="most that shared / unique counts for")
        epsilon: float = parameter(
            1e-5, ge=0, allow_inf_nan=False, description="the largest difference from the base that counts as none"
        )

    def statistics(self, call: Call, model_state: Any) -> Statistics | None:
        return self._factors(call)

    def _factors(self, call: Call) -> Statistics:
        m = call.merge
        counts = yield CountNonzero(_shared_and_unique)
        n = len(call.models)
        overlap = [s / max(u, m.epsilon) if s else 0.0 for s, u in zip(counts[:n], counts[n:], strict=True)]
        return [1 + m.r * min(m.alpha, o) for o in overlap]

    def merge(self, call: Call, piece: Piece, state: Any) -> Tensor:
        masks = changed(piece.tensors, call.merge.epsilon)
        return mean_of_changes(piece.tensors, masks, changers(masks), alone=state)


def _shared_and_unique(call: Call, piece: Piece) -> list[Tensor]:
    """Masks: what each model changed with others, then what each changed alone."""
    masks = changed(piece.tensors, call.merge.epsilon)
    count = changers(masks)
    return [m & (count > 1) for m in masks] + [m & (count == 1) for m in masks]
