"""Which neurons of an expert, or of a group of experts, to keep.

Both rules work on the Gram of hidden activations and its cross product with the target, summed over tokens ``t``
that the router sends to the expert (or to any member of the group), with gate weight ``g_t``:
``A = sum_t g_t^2 h_t h_t^T`` (``[P, P]``) and ``B = sum_t g_t h_t T_t^T`` (``[P, H]``), ``P`` candidate neurons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def energy(gram_diagonal: Tensor, down: Tensor) -> Tensor:
    """Energy of each neuron's own contribution, ``A_pp ||down_p||^2``, ``[P]``; ``down`` is ``[H, P]``.

    It ignores that neurons overlap: two copies of one neuron each get the full energy.
    """
    return gram_diagonal * down.square().sum(dim=0)


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest scores, ascending; equal scores go to the lower index."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:count].sort().values


def pivoted(gram: Tensor, cross: Tensor, count: int, ridge: float = 1e-2) -> Tensor:
    """Greedy choice of the neurons whose least-squares fit explains most of the target; indices ascending.

    Orthogonal matching pursuit with many outputs, as a pivoted Cholesky factorisation: each step takes the neuron
    ``p`` with the largest ``||B_p||^2 / (A_pp + lam)``, which is by how much the ridge-regularised squared error
    falls if ``p`` joins, then removes its share from the rest of ``A`` and ``B``. ``lam`` is ``ridge`` times the
    mean diagonal of ``A``. Equal gains go to the lower index. Cost ``count * P * (count / 2 + H)`` products.

    Args:
        gram: ``A``, float64 ``[P, P]``. cross: ``B``, float64 ``[P, H]``. count: neurons to take, at most ``P``.
    """
    size = len(gram)
    damping = ridge * float(gram.diagonal().mean())
    left = gram.diagonal().clone() + damping
    residual = cross.clone()
    factor = torch.zeros(size, count, dtype=gram.dtype)
    chosen: list[int] = []
    free = torch.ones(size, dtype=torch.bool)
    tiny = float(left.max()) * 1e-14
    for step in range(count):
        usable = free & (left > tiny)
        if not bool(usable.any()):  # the rest repeats what is there: any order does
            chosen += free.nonzero()[:, 0][: count - step].tolist()
            break
        gain = torch.where(usable, residual.square().sum(dim=1) / left.clamp_min(tiny), -1.0)
        pick = int(gain.argmax())
        column = gram[:, pick] - factor[:, :step] @ factor[pick, :step]
        column[pick] = left[pick]
        column /= left[pick].sqrt()
        factor[:, step] = column
        residual -= column[:, None] * (residual[pick] / column[pick])
        left -= column.square()
        free[pick] = False
        chosen.append(pick)
    return torch.tensor(sorted(chosen), dtype=torch.int64)
