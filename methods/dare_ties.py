"""DARE with TIES' sign election."""

from __future__ import annotations

from mergekit_lr.method import Source
from mergekit_lr.sparsify import Random
from mergekit_lr.task_vectors import DensityParameters, RandomParameters, TaskVectorMethod


class DareTies(TaskVectorMethod):
    r"""DARE's random drop and rescale (see ``dare_linear``), then TIES' election and disjoint sum (see
    ``ties``).

    ``S_i = (m_i * D_i) / density_i``, ``s = sgn(sum_i w_i S_i)``, and
    ``base + lambda * sum_{i: sgn(w_i S_i) = s} w_i S_i``; with ``normalize`` each entry is divided by the
    sum of the weights that took part in it. Elementwise in fp32, any shape; one look at each tensor, two with
    ``rescale_by: l1``.

    Source: Yu et al., "Language models are super Mario", ICML 2024, arXiv:2311.03099, section 3.3, with the
    election of Yadav et al., "TIES-Merging", NeurIPS 2023, arXiv:2306.01708.
    """

    name = "dare_ties"
    summary = "drop entries of task vectors at random, rescale, elect a sign, add what agrees"
    source = Source("Language models are super Mario (DARE)", arxiv="2311.03099")
    stochastic = True
    rule = Random()
    consensus = True

    class Merge(RandomParameters):
        pass

    class PerModel(DensityParameters):
        pass
