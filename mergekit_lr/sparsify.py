"""Rules that drop entries of task vectors: by magnitude, outliers too, at random, at random by rank.

A rule says which passes it needs, drops entries of one piece (always into a new tensor), and by how much
what is left must be scaled to keep the expected value. `mergekit_lr.task_vectors` adds up what the rules
leave.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_lr.lazy import torch
from mergekit_lr.magnitudes import Int32
from mergekit_lr.method import Call, Piece, Slicing, Statistics
from mergekit_lr.philox import LEVELS, draws, effective_probability, masked
from mergekit_lr.selection import (
    KEEP_ALL,
    Cut,
    ModelCut,
    Want,
    magnitude_bits,
    select,
    select_model_wide,
)

if TYPE_CHECKING:
    from torch import Tensor


class Sparsifier(ABC):
    """One rule. ``state`` below is what the rule's own passes returned, None where it had none."""

    slicing: Slicing = Slicing.ELEMENTWISE

    def model_statistics(self, calls: Sequence[Call]) -> Statistics | None:
        """Passes over every tensor, where the rule looks at whole models."""
        return None

    def statistics(self, call: Call, model_state: Any) -> Statistics | None:
        """Passes over one tensor; None where one look is enough."""
        return None

    @abstractmethod
    def apply(self, call: Call, piece: Piece, state: Any, model: int) -> Tensor:
        """One model's piece with the dropped entries zero: a new tensor."""

    def scale(self, call: Call, model: int) -> float:
        """Factor that restores the expected value of what was dropped at random; 1 where nothing was."""
        return 1.0


class KeepAll(Sparsifier):
    """Drops nothing."""

    def apply(self, call: Call, piece: Piece, state: Any, model: int) -> Tensor:
        return piece.tensors[model].clone()


class _Ranked(Sparsifier):
    """Entries chosen by rank of magnitude, in each tensor or (``threshold_scope: model``) over the model."""

    least: int = 0  # entries kept at any density above zero

    @abstractmethod
    def sets(self, keep: int, outliers: int, numel: int) -> list[int]:
        """Sizes of the sets of largest entries whose difference is kept: ``[outer]``, ``[outer, inner]``."""

    def model_statistics(self, calls: Sequence[Call]) -> Statistics | None:
        chosen = [c for c in calls if c.merge.threshold_scope == "model"]
        return self._model_passes(chosen) if chosen else None

    def _model_passes(self, calls: Sequence[Call]) -> Statistics:
        wants = self._wants(calls)
        cuts: list[ModelCut] = yield from select_model_wide(wants, _numel(calls), _in_model_scope)
        return cuts

    def statistics(self, call: Call, model_state: Any) -> Statistics | None:
        if call.merge.threshold_scope == "model":
            return _ready([cut.for_tensor(call.name) for cut in model_state])
        wants = self._wants([call])
        trivial = all(w.keep in (0, call.numel) for w in wants)
        return _ready([_trivial(w, call) for w in wants]) if trivial else select(call, wants)

    def _wants(self, calls: Sequence[Call]) -> list[Want]:
        """What is kept of each model where the entries of all ``calls`` compete."""
        numel = _numel(calls)
        wants = []
        for i in range(len(calls[0].models)):
            keep = _pooled(calls, i, "density")
            if numel and any(c.models[i].density > 0 for c in calls):
                keep = max(self.least, keep)
            wants += [Want(i, k) for k in self.sets(keep, _pooled(calls, i, "gamma"), numel)]
        return wants


def _numel(calls: Sequence[Call]) -> int:
    return sum(c.numel for c in calls)


def _pooled(calls: Sequence[Call], model: int, attribute: str) -> int:
    """``int(sum_t share_t N_t)``; for one share over all tensors exactly ``int(share * N)``."""
    sizes: dict[float, int] = {}
    for c in calls:
        share = getattr(c.models[model], attribute, 0.0)
        sizes[share] = sizes.get(share, 0) + c.numel
    wanted = math.fsum(share * n for share, n in sizes.items())
    return max(0, min(_numel(calls), int(wanted)))


def _trivial(want: Want, call: Call) -> Cut:
    return KEEP_ALL if want.keep == call.numel else Cut(float("inf"), 0, 0)


def _ready(state: Any) -> Statistics:
    """Passes that are none: the state is known."""
    yield from ()
    return state


def _in_model_scope(call: Call, piece: Piece) -> list[Tensor]:
    if call.merge.threshold_scope == "model":
        return piece.tensors
    return [t.reshape(-1)[:0] for t in piece.tensors]


