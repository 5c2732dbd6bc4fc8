"""What RAM and RAM+ share: which entries a model changed, and whether others changed them too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def changed(deltas: Sequence[Tensor], epsilon: float) -> list[Tensor]:
    """Boolean, one for each task vector: where it is larger than ``epsilon``. NaN counts as changed."""
    return [(d.abs() <= epsilon).logical_not_() for d in deltas]


def changers(masks: Sequence[Tensor]) -> Tensor:
    """How many models changed each entry, fp32."""
    count = torch.zeros_like(masks[0], dtype=torch.float32)
    for mask in masks:
        count.add_(mask)
    return count


def mean_of_changes(
    deltas: Sequence[Tensor], masks: Sequence[Tensor], count: Tensor, alone: Sequence[float] | None = None
) -> Tensor:
    """Sum of the changes at each entry over the number of models that changed it.

    ``alone``: factor for each model on the entries that no other model changed.
    """
    out = torch.zeros_like(deltas[0])
    unique = count == 1
    for i, (delta, mask) in enumerate(zip(deltas, masks, strict=True)):
        part = torch.where(mask, delta, 0.0)
        if alone is not None:
            part = torch.where(unique, part * alone[i], part)
        out.add_(part)
    return out.div_(count.clamp(min=1))
