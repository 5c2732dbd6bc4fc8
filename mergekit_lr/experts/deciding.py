"""From statistics to decisions: which parts a method is made of, and what they say of each layer.

A method that makes experts fewer is *score x grouping x merge x router*. `Parts` names one of each; `decide` works out
the groups of every layer from sums over calibration tokens, without looking at a weight unless experts are compared
by their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mergekit_lr.arch.moe_config import Groups
from mergekit_lr.experts import grouping
from mergekit_lr.experts.allocation import allocate, windows
from mergekit_lr.experts.decision import Decision, LayerDecision
from mergekit_lr.experts.merging import shares
from mergekit_lr.experts.partition import Partition, joined
from mergekit_lr.experts.router import router_rows
from mergekit_lr.experts.score import NEEDS, best, score, super_experts
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Score = Literal["frequency", "gate_sum", "ean", "man", "msan", "reap", "gated_norm", "gated_square"]
Grouping = Literal["none", "kmeans", "hierarchical", "nearest", "ream", "random"]
Features = Literal["cosine", "output", "mean_output", "router", "weights"]
Linkage = Literal["average", "complete", "ward", "single"]
MergeRule = Literal["mean", "aligned", "union", "least_squares"]
Router = Literal["mean", "select", "tied"]

FEATURES: dict[str, tuple[str, ...]] = {
    "cosine": ("expert_cosine_gram",),
    "output": ("expert_gram",),
    "mean_output": ("expert_output_sum", "expert_tokens"),
    "router": ("router_gram",),
    "weights": (),
}
"""What experts are compared by -> the statistics that it takes."""

RARE = 100
"""Routed tokens below which an expert's mean norms are mostly noise."""


@dataclass(frozen=True)
class Parts:
    """One of each part. ``score`` ranks experts (who is kept, who is a centre), ``weights`` is what averages weigh by.

    ``grouping`` ``none`` prunes. ``features`` is what likeness is measured on; ``linkage`` for hierarchies;
    ``group_size`` for REAM. ``guard`` keeps super experts whatever their score. ``neighbours``: so many layers in a row
    share one budget of experts. ``rank`` and ``whiten`` are for the ``union`` merge, ``ridge`` for ``least_squares``.
    """

    score: str = "frequency"
    grouping: str = "none"
    features: str = "cosine"
    linkage: str = "average"
    group_size: int = 16
    merge: str = "mean"
    weights: str = "frequency"
    router: str = "mean"
    guard: bool = False
    neighbours: int = 1
    rank: str | int | float = "full"
    whiten: bool = False
    ridge: float = 1e-6

    @property
    def prunes(self) -> bool:
        return self.grouping == "none"

    def entries(self) -> frozenset[str]:
        """The statistics of a mixture that the decision takes."""
        found = {"routing_count", *NEEDS[self.score], *NEEDS[self.weights]}
        if self.grouping in ("kmeans", "hierarchical", "nearest"):
            found |= set(FEATURES[self.features])
        if self.grouping == "ream":
            found |= {"expert_cosine_gram", "expert_tokens", "router_softmax_gram"}
        if self.guard:
            found.add("output_max_abs")
        return frozenset(found)


@dataclass(frozen=True)
class Evidence:
    """What is known of one layer: ``sums`` by entry, and the Gram of its experts' weights, made when asked for."""

    block: str
    sums: Mapping[str, Tensor]
    weight_gram: Callable[[], Tensor]

    @property
    def experts(self) -> int:
        return len(self.sums["routing_count"])

    def gram(self, features: str) -> Tensor:
        """Inner products between experts, fp64 ``[E, E]``."""
        if features == "weights":
            return self.weight_gram()
        if features == "mean_output":
            mean = self.sums["expert_output_sum"].double() / self.sums["expert_tokens"].double().clamp_min(1)
            return mean @ mean.T
        return self.sums[FEATURES[features][0]].double()


def decide(
    parts: Parts, layers: Sequence[Evidence], experts: int, *, seed: int, groups: Groups | None = None, least: int = 1
) -> Decision:
    """The groups of every layer, ``experts`` in each (on average, where layers share a budget).

    Where the router chooses among ``groups`` of experts first, each of them is reduced alone and by the same number.
    ``least``: experts that every layer needs at least.
    """
    counts = _counts(parts, layers, experts, seed, least)
    guarded: Sequence[Tensor | None] = [None] * len(layers)
    if parts.guard:
        guarded = list(super_experts(torch.stack([e.sums["output_max_abs"] for e in layers])))
    found = [
        _layer(parts, evidence, count, seed, groups, always)
        for evidence, count, always in zip(layers, counts, guarded, strict=True)
    ]
    return Decision(tuple(found), _remarks(found, layers))


