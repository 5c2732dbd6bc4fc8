"""Sub-MoE: cluster experts by what they give, merge each cluster in the subspace that its experts share."""

from __future__ import annotations

from typing import Any, Literal

from mergekit_lr.experts.deciding import Linkage, Parts
from mergekit_lr.experts.reduction import ExpertReduction, MergingParameters, rank_problems
from mergekit_lr.method import Source, parameter


class SubMoe(ExpertReduction):
    r"""Sub-MoE: experts that give alike outputs become one, by a joint SVD of their weights.

    For the experts ``E_i(x) = W_down (act(W_gate x) * W_up x)`` of a layer, all of them run on calibration tokens
    ``x_l``: similarity ``mean_l cos(E_i(x_l), E_j(x_l))`` (eq. 2); K-means with that metric (eq. 3); usage ``f_i``,
    the share of tokens sent to i (eq. 6). For each cluster and each matrix: ``[W_1 ... W_n] = U S [V_1 ... V_n]^T``
    (eq. 5), ``V_m = sum f_i V_i / sum f_i`` (eq. 7), ``W_m = U S V_m^T`` (eq. 8). ``W_i`` is ``[out, in]``, U
    ``[out, r]``.

    At full rank, the paper's and the default here, ``U S sum f_i V_i^T = sum f_i W_i``: the weighted mean, which is
    what is computed, without a decomposition. Truncated to rank r it is ``U_r U_r^T sum f_i W_i``.

    K-means runs on the exact embedding of the E x E Gram, so outputs are never stored. One fp32 pass over the weights;
    truncated, one eigenproblem of order ``min(out, n in)`` for each matrix of each cluster.

    Source: Li et al., "Sub-MoE: Efficient mixture-of-expert LLMs compression via subspace expert merging", 2025,
    arXiv:2506.23266.
    """

    name = "sub_moe"
    summary = "cluster experts by their outputs, merge clusters in a shared subspace (at full rank: average them)"
    source = Source("Sub-MoE", arxiv="2506.23266")

    class Merge(MergingParameters):
        rank: Literal["full"] | int | float = parameter(
            "full", description="`full`, a number of directions, or a share of them (a number up to 1 with a dot)"
        )
        whiten: bool = parameter(
            False, description="take the subspace from weights times their inputs' Gram root (the paper's dagger)"
        )
        features: Literal["cosine", "output"] = parameter(
            "cosine", description="`cosine`: eq. 2, tokens count alike; `output`: eq. 3 as written, by their norms"
        )
        clustering: Literal["kmeans"] | Linkage = parameter(
            "kmeans", description="`kmeans`, or the linkage of a hierarchical clustering"
        )
        neighbouring_layers: int = parameter(
            1,
            ge=1,
            le=64,
            description="layers in a row that share one budget of experts (the paper: 2); above 1 needs "
            "`router: tied` and `sidecar: true`",
        )

    def parts(self, p: Any) -> Parts:
        trees = p.clustering != "kmeans"
        return Parts(
            score="frequency",
            grouping="hierarchical" if trees else "kmeans",
            linkage=p.clustering if trees else "average",
            features=p.features,
            merge="mean" if p.rank == "full" else "union",
            rank=p.rank,
            whiten=p.whiten and p.rank != "full",
            router=p.router,
            neighbours=p.neighbouring_layers,
        )

    def problems(self, merge: Any, models: tuple[Any, ...]) -> list[str]:
        found = rank_problems(merge.rank)
        if merge.neighbouring_layers > 1 and merge.router != "tied":
            found.append("neighbouring_layers above 1 gives layers different numbers of experts: it needs router: tied")
        return found
