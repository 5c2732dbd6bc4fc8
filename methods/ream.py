"""REAM: the most salient experts gather their likes, a few large groups and many experts left alone."""

from __future__ import annotations

from typing import Any

from mergekit_lr.experts.deciding import Parts, Router
from mergekit_lr.experts.reduction import ExpertReduction, MergingParameters
from mergekit_lr.method import Source, parameter


class Ream(ExpertReduction):
    r"""REAM: router-weighted expert activation merging.

    Saliency is REAP's ``S_j = mean_t g_j |E_j(x_t)|``. The ``num_experts`` most salient experts of a layer are centres;
    in the order of saliency each takes its ``group_size - 1`` most similar free experts. Similarity is the mean of
    ``(1 + cos)/2`` of outputs and ``1 - d/d_max``, d the Euclidean distance between the columns of softmax gates over
    tokens, each divided by its norm. Members' neurons are aligned with the centre's (Hungarian method), then averaged
    by saliency, every matrix ``[out, in]``; the centre's row of the router stays and the others go.

    The alignment here is by weights alone (the authors add activations), and cosines are of single tokens' outputs
    (their code takes means over a batch).

    Source: "REAM: Merging improves pruning of experts in LLMs", 2026, arXiv:2604.04356.
    """

    name = "ream"
    summary = "salient experts take in the most similar others, neurons aligned, averaged by saliency"
    source = Source("REAM", arxiv="2604.04356")

    class Merge(MergingParameters):
        router: Router = parameter(
            "select",
            description="the router's new rows: `select`, the row of the group's centre; `mean`, the weighted mean of "
            "the members' rows; `tied`, all rows kept, which needs `sidecar: true`",
        )
        group_size: int = parameter(16, ge=2, le=4096, description="most experts in a group")
        align: bool = parameter(True, description="permute neurons to match the centre before averaging")

    def parts(self, p: Any) -> Parts:
        return Parts(
            score="reap",
            grouping="ream",
            group_size=p.group_size,
            merge="aligned" if p.align else "mean",
            weights="reap",
            router=p.router,
        )
