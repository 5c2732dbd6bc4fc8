"""Parameters to try each method with, and inputs for it.

An example is ``(merge parameters, parameters of each of three models)``; a method that takes fewer models gets
the first ones. ``UNANIMOUS`` holds parameters under which models that all agree are given back, whatever the base;
a method that is left out makes no such promise beyond a base that agrees too.
"""

from __future__ import annotations

from typing import Any

import torch

from mergekit_lr.method import Base, Method
from mergekit_lr.pieces import apply as plain_apply
from mergekit_lr.registry import builtin_methods

Example = tuple[dict[str, Any], list[dict[str, Any]]]

WEIGHTS = [{"weight": 0.5}, {"weight": 0.3}, {"weight": 0.2}]
DENSITIES = [{"weight": 0.5, "density": 0.5}, {"weight": 0.3, "density": 0.7}, {"weight": 0.2, "density": 0.4}]
NONE: list[dict[str, Any]] = [{}, {}, {}]
CURVED = [{"curvature": "a"}, {"curvature": "b", "weight": 2.0}, {"curvature": "c"}]
SCALES = [{"scales": "a"}, {"scales": "b"}, {"scales": "c"}]
STATISTICS = [{"statistics": "a"}, {"statistics": "b", "weight": 2.0}, {"statistics": "c"}]

EXAMPLES: dict[str, list[Example]] = {
    "arcee_fusion": [({}, NONE)],
    "breadcrumbs": [({}, [{**d, "gamma": 0.1} for d in DENSITIES]), ({"rescale": True}, DENSITIES)],
    "breadcrumbs_ties": [({"threshold_scope": "model"}, [{**d, "gamma": 0.1} for d in DENSITIES])],
    "consensus": [
        ({}, NONE),
        ({"multi_task": "ties", "k": 1}, [{"lambda": 0.2, "density": 0.5}, {"lambda": 1.0}, {}]),
        ({"multi_task": "ties", "threshold_scope": "tensor"}, NONE),
    ],
    "dare_linear": [({}, DENSITIES), ({"rescale_by": "l1"}, DENSITIES)],
    "dare_ties": [({}, DENSITIES), ({"rescale_by": "l1", "normalize": True}, DENSITIES)],
    "della": [({}, DENSITIES), ({"epsilon_rule": "full", "rescale_by": "l1"}, DENSITIES)],
    "della_linear": [({}, DENSITIES), ({"epsilon_rule": "full"}, DENSITIES)],
    "fisher": [({}, CURVED), ({"epsilon": 0.1, "normalize_curvature": "tensor"}, CURVED)],
    "karcher": [({}, NONE), ({"max_iter": 3, "tol": 1e-3}, NONE)],
    "linear": [({}, WEIGHTS), ({"normalize": False}, WEIGHTS)],
    "model_stock": [({}, NONE), ({"filter_wise": True}, NONE), ({"norm_floor": 0}, NONE)],
    "multislerp": [({}, WEIGHTS), ({"normalize_weights": False}, WEIGHTS)],
    "nearswap": [({"t": 0.004}, NONE), ({"t": 0.0}, NONE)],
    "nuslerp": [
        ({}, WEIGHTS),
        ({"nuslerp_flatten": False}, WEIGHTS),
        ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, WEIGHTS),
    ],
    "ota": [
        ({}, CURVED),
        (
            {"denominator": "all", "power": 1},
            [{**c, "density": d} for c, d in zip(CURVED, (0.5, 0.7, 0.4), strict=True)],
        ),
        (
            {"density_scope": "tensor", "rescale": "l2", "normalize_curvature": "model"},
            [{**c, "density": 0.5} for c in CURVED],
        ),
    ],
    "passthrough": [({}, NONE), ({}, [{"scale": 0.5}])],
    "ram": [({}, NONE), ({"epsilon": 0.01}, NONE)],
    "ramplus_tl": [({"epsilon": 0.012}, NONE), ({"r": 1.0, "alpha": 2.0, "epsilon": 0.012}, NONE)],
    "regmean": [({}, STATISTICS), ({"shrink": 0.5, "normalize_grams": "trace"}, STATISTICS)],
    "row_scales": [({}, SCALES), ({"lambda": 0.7}, SCALES)],
    "sce": [({}, NONE), ({"select_topk": 0.3}, NONE), ({"mass_floor": 0}, NONE)],
    "slerp": [({"t": 0.3}, NONE), ({"t": 0.0}, NONE)],
    "task_arithmetic": [({}, WEIGHTS), ({"lambda": 0.7, "normalize": True}, WEIGHTS)],
    "ties": [
        ({}, DENSITIES),
        ({"threshold_scope": "model", "normalize": False}, DENSITIES),
        ({"rescale": True, "lambda": 0.5}, DENSITIES),
    ],
    "wudi": [({}, NONE), ({"filter": "soft_hard", "start": "mean"}, NONE)],
}

