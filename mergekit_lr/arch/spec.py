"""From ``permutations: auto | family | path`` and a model's headers to its permutation spec."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_lr.arch.families import build_spec, family, family_names, family_of, read_spec
from mergekit_lr.arch.inferred import chain_spec
from mergekit_lr.arch.symmetry import SymmetrySpec


def spec_for(
    permutations: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None, where: str
) -> SymmetrySpec:
    """The spec of a model, by family name, by path, or (``auto``) by config, names and shapes.

    Raises:
        RecipeError: there is no such family or file.
        CheckpointError: the spec does not fit, or nothing is known about the model.
    """
    if permutations == "auto":
        found = family_of(shapes, config)
        return build_spec(family(found), shapes, config, where) if found else chain_spec(shapes, where)
    if permutations == "chain":
        return chain_spec(shapes, where)
    if permutations in family_names() or not permutations.endswith((".yml", ".yaml")):
        return build_spec(family(permutations), shapes, config, where)
    return build_spec(read_spec(Path(permutations)), shapes, config, where)
