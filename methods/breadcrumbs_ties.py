"""Model breadcrumbs with TIES' sign election."""

from __future__ import annotations

from mergekit_lr.method import Source
from mergekit_lr.methods.breadcrumbs import MiddleDensity
from mergekit_lr.sparsify import MiddleMagnitude
from mergekit_lr.task_vectors import RankedParameters, TaskVectorMethod


class BreadcrumbsTies(TaskVectorMethod):
    r"""Breadcrumbs' masks (see ``breadcrumbs``), then TIES' election and disjoint sum (see ``ties``).

    ``S_i = m_i * D_i``, ``s = sgn(sum_i w_i S_i)``, and ``base + lambda * sum_{i: sgn(w_i S_i) = s} w_i
    S_i``; with ``normalize`` each entry is divided by the sum of the weights that took part in it.
    Elementwise in fp32, any shape; one extra look at each tensor, sometimes two.

    Source: Davari and Belilovsky, "Model breadcrumbs", ECCV 2024, arXiv:2312.06795, with the election of
    Yadav et al., "TIES-Merging", NeurIPS 2023, arXiv:2306.01708.
    """

    name = "breadcrumbs_ties"
    summary = "drop outliers and small entries of task vectors, elect a sign, add what agrees"
    source = Source("Model breadcrumbs", arxiv="2312.06795")
    rule = MiddleMagnitude()
    consensus = True

    class Merge(RankedParameters):
        pass

    class PerModel(MiddleDensity):
        pass
