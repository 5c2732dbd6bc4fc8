"""RegMean: the matrix whose outputs are nearest to every model's on that model's own inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mergekit_lr.combine import weighted_sum
from mergekit_lr.lazy import torch
from mergekit_lr.method import Base, Call, Companion, Method, Missing, Parameters, Piece, Slicing, Source, parameter

if TYPE_CHECKING:
    from torch import Tensor


class RegMean(Method):
    r"""Regression mean: ``W = (sum_i a_i W_i G_i) (sum_i a_i G_i)^+`` for every matrix ``W [m, n]``.

    ``G_i = X_i^T X_i [n, n]`` is the Gram matrix of the inputs that model i sends into this matrix, its off-diagonal
    entries multiplied by ``shrink``. W minimises ``sum_i a_i ||X_i W^T - X_i W_i^T||_F^2``. Directions that no model's
    inputs reach keep the mean by a_i. Vectors, and with ``missing: mean`` matrices without Grams (embeddings), are the
    mean by a_i. With a base all of this is on task vectors, where it is the same, and ``lambda`` scales the result.

    Needs a tensor, and its Grams, whole: fp64, one eigendecomposition of ``[n, n]`` for each matrix.

    Source: Jin et al., "Dataless knowledge fusion by merging weights of language models", ICLR 2023,
    arXiv:2212.09849, equation 2.
    """

    name = "regmean"
    summary = "the matrix nearest to every model's outputs on its own inputs, from activation Grams"
    source = Source("Dataless knowledge fusion by merging weights of language models", arxiv="2212.09849")
    base = Base.OPTIONAL
    companion = Companion(
        parameter="statistics",
        suffixes=(".gram",),
        make="make one with: mergekit-lr calibrate MODEL OUT.safetensors --text FILE --grams linear",
        layout="gram",
    )

    class Merge(Parameters):
        shrink: float = parameter(
            0.9, ge=0, le=1, description="factor on the off-diagonal entries of every Gram; 0 leaves its diagonal"
        )
        normalize_grams: Literal["none", "trace"] = parameter(
            "none",
            description="none: Grams count as they are, with their numbers of tokens (the paper); trace: each is "
            "divided by its trace first",
        )
        lam: float = parameter(
            1.0, alias="lambda", allow_inf_nan=False, description="factor on the merged task vector; needs a base"
        )
        missing: Missing = parameter(
            "mean",
            description="what becomes of a matrix without a Gram in any statistics file: the plain mean (embeddings "
            "have none), an error, or the base's",
        )

    class PerModel(Parameters):
        statistics: str = parameter(description="statistics file of this model with the Grams of its linear layers")
        weight: float = parameter(1.0, ge=0, allow_inf_nan=False, description="factor a_i on this model's Gram")

    def slicing(self, merge: Any) -> Slicing:
        return Slicing.NONE

    def wants_companion(self, call: Call) -> bool:
        return len(call.shape) == 2

    def problems(self, merge: Any, models: tuple[Any, ...]) -> list[str]:
        if any(m.weight > 0 for m in models):
            return []
        return ["every weight is zero, so there is nothing to average; give one model a weight above 0"]

    def misfits(self, call: Call) -> list[str]:
        if call.has_base or call.merge.lam == 1:
            return []
        return ["lambda works on task vectors; name a base_model"]

    def merge(self, call: Call, piece: Piece, state: Any) -> Tensor:
        weights = call.values("weight")
        total = sum(weights)
        if piece.extra:
            from mergekit_lr.linalg.gram_weighted import gram_weighted_mean

            grams = [_shrunk(g, call.merge.shrink, call.merge.normalize_grams == "trace") for g in piece.extra]
            merged = gram_weighted_mean(piece.tensors, grams, weights, where=call.name).float()
        else:
            merged = weighted_sum(piece.tensors, [w / total for w in weights])
        return merged if call.merge.lam == 1 else merged * call.merge.lam


def _shrunk(gram: Tensor, shrink: float, by_trace: bool) -> Tensor:
    """``shrink G + (1 - shrink) diag G`` in fp64."""
    wide = gram.double()
    diagonal = wide.diagonal()
    trace = float(diagonal.sum())
    shrunk = wide * shrink + torch.diag(diagonal * (1 - shrink))
    return shrunk / trace if by_trace and trace > 0 else shrunk
