"""Model stock: between the base and the average of fine-tunes, as their mutual angle says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_lr.combine import summable, weighted_sum
from mergekit_lr.lazy import torch
from mergekit_lr.method import Base, Call, Method, Parameters, Piece, Slicing, Source, Statistics, parameter
from mergekit_lr.statistics import Float64, Gram, row_products

if TYPE_CHECKING:
    from torch import Tensor


class ModelStock(Method):
    r"""Model stock: ``t mean_i W_i + (1 - t) base`` with ``t = n c / (1 + (n - 1) c)``.

    c is the mean over all pairs of the cosine between task vectors ``D_i = W_i - base``, of the whole tensor
    or, with ``filter_wise``, of each vector along the last axis (a vector tensor is one). t = 0 where
    ``|1 + (n - 1) c| < 1e-6``, and it may be negative where fine-tunes oppose each other; it is not clamped.

    A cosine is ``<D_i, D_j> / max(|D_i| |D_j|, floor)``. mergekit's floor of 1e-6 is the default; it pulls
    the cosines of tensors with tiny task vectors (norms below 1e-3) towards zero, hence those tensors to the
    base. The paper has none: ``norm_floor: 0`` (then a zero task vector has cosine 0).

    fp32, any shape, angles in fp64 from sums over blocks; one extra look, none with ``filter_wise``.

    Source: Jang, Yun and Han, "Model stock: All we need is just a few fine-tuned models", ECCV 2024,
    arXiv:2403.19522, equations 2 to 4.
    """

    name = "model_stock"
    summary = "between the base and the average of fine-tunes, as their mutual angle says"
    source = Source("Model stock", arxiv="2403.19522")
    base = Base.REQUIRED
    min_models = 2
    exposes_nonfinite = True

    class Merge(Parameters):
        filter_wise: bool = parameter(False, description="one ratio for each row instead of each tensor")
        norm_floor: float = parameter(
            1e-6,
            ge=0,
            le=1,
            description="least |D_i| |D_j| that a cosine is divided by: 1e-6 as in mergekit, 0 as in the paper",
        )

    def slicing(self, merge: Any) -> Slicing:
        return Slicing.ROWWISE if merge.filter_wise else Slicing.ELEMENTWISE

    def statistics(self, call: Call, model_state: Any) -> Statistics | None:
        return None if call.merge.filter_wise else self._ratio(call)

    def _ratio(self, call: Call) -> Statistics:
        gram = yield Gram()
        return float(interpolation_ratio(gram, call.merge.norm_floor))

    def coefficients(self, call: Call, state: Any) -> list[float] | None:
        n = len(call.models)
        return None if state is None else summable([state / n] * n)

    def merge(self, call: Call, piece: Piece, state: Any) -> Tensor:
        n = len(piece.tensors)
        if state is not None:
            return weighted_sum(piece.tensors, [state / n] * n)
        ratio = interpolation_ratio(row_products(piece.tensors), call.merge.norm_floor) / n
        out = weighted_sum(piece.tensors, [1.0] * n)
        return out.mul_(torch.from_numpy(ratio).to(out.device, out.dtype)[:, None])


def interpolation_ratio(gram: Float64, floor: float) -> Float64:
    """t from the Gram matrix of task vectors: ``[n, n, ...]`` to ``[...]``."""
    n = len(gram)
    i, j = np.tril_indices(n, -1)
    norms = np.sqrt(gram[np.arange(n), np.arange(n)])
    size = np.maximum(norms[i] * norms[j], floor)
    with np.errstate(invalid="ignore"):  # what is not finite becomes NaN and reaches the output
        cos = np.clip(gram[i, j] / np.where(size == 0, 1, size), -1, 1).mean(axis=0)
    q = 1 + (n - 1) * cos
    degenerate = np.abs(q) < 1e-6
    return np.asarray(np.where(degenerate, 0, n * cos / np.where(degenerate, 1, q)))
