"""Any combination of the parts that the named methods are made of."""

from __future__ import annotations

from typing import Any, Literal

from mergekit_lr.experts.deciding import Features, Grouping, Linkage, MergeRule, Parts, Score
from mergekit_lr.experts.reduction import ExpertReduction, MergingParameters, rank_problems
from mergekit_lr.method import Source, parameter


class ExpertMerge(ExpertReduction):
    r"""Score x grouping x merge x router, each named by the recipe.

    ``score`` ranks experts: who is kept, and who is the centre of a group. ``grouping``: ``none`` prunes; ``kmeans``
    and ``hierarchical`` cluster on ``features``; ``nearest`` gives each expert to the most similar of the
    ``num_experts`` best; ``ream`` lets the best take their likes in turn; ``random`` is a control. ``merge``: ``mean``
    is ``sum_i w_i W_i / sum_i w_i`` with ``weights`` w; ``aligned`` permutes neurons first; ``union`` projects the mean
    on the joint left subspace, ``U_r U_r^T sum w_i W_i``; ``least_squares`` fits the down projection. Every matrix is
    ``[out, in]``.

    Source: the parts are those of Sub-MoE (arXiv:2506.23266), M-SMoE (arXiv:2310.01334), HC-SMoE (arXiv:2410.08589),
    REAP (arXiv:2510.13999), MergeMoE (arXiv:2510.14436) and REAM (arXiv:2604.04356).
    """

    name = "expert_merge"
    summary = "make experts fewer by a score, a grouping, a merge and a router rule of your choice"
    source = Source("Sub-MoE, and the methods it is compared with", arxiv="2506.23266")

    class Merge(MergingParameters):
        score: Score = parameter("gated_norm", description="what experts are ranked by")
        grouping: Grouping = parameter("nearest", description="how experts find their group; `none` prunes")
        features: Features = parameter("cosine", description="what experts are compared by")
        linkage: Linkage = parameter("average", description="distance between clusters, for `hierarchical`")
        group_size: int = parameter(16, ge=2, le=4096, description="most experts in a group, for `ream`")
        merge: MergeRule = parameter("mean", description="how a group becomes one expert")
        weights: Score = parameter("frequency", description="what an average weighs its members by")
        rank: Literal["full"] | int | float = parameter("full", description="for `union`: as in sub_moe")
        whiten: bool = parameter(False, description="for `union`: as in sub_moe")
        ridge: float = parameter(1e-6, ge=0, le=1e6, description="for `least_squares`: as in mergemoe")
        guard: bool = parameter(False, description="keep experts with massive activations whatever their score")

    def parts(self, p: Any) -> Parts:
        prunes = p.grouping == "none"
        return Parts(
            score=p.score,
            grouping=p.grouping,
            features=p.features,
            linkage=p.linkage,
            group_size=p.group_size,
            merge="mean" if prunes or (p.merge == "union" and p.rank == "full") else p.merge,
            weights=p.weights,
            rank=p.rank,
            whiten=p.whiten and p.merge == "union" and p.rank != "full",
            ridge=p.ridge,
            router="select" if prunes else p.router,
            guard=p.guard,
        )

    def problems(self, merge: Any, models: tuple[Any, ...]) -> list[str]:
        found = rank_problems(merge.rank)
        if merge.grouping == "none" and merge.router == "tied":
            found.append("router: tied needs groups; grouping: none leaves experts out and keeps the others' rows")
        if merge.guard and merge.grouping not in ("none", "nearest"):
            found.append("guard works with grouping: none or nearest, where experts are kept by their score")
        return found
