"""DARE with a weighted sum: drop entries of task vectors at random, rescale, add up."""

from __future__ import annotations

from mergekit_lr.method import Source
from mergekit_lr.sparsify import Random
from mergekit_lr.task_vectors import DensityParameters, RandomParameters, TaskVectorMethod


class DareLinear(TaskVectorMethod):
    r"""DARE: ``base + lambda * sum_i w_i (m_i * D_i) / density_i`` with ``m_i ~ Bernoulli(density_i)``.

    ``D_i = W_i - base``; the paper's drop rate is ``p = 1 - density``. Masks come from a counter-based
    generator keyed by seed, model and tensor name, so they do not depend on order, slices, threads or device;
    probabilities are multiples of 1/65536 and the division is by the probability really used. With
    ``normalize`` the sum is divided by ``sum_i w_i``. Elementwise in fp32, any shape; one look at each
    tensor.

    ``rescale_by: l1`` is mergekit's rule: multiply by ``sum |D_i| / sum |m_i * D_i|`` of the tensor (1 where
    either is below 1e-7), for one more look. ``rescale: false`` does neither. Density 0 keeps nothing.

    Source: Yu et al., "Language models are super Mario: Absorbing abilities from homologous models as a free
    lunch", ICML 2024, arXiv:2311.03099, section 3.2.
    """

    name = "dare_linear"
    summary = "drop entries of task vectors at random, rescale the rest, add them up"
    source = Source("Language models are super Mario (DARE)", arxiv="2311.03099")
    stochastic = True
    rule = Random()

    class Merge(RandomParameters):
        pass

    class PerModel(DensityParameters):
        pass
