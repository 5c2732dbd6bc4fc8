"""HC-SMoE: cluster experts by their mean output, bottom up, and average each cluster by usage."""

from __future__ import annotations

from typing import Any

from mergekit_lr.experts.deciding import Linkage, Parts
from mergekit_lr.experts.reduction import ExpertReduction, MergingParameters
from mergekit_lr.method import Source, parameter


class HcSmoe(ExpertReduction):
    r"""HC-SMoE: hierarchical clustering of experts, without retraining.

    The feature of expert i is its mean output over the calibration tokens, ``o_i = (1/T) sum_t E_i(x_t)``, in R^hidden.
    Clusters are joined bottom up by Euclidean distance with average linkage until ``num_experts`` are left in each
    layer. Each is averaged by usage: ``W = sum_i f_i W_i / sum_i f_i``, every matrix ``[out, in]``.

    The tree is cut at exactly the wanted number, also where distances tie. One fp32 pass over the weights.

    Source: Chen et al., "Retraining-free merging of sparse MoE via hierarchical clustering", ICML 2025,
    arXiv:2410.08589.
    """

    name = "hc_smoe"
    summary = "cluster experts by mean output with average linkage, average each cluster by usage"
    source = Source("HC-SMoE", arxiv="2410.08589")

    class Merge(MergingParameters):
        linkage: Linkage = parameter("average", description="distance between clusters")

    def parts(self, p: Any) -> Parts:
        return Parts(
            score="frequency",
            grouping="hierarchical",
            features="mean_output",
            linkage=p.linkage,
            router=p.router,
        )