UNANIMOUS: dict[str, Example] = {
    "breadcrumbs": ({}, WEIGHTS),
    "breadcrumbs_ties": ({}, WEIGHTS),
    "consensus": ({"scale": 1 / 3}, NONE),
    "dare_linear": ({}, WEIGHTS),
    "dare_ties": ({}, WEIGHTS),
    "della": ({}, WEIGHTS),
    "della_linear": ({}, WEIGHTS),
    "fisher": ({}, CURVED),
    "karcher": ({}, NONE),
    "linear": ({}, WEIGHTS),
    "model_stock": ({"norm_floor": 0}, NONE),
    "multislerp": ({}, WEIGHTS),
    "nuslerp": ({}, WEIGHTS),
    "ota": ({}, CURVED),
    "passthrough": ({}, NONE),
    "ram": ({"epsilon": 0}, NONE),
    "regmean": ({}, STATISTICS),
    "sce": ({}, NONE),
    "task_arithmetic": ({}, WEIGHTS),
    "ties": ({}, WEIGHTS),
    "wudi": ({"start": "mean"}, NONE),
}

METHODS = {name: method for name, method in builtin_methods().items() if isinstance(method, Method)}
CASES = [(name, i) for name, found in EXAMPLES.items() for i in range(len(found))]


def companions(method: Method, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """What a method reads beside each model: a function of the model alone, so that they move together."""
    if method.companion is None:
        return []
    clean = [x.float().nan_to_num(0, 0, 0) for x in tensors]
    if method.companion.layout == "rows":
        return [((x.flatten(1).sum(1) if x.dim() > 1 else x) * 37).sin() for x in clean]
    if method.companion.layout == "same":
        return [(x * 37).sin().square() * 1e-9 for x in clean]
    shape = clean[0].shape
    if len(shape) != 2 or not 0 < clean[0].numel() <= 100_000 or shape[1] > 400:
        return []
    rows = [torch.linspace(0, 9, 20)[:, None] * (torch.arange(shape[1]) + 1) + x.sum().clamp(-9, 9) for x in clean]
    return [r.sin().T @ r.sin() for r in rows]


def apply(method: Method, tensors: list[torch.Tensor], base: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
    """`mergekit_lr.pieces.apply`, with companions where the method takes some."""
    beside = [x.to(tensors[0].device) for x in companions(method, tensors)]
    return plain_apply(method, tensors, base, extra=beside, **more)


def inputs(
    method: Method, shape: tuple[int, ...], *, with_base: bool, seed: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """bf16 models around a base, as many as the method takes (three where it may), and the base."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator) * 0.05
    count = min(3, method.max_models or 3)
    models = [(base + torch.randn(shape, generator=generator) * 0.01).bfloat16() for _ in range(count)]
    return models, base.bfloat16() if with_base else None


def bases(method: Method) -> list[bool]:
    """With or without a reference: what the method can be called with."""
    return {Base.REQUIRED: [True], Base.OPTIONAL: [False, True]}.get(method.base, [False])
