"""TIES: trim, elect sign, disjoint merge."""

from __future__ import annotations

from mergekit_lr.method import Source, parameter
from mergekit_lr.sparsify import LargestMagnitude
from mergekit_lr.task_vectors import DensityParameters, RankedParameters, TaskVectorMethod


class Ties(TaskVectorMethod):
    r"""TIES-merging of task vectors ``D_i = W_i - base``.

    Trim: of each task vector of N entries keep the ``max(1, int(density_i N))`` largest magnitudes, equal
    ones by lowest index, giving S_i. Elect: ``s = sgn(sum_i w_i S_i)`` entry by entry, +1 where the sum is
    zero. Merge: ``base + lambda * sum_{i: sgn(w_i S_i) = s} w_i S_i / sum_{i: sgn(w_i S_i) = s} w_i``;
    without ``normalize`` there is no division. Entries that nobody keeps stay the base's. Elementwise in
    fp32, any shape; one extra look at each tensor, sometimes two, finds the thresholds.

    The paper trims over the whole task vector (``threshold_scope: model``); mergekit, and the default here,
    within each tensor (``threshold_scope: tensor``). Over the model, tensors of different density share one
    budget, ``int(sum_t density_t N_t)``; tensors of density 0 or 1 stay out of it and keep nothing or all. The
    price is two looks at all tensors of all models, seldom three.

    Source: Yadav et al., "TIES-Merging: Resolving interference when merging models", NeurIPS 2023,
    arXiv:2306.01708, algorithm 1.
    """

    name = "ties"
    summary = "trim task vectors, elect a sign for each entry, average what agrees"
    source = Source("TIES-Merging", arxiv="2306.01708")
    rule = LargestMagnitude()
    consensus = True

    class Merge(RankedParameters):
        normalize: bool = parameter(
            True, description="divide each entry by the sum of the weights that took part in it"
        )

    class PerModel(DensityParameters):
        pass
