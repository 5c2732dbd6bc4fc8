"""Keys that mergekit takes and that do nothing where they stand: a warning, not an error.

mergekit ignores every key that it does not know, and every parameter that a method does not have. Recipes from model
cards are full of both: ``int8_mask`` under SLERP, ``normalize`` under Arcee Fusion, ``density`` under linear. Those are
harmless, and the recipe says what it did there. A word that mergekit does not know either is a misspelling and an
error, and so is a parameter of this method at a place where mergekit does not look for it, unless it only repeats
the default.
"""

from __future__ import annotations

from typing import NamedTuple

from mergekit_lr.method import Declared
from mergekit_lr.recipe.fields import ParameterField, parameter_fields
from mergekit_lr.recipe.yaml import Node, Scalar

METHODS = frozenset(
    {
        *("linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_linear", "dare_ties"),
        *("della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "model_stock", "sce", "passthrough"),
        *("arcee_fusion", "nearswap", "ram", "ramplus_tl"),
    }
)
"""The methods of mergekit 0.1.5."""

PARAMETERS = frozenset(
    {
        *("weight", "density", "gamma", "epsilon", "lambda", "normalize", "rescale", "int8_mask", "t", "select_topk"),
        *("filter_wise", "nuslerp_flatten", "nuslerp_row_wise", "normalize_weights", "eps", "max_iter", "tol", "r"),
        *("alpha", "scale"),
        *("embed_slerp", "consensus_method", "skip_embeddings"),  # of versions before 0.1.5
    }
)
"""Names that mean something to a method of mergekit, of one version or another."""

RESIDUAL_WEIGHT = "residual_weight"
"""A key of mergekit's slices that nothing there reads."""


class Hint(NamedTuple):
    """What to say of a key at the wrong place. ``harmless``: in mergekit it has no effect there either."""

    text: str
    harmless: bool = False


def unused(key: str, method: str) -> Hint | None:
    """A parameter of other methods, which this method has no use for."""
    if key not in PARAMETERS or method not in METHODS:
        return None
    return Hint(f"{key} has no effect in {method}, here as in mergekit", harmless=True)


def repeats(field: ParameterField, node: Node, used: Node | None = None) -> bool:
    """Whether a value that is not looked at is what is used anyway: the value at ``used``, else the default."""
    if not isinstance(node, Scalar) or (used is None and field.required):
        return False
    if used is not None and not isinstance(used, Scalar):
        return False
    try:
        return bool(field.coerce(node.value) == field.coerce(field.default if used is None else used.value))
    except ValueError:
        return False


def outside(key: str, node: Node, method: Declared) -> Hint | None:
    """A parameter beside ``parameters`` instead of under it, where mergekit does not see it."""
    fields = {**parameter_fields(method.PerModel), **parameter_fields(method.Merge)}
    if key not in fields:
        return unused(key, method.name)
    if key == "int8_mask" or repeats(fields[key], node):
        return Hint("has no effect outside `parameters`, and changes nothing: it is the default", harmless=True)
    return Hint(f"it is a parameter of {method.name}: put it under `parameters`")
