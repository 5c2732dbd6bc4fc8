"""SCE: select by variance, calculate weights, erase minority signs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_lr.combine import agreeing_sum, majority
from mergekit_lr.method import Base, Call, Method, Parameters, Piece, Source, Statistics, parameter
from mergekit_lr.selection import Cut, Want, count_to_keep, select
from mergekit_lr.statistics import CountNonzero, SquareSum

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class _State:
    cut: Cut | None
    shares: list[float]


def variance(tensors: list[Tensor]) -> Tensor:
    """Population variance over the models, entry by entry; exactly zero where all are equal."""
    # Relative to the first model, so that equal entries have a mean of exactly zero.
    apart = [x - tensors[0] for x in tensors[1:]]
    total = apart[0].clone()
    for d in apart[1:]:
        total.add_(d)
    mean = total.div_(len(tensors))
    out = mean * mean
    for d in apart:
        out.add_(d.sub_(mean).square_())
    return out.div_(len(tensors))


class Sce(Method):
    r"""SCE: select, calculate, erase, on task vectors ``D_i = W_i - base``.

    Select: of the entries whose variance over the models is not zero keep the share ``select_topk`` with the
    largest variance, ``int(select_topk * count)``, equal ones by lowest index; 1 keeps all entries, zero
    variance or not. Calculate: one weight for each model and tensor, ``w_i = sum D_i^2 / sum_j sum D_j^2``
    over what is kept. Erase: entries whose sign differs from ``sgn(sum_i D_i)`` (+1 for zero) are dropped.
    Merge: ``base + sum_i w_i D_i / sum_i w_i`` over the models left at that entry.

    Where ``sum_i mean(D_i^2) < mass_floor`` the weights are equal, and a divisor is at least ``mass_floor``:
    mergekit's 1e-6, the default, is absolute, so the task vectors of an ordinary fine-tune (entries of 1e-3
    and less) get equal weights there. ``mass_floor: 0`` weighs them by the paper's rule whatever their size.
    One model with ``select_topk`` below 1 has no variance: the base.

    Elementwise in fp32, any shape; one extra look at each tensor, up to five with ``select_topk``.

    Source: Wan et al., "FuseChat: Knowledge fusion of chat models", 2024, arXiv:2408.07990, section 3.3.
    """

    name = "sce"
    summary = "select entries by variance, weigh models by energy, erase minority signs"
    source = Source("FuseChat", arxiv="2408.07990")
    base = Base.REQUIRED
    exposes_nonfinite = True

    class Merge(Parameters):
        select_topk: float = parameter(
            1.0, ge=0, le=1, description="share of the varying entries that is kept, by variance over the models"
        )
        mass_floor: float = parameter(
            1e-6,
            ge=0,
            le=1,
            description="total mean square below which models weigh the same: 1e-6 as in mergekit, 0 as in the paper",
        )
        int8_mask: bool = parameter(
            False,
            description="accepted so that mergekit recipes run unchanged: there it sets how sign masks are "
            "stored; here no masks are stored, so it changes nothing",
        )

    def statistics(self, call: Call, model_state: Any) -> Statistics | None:
        return self._passes(call)

    def _passes(self, call: Call) -> Statistics:
        cut = None if call.merge.select_topk >= 1 else (yield from self._select(call))

        def kept(call: Call, piece: Piece) -> list[Tensor]:
            return _kept(piece, cut)

        sums = yield SquareSum(kept)
        means = sums / max(call.numel, 1)
        total = float(means.sum())
        n = len(means)
        if total < call.merge.mass_floor or total == 0:
            return _State(cut, [1 / n] * n)
        return _State(cut, [float(m) / total for m in means])

    def _select(self, call: Call) -> Statistics:
        if len(call.models) == 1:
            return Cut(float("inf"), 0, 0)

        def spread(call: Call, piece: Piece) -> list[Tensor]:
            return [variance(piece.tensors)]

        varying = (yield CountNonzero(spread))[0]
        keep = count_to_keep(call.merge.select_topk, varying)
        return (yield from select(call, [Want(0, keep)], spread))[0]

    def merge(self, call: Call, piece: Piece, state: Any) -> Tensor:
        parts = _kept(piece, state.cut)
        return _agreeing_mean(parts, state.shares, call.merge.mass_floor)


def _kept(piece: Piece, cut: Cut | None) -> list[Tensor]:
    """Each task vector with only the selected entries; new tensors."""
    if cut is None:
        return [x.clone() for x in piece.tensors]
    if len(piece.tensors) == 1:
        return [cut.trim(piece.tensors[0], piece.start)]
    chosen = cut.trim(variance(piece.tensors), piece.start).sign_()
    return [x * chosen for x in piece.tensors]


def _agreeing_mean(parts: list[Tensor], shares: list[float], floor: float) -> Tensor:
    sign = majority(parts)
    for x, share in zip(parts, shares, strict=True):
        x.mul_(share)
    return agreeing_sum(parts, sign, shares=shares, divisor_floor=floor or None)
