"""Task arithmetic: add weighted task vectors to the base."""

from __future__ import annotations

from mergekit_lr.method import Source, parameter
from mergekit_lr.sparsify import KeepAll
from mergekit_lr.task_vectors import CommonParameters, DensityParameters, TaskVectorMethod


class TaskArithmetic(TaskVectorMethod):
    r"""Task arithmetic: ``base + lambda * sum_i w_i (W_i - base)``.

    With ``normalize`` the sum is divided by ``sum_i w_i`` (left alone where that is below 1e-8). Elementwise
    in fp32, any shape; one look at each tensor. A negative weight takes a task away (the paper's forgetting).

    Source: Ilharco et al., "Editing models with task arithmetic", ICLR 2023, arXiv:2212.04089, section 2.
    """

    name = "task_arithmetic"
    summary = "base plus weighted task vectors"
    source = Source("Editing models with task arithmetic", arxiv="2212.04089")
    rule = KeepAll()

    class Merge(CommonParameters):
        rescale: bool = parameter(
            False,
            description="accepted so that mergekit recipes run unchanged: it scales back what dropping took, and "
            "nothing is dropped here, so the factor is one",
        )

    class PerModel(DensityParameters):
        density: float = parameter(
            1.0,
            ge=0,
            le=1,
            description="accepted so that mergekit recipes run unchanged: task arithmetic drops no entries, there "
            "or here, so it changes nothing",
        )