def _counts(parts: Parts, layers: Sequence[Evidence], experts: int, seed: int, least: int) -> list[int]:
    if parts.neighbours == 1:
        return [experts] * len(layers)
    counts: list[int] = []
    for window in windows(len(layers), parts.neighbours):
        costs = [_costs(layers[i].gram(parts.features), seed, least) for i in window]
        counts += allocate(costs, experts * len(window), least)
    return counts


def _costs(gram: Tensor, seed: int, least: int) -> list[float]:
    """What K-means with k groups leaves unexplained, for every k from ``least`` to all; never rising with k."""
    n = len(gram)
    costs = [float("inf")] * (n + 1)
    costs[n] = 0.0
    for k in range(n - 1, least - 1, -1):
        costs[k] = max(grouping.kmeans_cost(gram, grouping.kmeans_labels(gram, k, seed, 3)), costs[k + 1])
    return costs


def _layer(
    parts: Parts, evidence: Evidence, count: int, seed: int, groups: Groups | None, always: Tensor | None
) -> LayerDecision:
    n = evidence.experts
    ranking, weights = score(parts.score, evidence.sums), score(parts.weights, evidence.sums)
    sections = groups.members(n) if groups else [range(n)]
    each = count // len(sections)
    own = joined([(s, _section(parts, evidence, list(s), each, ranking, weights, seed, always)) for s in sections])
    return LayerDecision(
        block=evidence.block,
        partition=own,
        shares=tuple(tuple(shares([float(weights[e]) for e in g.members])) for g in own.groups),
        router=router_rows(parts.router, own, [float(w) for w in weights], n),
        scores=tuple(float(s) for s in ranking),
        routed=tuple(int(c) for c in evidence.sums["routing_count"]),
    )


def _section(
    parts: Parts,
    evidence: Evidence,
    who: list[int],
    count: int,
    ranking: Tensor,
    weights: Tensor,
    seed: int,
    always: Tensor | None,
) -> Partition:
    """The groups of some of a layer's experts, by their numbers among these."""
    ranks = ranking[who]
    keep = None if always is None else always[who]
    if parts.prunes:
        return grouping.kept_only(best(ranks, count, keep), len(who))
    if parts.grouping == "random":
        return grouping.centred(grouping.random_labels(len(who), count, seed), ranks)
    if parts.grouping == "ream":
        sums = evidence.sums
        cosine = sums["expert_cosine_gram"].double() / sums["expert_tokens"].double().clamp_min(1)
        likeness = grouping.ream_similarity(cosine[who][:, who], sums["router_softmax_gram"][who][:, who])
        return grouping.greedy_groups(ranks, likeness, count, parts.group_size)
    gram = evidence.gram(parts.features)[who][:, who]
    if parts.grouping == "kmeans":
        return grouping.centred(grouping.kmeans_labels(gram, count, seed), ranks)
    if parts.grouping == "hierarchical":
        labels = grouping.hierarchical_labels(grouping.gram_distances(gram), count, parts.linkage)
        return grouping.centred(labels, ranks)
    likeness = -grouping.gram_distances(gram) if parts.features == "weights" else grouping.cosine_of(gram)
    return grouping.around(best(ranks, count, keep), likeness)


def _remarks(found: Sequence[LayerDecision], layers: Sequence[Evidence]) -> tuple[str, ...]:
    """What a user should know about how sure the decision is."""
    never = {e.block: [i for i, n in enumerate(d.routed) if n == 0] for d, e in zip(found, layers, strict=True)}
    rare = sum(1 for d in found for n in d.routed if 0 < n < RARE)
    remarks = [
        f"{block}: no calibration token reached experts {', '.join(map(str, who))}: they score 0, and groups of such "
        "experts alone are averaged with equal weights"
        for block, who in never.items()
        if who
    ]
    if rare:
        total = sum(len(d.routed) for d in found)
        remarks.append(
            f"{rare} of {total} experts saw fewer than {RARE} calibration tokens: their scores are rough; use more text"
        )
    return tuple(remarks)
