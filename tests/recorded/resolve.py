"""What a recipe asks for, tensor by tensor: a second, small reading of mergekit's rules, for the recorded recipes.

Written apart from ``mergekit_lr.recipe`` so that the two can disagree. It knows what the recorded recipes use: folders
of the three-layer model and raw files, ``models`` or ``slices``, gradients and filters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

LAYERS = 3
Settings = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One input of a slice: a model, its first layer there, and its own parameters."""

    model: str
    first_layer: int
    settings: Settings


@dataclass(frozen=True)
class OutputTensor:
    """One output tensor: its inputs as (model, tensor name), the base, and every parameter already resolved."""

    name: str
    inputs: list[tuple[str, str]]
    base: str | None
    shared: Settings
    per_input: list[Settings]


def model_name(reference: str) -> str:
    """``./ft_a`` and ``./ft_a.safetensors`` are ``ft_a``."""
    return reference.removeprefix("./").removesuffix(".safetensors")


def value_at(setting: Any, tensor: str, t: float) -> Any:
    """A setting's value for one tensor at gradient position ``t``; None where no filter matches."""
    if isinstance(setting, list) and setting and isinstance(setting[0], dict):
        for condition in setting:
            pattern = condition.get("filter", "*")
            if pattern == "*" or pattern in tensor:
                return value_at(condition["value"], tensor, t)
        return None
    if not isinstance(setting, list):
        return setting
    position = t * (len(setting) - 1)
    low = int(position)
    high = min(low + 1, len(setting) - 1)
    return setting[low] + (position - low) * (setting[high] - setting[low])


def _resolve(scopes: list[Settings], tensor: str, t: float) -> Settings:
    resolved: Settings = {}
    for scope in scopes:
        for key, setting in scope.items():
            value = value_at(setting, tensor, t)
            if value is not None and key not in resolved:
                resolved[key] = value
    return resolved


def _slices(recipe: Settings) -> list[tuple[list[Source], str | None, Settings, int]]:
    base = model_name(recipe["base_model"]) if "base_model" in recipe else None
    if "slices" in recipe:
        found = []
        for output in recipe["slices"]:
            first = output["sources"][0]["layer_range"]
            sources = [
                Source(model_name(s["model"]), s["layer_range"][0], s.get("parameters", {})) for s in output["sources"]
            ]
            own = model_name(output["base_model"]) if "base_model" in output else base
            found.append((sources, own, output.get("parameters", {}), first[1] - first[0]))
        return found
    sources = [Source(model_name(m["model"]), 0, m.get("parameters", {})) for m in recipe["models"]]
    if base is not None and base not in [s.model for s in sources]:
        sources.append(Source(base, 0, {}))
    return [(sources, base, {}, LAYERS)]


def _output(
    recipe: Settings,
    group: tuple[list[Source], str | None, Settings, int],
    name: str,
    t: float,
    out_layer: int | None = None,
    offset: int = 0,
) -> OutputTensor:
    sources, base, slice_settings, _ = group
    below = [slice_settings, recipe.get("parameters", {})]
    out_name = name if out_layer is None else name.replace("LAYER", str(out_layer))
    in_names = [name.replace("LAYER", str(source.first_layer + offset)) for source in sources]
    return OutputTensor(
        name=out_name,
        inputs=[(source.model, tensor) for source, tensor in zip(sources, in_names, strict=True)],
        base=base,
        shared=_resolve(below, out_name, t),
        per_input=[
            _resolve([source.settings, *below], tensor, t) for source, tensor in zip(sources, in_names, strict=True)
        ],
    )


def outputs(recipe: Settings, tensor_names: list[str]) -> Iterator[OutputTensor]:
    """Every output tensor of ``recipe`` over inputs that all have ``tensor_names``.

    Gradient positions: 0 for tensors outside layers, i / (n - 1) for layer i of an n-layer slice, 1 in a slice of one.
    """
    groups = _slices(recipe)
    layered = sorted({re.sub(r"layers\.\d+\.", "layers.LAYER.", name) for name in tensor_names if ".layers." in name})
    for name in tensor_names:
        if ".layers." not in name:
            yield _output(recipe, groups[0] if "embed" in name else groups[-1], name, t=0.0)
    out_layer = 0
    for group in groups if layered else []:
        count = group[3]
        for offset in range(count):
            t = offset / (count - 1) if count > 1 else 1.0
            for name in layered:
                yield _output(recipe, group, name, t, out_layer, offset)
            out_layer += 1
