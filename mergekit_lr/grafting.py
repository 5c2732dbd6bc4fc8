"""Fast Fisher Grafting: which entries of a task vector are kept, by saliency ``v d^2`` and exactly as many as asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergekit_lr.method import Call, Piece, Statistics
from mergekit_lr.preconditioned import bias_correction, precondition, saliency
from mergekit_lr.selection import Cut, ModelCut, Want, count_to_keep, select, select_model_wide
from mergekit_lr.statistics import Sum

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = 1e-6
"""A task vector of which masking left less than this share of the norm is not scaled back."""


@dataclass
class ModelState:
    """Of all tensors together: a cut for each model (None: not asked), and the mean of ``v^power``."""

    cuts: dict[int, ModelCut] = field(default_factory=dict)
    means: list[float] | None = None


@dataclass
class GraftState:
    """Of one tensor. ``norms`` divide weights, ``rescale`` multiplies task vectors."""

    cuts: dict[int, Cut] = field(default_factory=dict)
    norms: list[float] | None = None
    epsilons: list[float] | None = None
    rescale: list[float] | None = None


def _partly(call: Call, model: int) -> bool:
    """Whether a model's entries of this tensor compete. Without a base, which a plan refuses, there is no mask."""
    return bool(call.facts) and call.has_base and 0 < call.models[model].density < 1


def _saliencies(call: Call, piece: Piece) -> list[Tensor]:
    """Streams of saliency; empty for models of which nothing is chosen."""
    if not piece.extra:
        return [x.reshape(-1)[:0] for x in piece.tensors]
    pairs = zip(piece.tensors, piece.extra, strict=True)
    return [saliency(d, v) if _partly(call, i) else d.reshape(-1)[:0] for i, (d, v) in enumerate(pairs)]


def _model_wide(call: Call, piece: Piece) -> list[Tensor]:
    if call.merge.density_scope == "model":
        return _saliencies(call, piece)
    return [x.reshape(-1)[:0] for x in piece.tensors]


def _weights(call: Call, piece: Piece) -> list[Tensor]:
    """``v^power``, whose means normalise; nothing where there are no curvatures."""
    return [precondition(v, call.merge.power, 0.0) for v in piece.extra] or [x.reshape(-1)[:0] for x in piece.tensors]


def model_passes(calls: Sequence[Call]) -> Statistics | None:
    """Passes over all tensors: cuts where ``density_scope`` is model, means where curvature is normalised so."""
    having = [c for c in calls if c.facts]
    competing = [c for c in having if c.merge.density_scope == "model"]
    models = range(len(calls[0].models)) if calls else range(0)
    chosen = [i for i in models if any(_partly(c, i) for c in competing)]
    normalize = any(c.merge.normalize_curvature == "model" for c in having)
    return _model_passes(having, competing, chosen, normalize) if chosen or normalize else None


def _model_passes(having: list[Call], competing: list[Call], chosen: list[int], normalize: bool) -> Statistics:
    state = ModelState()
    if normalize:
        sums = yield Sum(_weights)
        state.means = [float(s) / max(1, sum(c.numel for c in having)) for s in sums]
    if chosen:
        wants = []
        for i in chosen:
            partly = [c for c in competing if _partly(c, i)]
            numel = sum(c.numel for c in partly)
            keep = min(numel, int(math.fsum(c.models[i].density * c.numel for c in partly)))
            wants.append(Want(i, keep, numel))
        numel = sum(c.numel for c in competing)
        cuts = yield from select_model_wide(wants, numel, _model_wide)
        state.cuts = dict(zip(chosen, cuts, strict=True))
    return state


def tensor_passes(call: Call, model_state: ModelState | None) -> Statistics | None:
    """Passes over one tensor, and what the whole model's mean for it; None where there is nothing to know."""
    if not call.facts:
        return None
    merge = call.merge
    masked = any(m.density < 1 or m.threshold is not None for m in call.models)
    plain = merge.epsilon == 0 and merge.normalize_curvature == "none"
    return _tensor_passes(call, model_state or ModelState()) if masked or not plain else None


def _tensor_passes(call: Call, model_state: ModelState) -> Statistics:
    merge, state = call.merge, GraftState()
    chosen = [i for i in range(len(call.models)) if _partly(call, i)]
    if merge.density_scope == "model":
        state.cuts = {i: model_state.cuts[i].for_tensor(call.name) for i in chosen if i in model_state.cuts}
    elif chosen:
        wants = [Want(i, count_to_keep(call.models[i].density, call.numel)) for i in chosen]
        state.cuts = dict(zip(chosen, (yield from select(call, wants, _saliencies)), strict=True))
    if merge.epsilon or merge.normalize_curvature == "tensor":
        means = [float(s) / max(1, call.numel) for s in (yield Sum(_weights))]
        state.epsilons = [merge.epsilon * m for m in means] if merge.epsilon else None
        state.norms = means if merge.normalize_curvature == "tensor" else None
    if merge.normalize_curvature == "model":
        state.norms = model_state.means
    if state.norms is not None:
        corrections = [bias_correction(f) if merge.bias_correction else 1.0 for f in call.facts]
        # A mean of zero belongs to weights that are all zero: what they are divided by does not matter.
        state.norms = [n * c**merge.power or 1.0 for n, c in zip(state.norms, corrections, strict=True)]
    if getattr(merge, "rescale", "none") != "none":
        state.rescale = yield from _rescaling(call, state)
    return state


def _rescaling(call: Call, state: GraftState) -> Any:
    squared = call.merge.rescale == "l2"

    def sizes(call: Call, piece: Piece) -> list[Tensor]:
        masks = masks_of(call, piece, state)
        kept = [x if m is None else x * m for x, m in zip(piece.tensors, masks, strict=True)]
        return [x.square() if squared else x.abs() for x in (*piece.tensors, *kept)]

    sums = [float(s) for s in (yield Sum(sizes))]
    n = len(call.models)
    ratios = [a / b if b > 0 else 1.0 for a, b in zip(sums[:n], sums[n:], strict=True)]
    if squared:
        ratios = [math.sqrt(r) for r in ratios]
    return [r if r * IGNORED < 1 else 1.0 for r in ratios]


def masks_of(call: Call, piece: Piece, state: GraftState) -> list[Tensor | None]:
    """Each model's 0/1 mask of a piece, None where everything is kept. Entries of saliency zero are never chosen."""
    if not piece.extra or not call.has_base:
        return [None] * len(piece.tensors)
    return [_mask(call, piece, state, i) for i in range(len(piece.tensors))]


def _mask(call: Call, piece: Piece, state: GraftState, i: int) -> Tensor | None:
    own = call.models[i]
    if own.threshold is not None:
        correction = bias_correction(call.facts[i]) if call.merge.bias_correction else 1.0
        least = math.sqrt(own.threshold / correction)
        return (saliency(piece.tensors[i], piece.extra[i]) >= least).to(piece.tensors[i].dtype)
    if own.density >= 1:
        return None
    if own.density <= 0:
        return piece.tensors[i].new_zeros(piece.tensors[i].shape)
    return state.cuts[i].trim(saliency(piece.tensors[i], piece.extra[i]), piece.start).sign_()
