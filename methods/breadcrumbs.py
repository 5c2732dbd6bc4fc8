"""Model breadcrumbs: drop outliers and small entries of task vectors, add up the rest."""

from __future__ import annotations

from mergekit_lr.method import Source, parameter
from mergekit_lr.sparsify import MiddleMagnitude
from mergekit_lr.task_vectors import DensityParameters, RankedParameters, TaskVectorMethod


class MiddleDensity(DensityParameters):
    """Breadcrumbs' parameters of each model."""

    gamma: float = parameter(
        0.01, ge=0, le=1, description="share of the task vector's entries dropped as outliers, the largest ones"
    )


class Breadcrumbs(TaskVectorMethod):
    r"""Model breadcrumbs: ``base + lambda * sum_i w_i (m_i * D_i)``.

    ``D_i = W_i - base`` of N entries per tensor; m_i drops the ``int(gamma N)`` largest magnitudes and as
    many of the smallest that ``int(density N)`` entries are left (the paper's beta is ``1 - density -
    gamma``). Among equal magnitudes the lowest index counts as the largest. Where gamma and density exceed
    one together, fewer outliers go; density 1 keeps everything, whatever gamma. With ``normalize`` the sum
    is divided by ``sum_i w_i``. Elementwise in fp32, any shape; one extra look at each tensor, sometimes two.

    The paper masks layer by layer (``threshold_scope: tensor``, the default); ``threshold_scope: model``
    ranks over all tensors together.

    Source: Davari and Belilovsky, "Model breadcrumbs: Scaling multi-task model merging with sparse masks",
    ECCV 2024, arXiv:2312.06795, section 3.
    """

    name = "breadcrumbs"
    summary = "drop outliers and small entries of task vectors, add up the rest"
    source = Source("Model breadcrumbs", arxiv="2312.06795")
    rule = MiddleMagnitude()

    class Merge(RankedParameters):
        pass

    class PerModel(MiddleDensity):
        pass
