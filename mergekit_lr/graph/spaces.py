"""Conversions between spaces, and the refusal of everything that is not one.

The field's classic mistake is a task-vector rule run on raw weights. Here a method says what it takes, a node
says what it gives, and only these functions connect the two.
"""

from __future__ import annotations

from mergekit_lr.errors import RecipeError
from mergekit_lr.graph.nodes import Delta, Expression, Operation, Restore, Source, space_of
from mergekit_lr.method import Space


def as_input(source: Source, space: Space, base: Source | None) -> Source | Delta:
    """``source`` in the space that a method takes."""
    if space is Space.WEIGHT:
        return source
    if space is Space.DELTA and base is not None:
        return Delta(source, base)
    raise RecipeError(
        f"tensor {source.tensor!r} cannot be given as a {space.value}",
        why="task vectors need a base_model" if space is Space.DELTA else "full weights are not low-rank pairs",
        fix="name a base_model, or choose a method that works on weights",
    )


def as_weight(node: Expression, base: Source | None) -> Expression:
    """``node`` as the absolute weights that a sink takes."""
    if space_of(node) is Space.WEIGHT:
        return node
    if isinstance(node, Operation) and node.space is Space.DELTA and base is not None:
        return Restore(node, base)
    raise RecipeError(
        f"a {space_of(node).value} cannot be written as weights",
        why="there is no base to add it to",
        fix="name a base_model",
    )
