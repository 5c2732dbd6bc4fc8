"""M-SMoE: the most used experts are centres, and the others are merged into them with their neurons aligned."""

from __future__ import annotations

from typing import Any

from mergekit_lr.experts.deciding import Parts
from mergekit_lr.experts.reduction import ExpertReduction, MergingParameters
from mergekit_lr.method import Source, parameter


class MSmoe(ExpertReduction):
    r"""M-SMoE: merging guided by the routing policy.

    The ``num_experts`` most often used experts of a layer are dominant. Every other joins the dominant one whose router
    logits are most like its own, by the cosine between their columns ``H_i, H_j`` over tokens (section 3.2). In a group
    with members of usage ``a_i``, neurons are permuted to match those of the dominant expert, then
    ``W = sum_i a_i P_i W_i / sum_i a_i`` (eq. 2) for each matrix ``[out, in]``.

    The permutation maximises ``<gate, P gate_i> + <up, P up_i> + <down^T, P down_i^T>``: one assignment, exact. The
    centre and each member are held whole; an assignment is cubic in the width.

    Source: Li et al., "Merge, then compress: Demystify efficient SMoE with hints from its routing policy", ICLR 2024,
    arXiv:2310.01334.
    """

    name = "m_smoe"
    summary = "merge experts into the most used ones by router similarity, neurons aligned, weighted by usage"
    source = Source("M-SMoE (MC-SMoE)", arxiv="2310.01334")

    class Merge(MergingParameters):
        align: bool = parameter(True, description="permute neurons to match the dominant expert before averaging")

    def parts(self, p: Any) -> Parts:
        return Parts(
            score="frequency",
            grouping="nearest",
            features="router",
            merge="aligned" if p.align else "mean",
            router=p.router,
        )
