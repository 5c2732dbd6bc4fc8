"""DELLA: drop entries at random, small ones more often, rescale, elect a sign, merge what agrees."""

from __future__ import annotations

from typing import Any

from mergekit_lr.method import Source, parameter
from mergekit_lr.methods.della_linear import RankDropDensity, RankDropParameters, spread_problems
from mergekit_lr.sparsify import RandomByRank
from mergekit_lr.task_vectors import TaskVectorMethod


class Della(TaskVectorMethod):
    r"""DELLA: drop (MagPrune, see ``della_linear``), elect (see ``ties``), fuse.

    ``S_i = (m_i * D_i) / p_i``, ``s = sgn(sum_i w_i S_i)``, and
    ``base + lambda * sum_{i: sgn(w_i S_i) = s} w_i S_i / sum_{i: sgn(w_i S_i) = s} w_i``; without
    ``normalize`` there is no division. fp32, rows of any length; one look at each tensor, two with
    ``rescale_by: l1``.

    Source: Deep, Bhardwaj and Poria, "DELLA-Merging: Reducing interference in model merging through
    magnitude-based sampling", 2024, arXiv:2406.11617, section 3.
    """

    name = "della"
    summary = "drop entries at random, small ones more often, rescale, elect a sign, average what agrees"
    source = Source("DELLA-Merging", arxiv="2406.11617")
    stochastic = True
    rule = RandomByRank()
    consensus = True

    class Merge(RankDropParameters):
        normalize: bool = parameter(
            True, description="divide each entry by the sum of the weights that took part in it"
        )

    class PerModel(RankDropDensity):
        pass

    def problems(self, merge: Any, models: tuple[Any, ...]) -> list[str]:
        return spread_problems(merge, models)
