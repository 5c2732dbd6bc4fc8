"""How much each expert of a layer matters, from sums over calibration tokens.

For expert e, over the tokens t that the router sent to it: ``n`` their number, ``g`` the router's weight (as the layer
multiplies with it), ``y`` the expert's output before it. Every score is fp64 ``[E]``, larger is more; an expert that
no token was sent to scores 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Sums = Mapping[str, "Tensor"]


def _mean(sums: Sums, entry: str) -> Tensor:
    return sums[entry].double() / sums["routing_count"].double().clamp_min(1)


SCORES: dict[str, tuple[str, Callable[[Sums], Tensor]]] = {
    "frequency": ("n: how often it is chosen", lambda s: s["routing_count"].double()),
    "gate_sum": ("sum g", lambda s: s["gate_sum"].double()),
    "ean": ("sum |y|: expert activation norm", lambda s: s["output_norm_sum"].double()),
    "man": ("mean |y|", lambda s: _mean(s, "output_norm_sum")),
    "msan": ("mean |y|^2", lambda s: _mean(s, "output_square_sum")),
    "reap": ("mean g |y| (REAP, arXiv 2510.13999)", lambda s: _mean(s, "gated_norm_sum")),
    "gated_norm": ("sum g |y|", lambda s: s["gated_norm_sum"].double()),
    "gated_square": ("sum g^2 |y|^2", lambda s: s["gated_square_sum"].double()),
}
"""Name -> (what it is, function of a layer's sums)."""

NEEDS = {
    "frequency": ("routing_count",),
    "gate_sum": ("gate_sum",),
    "ean": ("output_norm_sum",),
    "man": ("output_norm_sum", "routing_count"),
    "msan": ("output_square_sum", "routing_count"),
    "reap": ("gated_norm_sum", "routing_count"),
    "gated_norm": ("gated_norm_sum",),
    "gated_square": ("gated_square_sum",),
}


def score(name: str, sums: Sums) -> Tensor:
    """Scores ``[E]`` of one layer's experts under a rule of `SCORES`."""
    return SCORES[name][1](sums)


def super_experts(max_abs: Tensor) -> Tensor:
    """Experts with massive activations, bool ``[layers, E]``; without them a model may collapse.

    ``max_abs`` ``[layers, E]``: the largest magnitude in an expert's output. An expert is super if it is above the
    99.5th percentile of all experts of the model and above a tenth of the largest (Su et al., "Unveiling super
    experts", arXiv 2507.23279, section 3.1).
    """
    flat = max_abs.double().flatten()
    return (max_abs > torch.quantile(flat, 0.995)) & (max_abs > 0.1 * flat.max())


def ranked(scores: Tensor) -> list[int]:
    """Experts from the highest score down; equal ones by index."""
    order: list[int] = torch.argsort(scores, descending=True, stable=True).tolist()
    return order


def best(scores: Tensor, count: int, always: Tensor | None = None) -> list[int]:
    """The ``count`` experts with the highest scores, ascending; those marked in ``always`` come first."""
    order = ranked(scores)
    if always is not None:
        order.sort(key=lambda e: not bool(always[e]))  # stable: within each half the scores decide
    return sorted(order[:count])
