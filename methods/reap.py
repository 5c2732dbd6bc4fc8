"""REAP and its kin: keep the experts that add most to the layer, leave the others out."""

from __future__ import annotations

from typing import Any

from mergekit_lr.experts.deciding import Parts, Score
from mergekit_lr.experts.reduction import ExpertReduction, ReductionParameters
from mergekit_lr.method import Source, parameter


class Reap(ExpertReduction):
    r"""Router-weighted expert activation pruning: the experts with the lowest scores are left out.

    Over the tokens t that the router sends to expert j, with the weight ``g_j(x_t)`` that the layer multiplies by and
    the expert's output ``E_j(x_t)``: ``S_j = mean_t g_j(x_t) |E_j(x_t)|_2``. In each layer the ``num_experts``
    highest stay, equal ones by index, bit for bit, with their rows of the router; what is left renormalises by itself
    where the family's router does.

    Other ``score``: ``frequency`` n_j; ``gate_sum``; ``ean`` ``sum |E_j|``; ``man``, ``msan`` mean norm and mean
    squared norm; ``gated_norm`` ``sum g |E_j|``; ``gated_square`` ``sum g^2 |E_j|^2``. ``guard`` keeps experts with
    massive activations whatever their score (arXiv 2507.23279).

    Nothing is computed on weights, ``[out, in]`` as they are: the merge copies.

    Source: Lasby et al., "REAP the experts: Why pruning prevails for one-shot MoE compression", ICLR 2026,
    arXiv:2510.13999.
    """

    name = "reap"
    summary = "leave out the experts with the lowest router-weighted output norm, or another score"
    source = Source("REAP", arxiv="2510.13999")

    class Merge(ReductionParameters):
        score: Score = parameter("reap", description="what experts are ranked by")
        guard: bool = parameter(False, description="keep experts with massive activations whatever their score")

    def parts(self, p: Any) -> Parts:
        return Parts(score=p.score, grouping="none", router="select", guard=p.guard)