class LargestMagnitude(_Ranked):
    """Keeps the ``max(1, int(density * N))`` largest magnitudes of N; density 0 keeps none, 1 all."""

    least = 1

    def sets(self, keep: int, outliers: int, numel: int) -> list[int]:
        return [keep]

    def apply(self, call: Call, piece: Piece, state: Any, model: int) -> Tensor:
        cut: Cut = state[model]
        return cut.trim(piece.tensors[model], piece.start)


class MiddleMagnitude(_Ranked):
    """Drops the ``int(gamma * N)`` largest and as many of the smallest that ``int(density * N)`` are left.

    Density 1 keeps all. Where gamma and density exceed one together, fewer of the largest go.
    """

    def sets(self, keep: int, outliers: int, numel: int) -> list[int]:
        top = min(outliers, numel - keep) if keep else 0
        return [keep + top, top]

    def apply(self, call: Call, piece: Piece, state: Any, model: int) -> Tensor:
        outer, inner = state[2 * model : 2 * model + 2]
        x = piece.tensors[model]
        kept: Tensor = outer.trim(x, piece.start)
        # Both cuts order entries alike, so the outliers are a subset: x - x and x - 0 are exact.
        return kept if inner.threshold == float("inf") else kept.sub_(inner.trim(x, piece.start))


class Random(Sparsifier):
    """Keeps each entry with probability ``density``, independently (DARE's drop)."""

    def apply(self, call: Call, piece: Piece, state: Any, model: int) -> Tensor:
        density = call.models[model].density
        return masked(piece.tensors[model], call.philox_key(model), piece.start, density)

    def scale(self, call: Call, model: int) -> float:
        p = effective_probability(call.models[model].density)
        return 1 / p if p else 1.0


class RandomByRank(Sparsifier):
    """Keeps an entry with a probability that rises with its magnitude's rank in its row (MagPrune)."""

    slicing = Slicing.ROWWISE

    def apply(self, call: Call, piece: Piece, state: Any, model: int) -> Tensor:
        own = call.models[model]
        x = piece.tensors[model]
        if own.density >= 1:
            return x.clone()
        if own.density <= 0:
            return torch.zeros_like(x)
        width = x.shape[-1]
        table = keep_levels(own.density, own.epsilon, width, call.merge.epsilon_rule)
        levels = torch.from_numpy(table).to(x.device)[row_ranks(x)]
        draw = draws(call.philox_key(model), piece.start, x.numel(), x.device).reshape(x.shape)
        keep = (draw < levels).to(x.dtype)
        if call.merge.rescale and call.merge.rescale_by == "density":
            keep.mul_(LEVELS / levels.clamp(min=1).to(x.dtype))
        return keep.mul_(x)


def keep_levels(density: float, epsilon: float, width: int, rule: str) -> Int32:
    """Of 65536 draws, how many keep the entry of rank 0 (smallest) .. width - 1: int32 ``[width]``.

    ``half``: probabilities ``density - epsilon .. density + epsilon``, both reached. ``full``: drop
    probability ``p_min + epsilon r / width`` with ``p_min = 1 - density - epsilon / 2`` and r = 0 for the
    largest magnitude. A row of one entry keeps it with probability ``density``.
    """
    rank = np.arange(width)
    if width == 1:
        keep = np.array([density])
    elif rule == "half":
        keep = density - epsilon + 2 * epsilon * rank / (width - 1)
    else:
        keep = density + epsilon / 2 - epsilon * (width - 1 - rank) / width
    levels: Int32 = np.clip(np.rint(keep * LEVELS), 0, LEVELS).astype(np.int32)
    return levels


def row_ranks(x: Tensor) -> Tensor:
    """Rank of each magnitude in its row, 0 for the smallest, equal ones by index: int64 ``[r, c]``."""
    bits = magnitude_bits(x).reshape(x.shape)
    if x.device.type != "cpu":
        order = torch.argsort(bits, dim=-1, stable=True)
        ranks = torch.arange(x.shape[-1], device=x.device).expand_as(order)
        return torch.empty_like(order).scatter_(-1, order, ranks)
    # Magnitude and index in one integer: numpy sorts those much faster than it sorts indices.
    index = np.arange(x.shape[-1], dtype=np.int64)
    packed = np.sort((bits.numpy().astype(np.int64) << 32) | index, axis=-1) & 0xFFFFFFFF
    out = np.empty_like(packed)
    np.put_along_axis(out, packed, np.broadcast_to(index, packed.shape), axis=-1)
    return torch.from_numpy(out)
