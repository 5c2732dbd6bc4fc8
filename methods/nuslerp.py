"""NuSlerp: slerp of two models, or of their task vectors, at the ratio of their weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_lr.combine import summable, weighted_sum
from mergekit_lr.lazy import torch
from mergekit_lr.method import Base, Call, Method, Parameters, Piece, Slicing, Source, Statistics, parameter
from mergekit_lr.statistics import Float64, Gram, column_products, row_products

if TYPE_CHECKING:
    from torch import Tensor

NO_NORM = 1e-7  # shorter vectors are divided by this instead of by their norm
COLINEAR = 1e-7  # 1 - cos^2 below this: to fp32 accuracy the arc is a line, or its plane undefined
NO_WEIGHT = 1e-6  # weights that sum to less than this count as equal


class Nuslerp(Method):
    r"""Spherical interpolation of two models at ``t = w_2 / (w_1 + w_2)``; of their task vectors if there is
    a base.

    ``(sin((1 - t) a) v_1 + sin(t a) v_2) / sin a``, where a is the angle between v_1 and v_2: the flattened
    tensors (``nuslerp_flatten``, the default), or vector by vector along the last axis, or, with
    ``nuslerp_row_wise``, along the first axis. (That is mergekit's meaning of the names: ``row_wise`` takes
    the columns of a matrix.) A vector tensor is one vector either way. Where ``1 - cos^2 a < 1e-7``, the line
    ``(1 - t) v_1 + t v_2``. A zero vector counts as orthogonal to the other. Weights that sum to less than
    1e-6 in absolute value: t = 1/2.

    fp32, any shape, with norms and angles in fp64 from sums over blocks; one extra look when flattened, none
    by last axis; along the first axis a tensor is not cut, so it must fit in memory.

    Source: mergekit's documentation of ``nuslerp``,
    https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md
    """

    name = "nuslerp"
    summary = "slerp of two models, or of their task vectors, at the ratio of their weights"
    source = Source("mergekit: NuSLERP", url="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md")
    base = Base.OPTIONAL
    min_models = 2
    max_models = 2
    exposes_nonfinite = True

    class Merge(Parameters):
        nuslerp_flatten: bool = parameter(
            True, description="one angle for the whole tensor; nuslerp_row_wise has no say then"
        )
        nuslerp_row_wise: bool = parameter(
            False, description="vectors along the first axis (columns of a matrix) instead of the last (its rows)"
        )

    class PerModel(Parameters):
        weight: float = parameter(allow_inf_nan=False, description="share of this model")

    def slicing(self, merge: Any) -> Slicing:
        if merge.nuslerp_flatten:
            return Slicing.ELEMENTWISE
        return Slicing.NONE if merge.nuslerp_row_wise else Slicing.ROWWISE

    def statistics(self, call: Call, model_state: Any) -> Statistics | None:
        return self._flattened(call) if call.merge.nuslerp_flatten else None

    def _flattened(self, call: Call) -> Statistics:
        gram = yield Gram()
        return [float(c) for c in arc(gram, _ratio(call))]

    def coefficients(self, call: Call, state: Any) -> list[float] | None:
        return None if state is None else summable(state)

    def merge(self, call: Call, piece: Piece, state: Any) -> Tensor:
        if state is not None:
            return weighted_sum(piece.tensors, state)
        shape = piece.tensors[0].shape
        if call.merge.nuslerp_row_wise and len(call.shape) > 1:
            tensors = [x.reshape(shape[0], -1) for x in piece.tensors]
            c0, c1 = (_fp32(c, tensors[0])[None, :] for c in arc(column_products(tensors), _ratio(call)))
        else:
            tensors = [x.reshape(_rows_of(shape)) for x in piece.tensors]
            c0, c1 = (_fp32(c, tensors[0])[:, None] for c in arc(row_products(tensors), _ratio(call)))
        return (tensors[0] * c0).add_(tensors[1] * c1).reshape(shape)


def _fp32(x: Float64, like: Tensor) -> Tensor:
    return torch.from_numpy(x).to(like.device, torch.float32)


def _rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _ratio(call: Call) -> float:
    w1, w2 = call.values("weight")
    return 0.5 if abs(w1 + w2) < NO_WEIGHT else w2 / (w1 + w2)


def arc(gram: Float64, t: float) -> Float64:
    """Coefficients of both vectors at ``t`` on the arc between them.

    Args:
        gram: inner products, ``[2, 2, ...]``.

    Returns:
        ``[2, ...]``.
    """
    size = np.maximum(np.sqrt(gram[[0, 1], [0, 1]]), NO_NORM)
    with np.errstate(invalid="ignore"):  # what is not finite becomes NaN and reaches the output
        cos = np.clip(gram[0, 1] / (size[0] * size[1]), -1, 1)
    line = 1 - cos**2 < COLINEAR
    angle = np.where(line, np.pi / 2, np.arccos(cos))
    on_arc = np.stack([np.sin((1 - t) * angle), np.sin(t * angle)]) / np.sin(angle)
    flat = np.array([1 - t, t]).reshape(2, *[1] * cos.ndim)
    return np.where(line, flat, on_arc)
