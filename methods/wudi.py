"""WUDI in closed form: task vectors merged by least squares on the subspaces that they span themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mergekit_lr.arch.tied import EMBEDDINGS, HEADS
from mergekit_lr.combine import weighted_sum
from mergekit_lr.lazy import torch
from mergekit_lr.method import Base, Call, Method, Parameters, Piece, Slicing, Source, parameter

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lr.linalg.gram_weighted import Filter


class Wudi(Method):
    r"""Data-free least squares on task vectors ``t_i [m, n]``, with their own row spaces in the place of inputs.

    WUDI minimises ``sum_i a_i ||(t - t_i) t_i^T||_F^2 / ||t_i||_F^2`` by hundreds of steps of Adam. The minimum has a
    closed form:

        C = sum_i a_i t_i^T t_i / ||t_i||^2 = V diag(l) V^T,       D = sum_i a_i t_i t_i^T t_i / ||t_i||^2
        t = t_0 + (D - t_0 C) V diag(f(l) / l) V^T,       out = base + lambda t

    from the start t_0 (sum or mean of the task vectors, or zero). The filter f regularises as the steps did: ``soft``
    is ``1 - exp(-time l)``, ``hard`` keeps the leading ``rank`` directions, ``soft_hard`` does both, ``pinv`` neither.
    ``rank: participation_sqrt`` chooses the rank for each tensor, ``ceil((sum sqrt l)^2 / sum l)``.

    Matrices only, and of stacked experts each one; embeddings, heads and vectors are the mean of the task vectors
    (``embeddings: solve`` takes embeddings too). Needs a tensor whole: fp64, one eigendecomposition of the smaller
    of n and the rows of all task vectors.

    Source: closed forms of WUDI merging (SWUDI, ASWUDI), 2026, arXiv:2606.07289; the objective: "Whoever started the
    interference should end it" (WUDI), 2025, arXiv:2503.08099.
    """

    name = "wudi"
    summary = "least squares on the task vectors' own subspaces, in closed form and without data"
    source = Source("Closed forms of WUDI merging (SWUDI, ASWUDI)", arxiv="2606.07289")
    base = Base.REQUIRED

    class Merge(Parameters):
        filter: Literal["soft", "hard", "soft_hard", "pinv"] = parameter(
            "soft", description="how far each direction is solved for"
        )
        time: float = parameter(300.0, gt=0, le=1e12, description="of the soft filter: how long descent would run")
        rank: Literal["ratio", "participation_sqrt", "entropy", "gavish_donoho"] = parameter(
            "participation_sqrt", description="of the hard filter: how the number of directions is chosen"
        )
        rank_ratio: float = parameter(0.65, gt=0, le=1, description="of `rank: ratio`: share of the directions kept")
        start: Literal["sum", "mean", "zero"] = parameter(
            "sum", description="what the directions that are filtered out keep: the sum, the mean, or nothing"
        )
        embeddings: Literal["mean", "solve"] = parameter(
            "mean", description="embeddings and output heads: the mean of the task vectors, or solved for"
        )
        lam: float = parameter(1.0, alias="lambda", allow_inf_nan=False, description="factor on the merged task vector")

    class PerModel(Parameters):
        weight: float = parameter(
            1.0, ge=0, allow_inf_nan=False, description="share a_i of this model in the least squares and in the mean"
        )

    def slicing(self, merge: Any) -> Slicing:
        return Slicing.NONE

    def problems(self, merge: Any, models: tuple[Any, ...]) -> list[str]:
        if any(m.weight > 0 for m in models):
            return []
        return ["every weight is zero, so there is nothing to merge; give one model a weight above 0"]

    def merge(self, call: Call, piece: Piece, state: Any) -> Tensor:
        weights = call.values("weight")
        total = sum(weights)
        mean = weighted_sum(piece.tensors, [w / total for w in weights])
        solved = len(call.shape) >= 2 and call.numel > 0
        if call.name in (*EMBEDDINGS, *HEADS) and call.merge.embeddings == "mean":
            solved = False
        merged = _solved(call, piece, weights, mean) if solved else mean
        return merged if call.merge.lam == 1 else merged * call.merge.lam


def _solved(call: Call, piece: Piece, weights: list[float], mean: Tensor) -> Tensor:
    from mergekit_lr.linalg.gram_weighted import self_weighted

    shape = call.shape[-2:]
    stacks = [x.reshape(-1, *shape) for x in piece.tensors]
    start = {"sum": 1.0 * sum(weights), "mean": 1.0, "zero": 0.0}[call.merge.start]
    starts = (mean.double() * start).reshape(-1, *shape)
    chosen = _filter(call.merge, (shape[0] * len(stacks), shape[1]))
    parts = [
        self_weighted([s[k] for s in stacks], weights, starts[k], chosen, where=call.name) for k in range(len(starts))
    ]
    return torch.stack(parts).reshape(call.shape).float()


def _filter(merge: Any, shape: tuple[int, int]) -> Filter:
    from mergekit_lr.linalg import gram_weighted as g

    def ratio(values: Any) -> int:
        return max(1, round(float(merge.rank_ratio) * min(shape[1], len(values))))

    ranks = {
        "ratio": ratio,
        "participation_sqrt": g.participation_of_roots,
        "entropy": g.entropy_rank,
        "gavish_donoho": g.noise_rank(shape),
    }
    soft, hard = g.soft_filter(merge.time), g.hard_filter(ranks[merge.rank])
    everything: Filter = lambda values: values * 0 + 1  # noqa: E731
    return {"soft": soft, "hard": hard, "soft_hard": g.both(soft, hard), "pinv": everything}[merge.filter]
