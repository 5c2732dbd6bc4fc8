"""Merges that are one linear combination of their inputs, formed in one product."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint.dtypes import ITEM_BYTES
from mergekit_lr.combine import summable
from mergekit_lr.graph.nodes import Delta, Operation, Restore, Sink, Source
from mergekit_lr.lazy import torch
from mergekit_lr.method import Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Fused:
    """A merge that is one linear combination of its sources' weights."""

    sources: tuple[Source, ...]
    coefficients: Tensor


def fused_sum(method: Method, operation: Operation, sink: Sink, state: Any) -> Fused | None:
    """The merge as ``sum_j c_j W_j``, where the method is one and the output is narrower than fp32.

    On deltas, ``base + sum_i c_i (W_i - base) = (1 - sum_i c_i) base + sum_i c_i W_i``. In fp32 the two differ by
    roundings of 2^-24, which a 16-bit output does not show; an fp32 output gets the literal form.
    """
    if ITEM_BYTES[sink.dtype] > 2:
        return None
    c = method.coefficients(operation.call, state)
    if c is None or summable(c) is None:
        return None
    total: dict[Source, float] = {}
    for value, ci in zip(operation.inputs, c, strict=True):
        source = value.value if isinstance(value, Delta) else value
        total[source] = total.get(source, 0.0) + ci
    if isinstance(sink.value, Restore):
        total[sink.value.base] = total.get(sink.value.base, 0.0) + 1.0 - math.fsum(c)
    return Fused(tuple(total), torch.tensor(list(total.values()), dtype=torch.float64).float())
