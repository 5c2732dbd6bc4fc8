"""Which of two equal ways to take: through numpy, on the CPU, or by torch alone, on any device.

Comparisons, gathers and sums of short blocks are several times faster in numpy than in torch on a CPU; on another
device they must be torch operations. Both give the same numbers (sums: to rounding), and the torch way runs on a
CPU too, which is how it is tested where there is no other device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def through_numpy(where: Tensor | torch.device | str) -> bool:
    """Whether numpy can work on the data in place."""
    if isinstance(where, torch.Tensor):
        return where.is_cpu
    return torch.device(where).type == "cpu"
