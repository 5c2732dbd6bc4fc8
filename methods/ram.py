"""RAM: average task vectors only over the models that changed an entry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_lr.method import Base, Call, Method, Parameters, Piece, Source, parameter
from mergekit_lr.reinforced import changed, changers, mean_of_changes

if TYPE_CHECKING:
    from torch import Tensor


class Ram(Method):
    r"""Reinforced agent merging: ``base + sum_i m_i D_i / max(1, sum_i m_i)``, entry by entry.

    ``D_i = W_i - base`` and ``m_i = 1`` where ``|D_i| > epsilon``, else 0. Reinforcement learning changes few
    entries, and mostly different ones in each model: a change that one model alone made is kept whole, where an
    average over all models would shrink it.

    Elementwise in fp32, any shape; one look at each tensor.

    Source: Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models", 2026, arXiv:2601.13572, section 4.
    """

    name = "ram"
    summary = "average the task vectors at each entry over the models that changed it"
    source = Source("Behavior Knowledge Merge in Reinforced Agentic Models (RAM)", arxiv="2601.13572")
    base = Base.REQUIRED
    exposes_nonfinite = True

    class Merge(Parameters):
        epsilon: float = parameter(
            1e-5, ge=0, allow_inf_nan=False, description="the largest difference from the base that counts as none"
        )

    def merge(self, call: Call, piece: Piece, state: Any) -> Tensor:
        masks = changed(piece.tensors, call.merge.epsilon)
        return mean_of_changes(piece.tensors, masks, changers(masks))
