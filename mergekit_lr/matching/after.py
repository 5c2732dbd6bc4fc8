"""What happens to models once they are aligned: a line between two, a mean, or another method. No torch on import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mergekit_lr.errors import RecipeError
from mergekit_lr.method import Base, Call, Method
from mergekit_lr.pieces import apply
from mergekit_lr.registry import get_method

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lr.recipe import Recipe

PASSED_ON = ("lambda_", "normalize")
PASSED_ON_OF_MODELS = ("weight", "density")
Pairs = tuple[tuple[str, Any], ...]


def patterns(only: str | None) -> list[str]:
    """``ffn.*, kv.*`` as a list."""
    return [p.strip() for p in (only or "").split(",") if p.strip()]


def aligned_order(recipe: Recipe) -> list[str]:
    """Models in the order of alignment, the first the one that stays: the base where there is one."""
    base = [str(recipe.base_model)] if recipe.base_model else []
    order = [*base, *(str(m.reference) for m in recipe.input_models())]
    if len(order) < 2 or len(set(order)) < len(order):
        raise RecipeError(
            "there is nothing to align",
            where=str(recipe.origin or "recipe"),
            why="one model stands twice" if len(order) > 1 else "there is one model and no base_model",
            fix="name two different models",
        )
    return order


@dataclass(frozen=True)
class How:
    """How aligned tensors become one. ``base``: the first is only the reference. Plain data: part of a task's call."""

    models: int
    base: bool
    t: float
    then: str | None
    merge: Pairs
    per_model: tuple[Pairs, ...]
    seed: int
    keys: tuple[str, ...]

    def merged(self, tensors: list[Tensor], name: str) -> Tensor:
        """The merged tensor, fp32, of aligned ones: fp32, one shape."""
        inputs = tensors[1:] if self.base else tensors
        if self.then is not None:
            method = get_method(self.then)
            assert isinstance(method, Method)
            takes_base = method.base in (Base.REQUIRED, Base.OPTIONAL)
            return apply(
                method,
                inputs,
                tensors[0] if self.base and takes_base else None,
                merge=dict(self.merge),
                models=[dict(m) for m in self.per_model],
                name=name,
                seed=self.seed,
                keys=self.keys,
            )
        first = inputs[0]
        if len(inputs) == 2:  # from the nearer end, so that both ends are met to the bit
            step = inputs[1] - first
            return first + self.t * step if self.t < 0.5 else inputs[1] - (1 - self.t) * step
        total = first - first
        for x in inputs[1:]:
            total = total + (x - first)
        return first + total / len(inputs)


def call(recipe: Recipe, name: str, order: list[str]) -> How:
    """`How` for one tensor of a recipe."""
    resolved, per_model = recipe.resolve(name, 0.0)
    merge: Any = resolved
    if merge.then is not None and recipe.base_model is not None and get_method(merge.then).base is Base.OPERAND:
        raise RecipeError(
            f"{merge.then} takes the base as one of its models and cannot follow an alignment to it",
            where=str(recipe.origin or "recipe"),
            fix="leave base_model out: the first model is then the one that the others are aligned to",
        )
    inputs = [str(m.reference) for m in recipe.input_models()]
    return How(
        models=len(order),
        base=recipe.base_model is not None,
        t=merge.t,
        then=merge.then,
        merge=_passed_on(merge),
        per_model=tuple(_given(m, PASSED_ON_OF_MODELS) for m in per_model),
        seed=recipe.seed,
        keys=tuple(inputs),
    )


def _passed_on(merge: Any) -> Pairs:
    """What of the `Merge` parameters goes to ``then``; ``t`` too where it has one."""
    takes_t = merge.then is not None and "t" in get_method(merge.then).Merge.model_fields
    return (*_given(merge, PASSED_ON), *((("t", merge.t),) if takes_t else ()))


def _given(parameters: Any, names: tuple[str, ...]) -> Pairs:
    values = ((n.rstrip("_"), getattr(parameters, n)) for n in names)
    return tuple((n, v) for n, v in values if v is not None)


def problems(merge: Any, models: tuple[Any, ...]) -> list[str]:
    """What is wrong with ``then`` and the parameters that are passed on to it."""
    given = dict(_given(merge, PASSED_ON))
    own = [dict(_given(m, PASSED_ON_OF_MODELS)) for m in models]
    if merge.then is None:
        unused = sorted({*given, *(k for m in own for k in m)})
        return [f"{unused[0]} belongs to the method in `then`, and there is none"] if unused else []
    try:
        method = get_method(merge.then)
    except RecipeError as e:
        return [f"then: {e}"]
    if not isinstance(method, Method):
        return [f"then: {merge.then} lays out its own output and cannot follow an alignment"]
    try:
        merged = method.Merge.model_validate(dict(_passed_on(merge)))
        resolved = tuple(method.PerModel.model_validate(m) for m in own)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return [f"then: {merge.then} does not take {where}: {first['msg']}"]
    empty = Call(name="", shape=(0,), merge=merged, models=resolved, has_base=method.base is Base.REQUIRED)
    if method.model_statistics([empty]) is not None:
        return [f"then: {merge.then} needs statistics of the whole model and cannot follow an alignment"]
    if method.max_models is not None and len(models) > method.max_models:
        return [f"then: {merge.then} takes at most {method.max_models} models"]
    return method.problems(merged, resolved)
