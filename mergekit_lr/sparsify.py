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
import numpy.typing as npt

from mergekit_lr import host
from mergekit_lr.lazy import torch
from mergekit_lr.magnitudes import Int32
from mergekit_lr.method import Call, Piece, Slicing, Statistics
from mergekit_lr.philox import LEVELS, below, draws, effective_probability, masked
from mergekit_lr.selection import (
    KEEP_ALL,
    KEEP_NOTHING,
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
        cuts: list[ModelCut] = yield from select_model_wide(self._wants(calls), _numel(calls), _in_model)
        return cuts

    def statistics(self, call: Call, model_state: Any) -> Statistics | None:
        if call.merge.threshold_scope == "model":
            return _ready(self._cuts(call, [cut.for_tensor(call.name) for cut in model_state]))
        return self._tensor_passes(call)

    def _tensor_passes(self, call: Call) -> Statistics:
        cuts = yield from select(call, self._wants([call]), _in_tensor)
        return self._cuts(call, cuts)

    def _wants(self, calls: Sequence[Call]) -> list[Want]:
        """What is kept of each model where the entries of ``calls`` compete."""
        wants = []
        for i in range(len(calls[0].models)):
            partly = [c for c in calls if 0 < c.models[i].density < 1]
            numel = _numel(partly)
            keep = max(_pooled(partly, i, "density"), min(self.least, numel))
            wants += [Want(i, k, numel) for k in self.sets(keep, _pooled(partly, i, "gamma"), numel)]
        return wants

    def _cuts(self, call: Call, found: list[Cut]) -> list[Cut]:
        """``found``, but for models that keep all or nothing of this tensor, which do not compete."""
        n, out = call.numel, list(found)
        per_model = len(found) // len(call.models)
        for i, own in enumerate(call.models):
            if not 0 < own.density < 1:
                sizes = self.sets(n if own.density >= 1 else 0, 0, n)
                out[i * per_model : (i + 1) * per_model] = [KEEP_ALL if k else KEEP_NOTHING for k in sizes]
        return out


def _numel(calls: Sequence[Call]) -> int:
    return sum(c.numel for c in calls)


def _pooled(calls: Sequence[Call], model: int, attribute: str) -> int:
    """``int(sum_t share_t N_t)``; for one share over all tensors exactly ``int(share * N)``."""
    sizes: dict[float, int] = {}
    for c in calls:
        share = getattr(c.models[model], attribute, 0.0)
        sizes[share] = sizes.get(share, 0) + c.numel
    return min(_numel(calls), int(math.fsum(share * n for share, n in sizes.items())))


def _ready(state: Any) -> Statistics:
    """Passes that are none: the state is known."""
    yield from ()
    return state


def _in_tensor(call: Call, piece: Piece) -> list[Tensor]:
    """The task vectors of which a part is kept; nothing of the others."""
    pairs = zip(piece.tensors, call.models, strict=True)
    return [x if 0 < own.density < 1 else x.reshape(-1)[:0] for x, own in pairs]


def _in_model(call: Call, piece: Piece) -> list[Tensor]:
    if call.merge.threshold_scope == "model":
        return _in_tensor(call, piece)
    return [x.reshape(-1)[:0] for x in piece.tensors]


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
        levels = keep_levels(own.density, own.epsilon, x.shape[-1], call.merge.epsilon_rule)
        order = magnitude_order(x)
        draw = draws(call.philox_key(model), piece.start, x.numel(), x.device).reshape(x.shape)
        keep = below(draw, _by_rank(levels, order))
        if call.merge.rescale_by_density:
            keep.mul_(_by_rank((LEVELS / np.maximum(levels, 1)).astype(np.float32), order))
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


def magnitude_order(x: Tensor) -> Tensor:
    """Indices of each row's entries by ascending magnitude, equal ones by index: int64 ``[r, c]``."""
    bits = magnitude_bits(x).reshape(x.shape)
    if not host.through_numpy(x):
        return torch.argsort(bits, dim=-1, stable=True)
    # Magnitude and index in one integer: numpy sorts those ten times faster than it sorts indices stably.
    packed = bits.numpy().astype(np.int64) << 32
    packed |= np.arange(x.shape[-1])
    packed.sort(axis=-1)
    packed &= 0xFFFFFFFF
    return torch.from_numpy(packed)


def _by_rank(table: npt.NDArray[Any], order: Tensor) -> Tensor:
    """``table[rank]`` for every entry, where ``order`` says which entry has which rank in its row."""
    source = torch.from_numpy(table).to(order.device)
    out = torch.empty(order.shape, dtype=source.dtype, device=order.device)
    return out.scatter_(-1, order, source.expand_as(order))
