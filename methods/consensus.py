"""Consensus merging: keep the entries of the multi-task vector that several tasks want."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from mergekit_lr.lazy import torch
from mergekit_lr.localize import agreement, elected, summed
from mergekit_lr.method import Base, Call, Method, Parameters, Piece, Source, Statistics, parameter
from mergekit_lr.sparsify import LargestMagnitude

if TYPE_CHECKING:
    from torch import Tensor

TRIM = LargestMagnitude()


class Consensus(Method):
    r"""Consensus merging of task vectors ``D_i = W_i - base``.

    Multi-task vector: ``tau = sum_i D_i`` (``multi_task: task_arithmetic``) or TIES' disjoint sum, of each D_i only
    the share ``density`` with the largest magnitudes, of those the entries of the elected sign (``multi_task:
    ties``). Masks: ``m_i = [ |D_i| > lambda_i |tau - D_i| ]``, D_i untrimmed. Consensus: ``base + scale * [
    sum_i m_i >= k ] tau``.

    With k = 2 entries go that no task wants (catastrophic) or only one (selfish); k = 0 keeps all, which is task
    arithmetic or TIES. The report counts catastrophic, selfish and shared entries whatever k is. Elementwise in
    fp32, any shape; one look at each tensor, with TIES up to three.

    Source: Wang et al., "Localizing task information for improved model merging and compression", ICML 2024,
    arXiv:2405.07813, sections 3 to 5.
    """

    name = "consensus"
    summary = "keep the entries of the multi-task vector that at least k tasks want"
    source = Source("Localizing task information (TALL masks)", arxiv="2405.07813")
    base = Base.REQUIRED
    min_models = 2
    exposes_nonfinite = True

    class Merge(Parameters):
        scale: float = parameter(
            0.3, allow_inf_nan=False, description="factor on the multi-task vector; the paper tunes it in 0.1 .. 1"
        )
        k: int = parameter(2, ge=0, description="how many tasks must want an entry for it to be kept; 0 keeps all")
        multi_task: Literal["task_arithmetic", "ties"] = parameter(
            "task_arithmetic", description="the multi-task vector: the sum of task vectors, or TIES' disjoint sum"
        )
        scope: Literal["tensor", "model"] = parameter(
            "model",
            alias="threshold_scope",
            description="with ties, where magnitudes compete: within each tensor, or over all tensors of a model "
            "together (the paper)",
        )

        @property
        def threshold_scope(self) -> str:
            """Where the trimming's magnitudes compete; a tensor that is not trimmed takes no part in the model's."""
            return self.scope if self.multi_task == "ties" else "tensor"

    class PerModel(Parameters):
        lam: float = parameter(
            0.4,
            alias="lambda",
            ge=0,
            allow_inf_nan=False,
            description="how selective the mask is: an entry is the task's if |D| > lambda |tau - D|",
        )
        density: float = parameter(
            0.2, ge=0, le=1, description="with ties, share of the task vector's entries that is kept"
        )

    def model_statistics(self, calls: Sequence[Call]) -> Statistics | None:
        trimmed = [c for c in calls if c.merge.multi_task == "ties"]
        return TRIM.model_statistics(trimmed) if trimmed else None

    def statistics(self, call: Call, model_state: Any) -> Statistics | None:
        return TRIM.statistics(call, model_state) if call.merge.multi_task == "ties" else None

    def merge(self, call: Call, piece: Piece, state: Any) -> Tensor:
        deltas = piece.tensors
        if call.merge.multi_task == "ties":
            vector = elected([TRIM.apply(call, piece, state, i) for i in range(len(deltas))])
        else:
            vector = summed(deltas)
        votes = agreement(deltas, vector, call.values("lam"))
        empty, single = (int(torch.count_nonzero(votes == n)) for n in (0, 1))
        piece.counts.update(catastrophic=empty, selfish=single, shared=votes.numel() - empty - single)
        # A product, not a choice: NaN and infinity survive it, so that the engine sees them.
        return vector.mul_(votes >= call.merge.k).mul_(call.merge.scale)

    def problems(self, merge: Any, models: tuple[Any, ...]) -> list[str]:
        if merge.k > len(models):
            return [f"k is {merge.k}, but there are {len(models)} models: nothing would be kept"]
        return []
