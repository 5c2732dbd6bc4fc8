"""Arcee Fusion: take over only the entries of the other model that matter most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_lr.lazy import torch
from mergekit_lr.method import Base, Call, Method, Piece, Slicing, Source, Statistics
from mergekit_lr.selection import order_statistics
from mergekit_lr.statistics import blocked_row_sums

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 1e-8  # added to every probability (as in mergekit)
LARGEST = 3e38  # importances beyond fp32 count as this
CHUNK = 1 << 16  # entries whose fp64 temporaries are held at once


class ArceeFusion(Method):
    r"""Arcee Fusion: the other model's entries where their importance reaches a threshold, else the base's.

    The importance of an entry is ``|W_1 - W_0| KL(p || q)`` with W_0 the base, W_1 the other model, and the
    divergence of its row: ``p = softmax(W_1) + 1e-8`` and ``q = softmax(W_0) + 1e-8`` along the last axis, ``KL =
    sum p log(p / q)``. The threshold is ``median + 1.5 (Q3 - Q1)`` of the tensor's importances, each of the three
    the order statistic at ``int(share (N - 1))`` of N in ascending order.

    Rows whole, in fp64; importances are rounded to fp32 before they are compared. Two extra looks at each tensor.
    The order statistics are exact whatever the size; mergekit draws a million entries where there are more.

    Source: Arcee AI, mergekit, https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md.
    """

    name = "arcee_fusion"
    summary = "take over the entries of the other model whose importance stands out"
    source = Source(
        "mergekit: Arcee Fusion",
        url="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    )
    base = Base.OPERAND
    min_models = 2
    max_models = 2
    commutes = False

    def slicing(self, merge: Any) -> Slicing:
        return Slicing.ROWWISE

    def statistics(self, call: Call, model_state: Any) -> Statistics | None:
        return self._threshold(call)

    def _threshold(self, call: Call) -> Statistics:
        n = call.numel
        if not n:
            return 0.0
        at = [int(share * (n - 1)) for share in (0.25, 0.5, 0.75)]
        q1, median, q3 = yield from order_statistics(_importances, [n - i for i in at])
        return float(np.float32(median) + np.float32(1.5) * (np.float32(q3) - np.float32(q1)))

    def merge(self, call: Call, piece: Piece, state: Any) -> Tensor:
        base, other = piece.tensors
        return torch.where(importance(base, other) >= state, other, base)


def _importances(call: Call, piece: Piece) -> list[Tensor]:
    return [importance(*piece.tensors)]


def importance(base: Tensor, other: Tensor) -> Tensor:
    """``|other - base| KL(row of other || row of base)`` of every entry; fp32 ``[r, c]``."""
    out = torch.empty_like(base)
    if not base.numel():
        return out
    step = max(1, CHUNK // base.shape[1])
    for a in range(0, base.shape[0], step):
        x, y = base[a : a + step].double(), other[a : a + step].double()
        p, q = _probabilities(y), _probabilities(x)
        divergence = blocked_row_sums(torch.log(p / q).mul_(p)).clamp_(min=0)
        out[a : a + step] = (y - x).abs_().mul_(divergence[:, None]).clamp_(max=LARGEST)
    return out


def _probabilities(x: Tensor) -> Tensor:
    """Softmax along each row of fp64 ``[r, c]``, plus `FLOOR`."""
    grown = torch.exp(x - x.amax(1, keepdim=True))
    return grown.div_(blocked_row_sums(grown)[:, None]).add_(FLOOR)
