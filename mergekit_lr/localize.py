"""Which entries of a multi-task vector belong to which task: TALL masks and how many tasks want each entry.

``m_i = [ |D_i| > lambda_i |tau - D_i| ]`` entry by entry, for task vectors ``D_i = W_i - base`` and the multi-task
vector tau. With lambda = 1 this is the binary mask that minimises ``|m tau - D_i|`` at every entry, so also any sum
of powers of it. The paper writes ``>=``; the two differ where both sides are equal, above all at entries that no
task moved (0 and 0): there ``>`` says that no task wants the entry, which is what the counts should say, and the
reconstruction is the same.

Source: Wang et al., "Localizing task information for improved model merging and compression", ICML 2024,
arXiv:2405.07813, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from mergekit_lr.combine import agreeing_sum, majority
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

MultiTask = Literal["task_arithmetic", "ties"]


def summed(deltas: Sequence[Tensor]) -> Tensor:
    """Task arithmetic with every weight one: ``tau = sum_i D_i``, fp32, a new tensor."""
    total = deltas[0].clone()
    for d in deltas[1:]:
        total.add_(d)
    return total


def elected(trimmed: Sequence[Tensor]) -> Tensor:
    """TIES' disjoint sum of trimmed task vectors: the entries of the elected sign, added up. Overwrites its input.

    The sign is that of the sum of what was trimmed, +1 for a zero sum (authors' code: the majority's sign there).
    """
    parts = list(trimmed)
    return agreeing_sum(parts, majority(parts), shares=None)


def wanted(delta: Tensor, vector: Tensor, lam: float) -> Tensor:
    """The mask of one task: bool, the shape of its inputs."""
    return delta.abs() > (vector - delta).abs_().mul_(lam)


def agreement(deltas: Sequence[Tensor], vector: Tensor, lambdas: Sequence[float]) -> Tensor:
    """How many tasks want each entry: int16."""
    votes = torch.zeros(vector.shape, dtype=torch.int16, device=vector.device)
    for d, lam in zip(deltas, lambdas, strict=True):
        votes.add_(wanted(d, vector, lam))
    return votes
