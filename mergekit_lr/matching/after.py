"""What happens to models once they are aligned: a line between two, a mean, or another method. No torch on import."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mergekit_lr.arch.layers import positions
from mergekit_lr.errors import RecipeError
from mergekit_lr.method import Base, Call, Method, Parameters
from mergekit_lr.pieces import apply
from mergekit_lr.recipe.fields import parameter_fields
from mergekit_lr.recipe.parameters import Gradient
from mergekit_lr.registry import get_method

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lr.recipe import Recipe

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

    def shares(self) -> list[float]:
        """What each model that is averaged counts; equal shares where another method decides."""
        n = self.models - self.base
        return [1 - self.t, self.t] if n == 2 and self.then is None else [1 / n] * n

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


def settings(recipe: Recipe, names: Sequence[str], varying: Collection[str] = ("t", "then")) -> Any:
    """The method's own parameters that hold for the whole merge, resolved at the first of the tensors ``names``.

    Raises:
        RecipeError: one that is not among ``varying`` is given by filters or as a gradient.
    """
    own = type(get_method(recipe.merge_method)).Merge
    for name in parameter_fields(own):
        chain = recipe.groups[0].table.merge.get(name, ())
        if name not in varying and any(r.filter is not None or isinstance(r.value, Gradient) for r in chain):
            raise RecipeError(
                f"{name} cannot differ between tensors",
                where=chain[0].where or str(recipe.origin or "recipe"),
                why=f"{recipe.merge_method} aligns whole models",
                fix="give it one value",
            )
    return recipe.resolve(names[0], positions(names)[names[0]])[0]


def call(recipe: Recipe, name: str, place: float, order: list[str]) -> How:
    """`How` for one tensor of a recipe, at ``place`` (0..1) between the first layer and the last."""
    resolved, per_model = recipe.resolve(name, place)
    merge: Any = resolved
    needs = get_method(merge.then).base if merge.then is not None else None
    if needs is Base.OPERAND and recipe.base_model is not None:
        raise RecipeError(
            f"{merge.then} takes the base as one of its models and cannot follow an alignment to it",
            where=str(recipe.origin or "recipe"),
            fix="leave base_model out: the first model is then the one that the others are aligned to",
        )
    if needs is Base.REQUIRED and recipe.base_model is None:
        raise RecipeError(
            f"{merge.then} needs a base_model, which deltas are taken from",
            where=str(recipe.origin or "recipe"),
            fix="name the model that the others are aligned to as base_model",
        )
    inputs = [str(m.reference) for m in recipe.input_models()]
    return How(
        models=len(order),
        base=recipe.base_model is not None,
        t=merge.t,
        then=merge.then,
        merge=() if merge.then is None else _own(get_method(merge.then).Merge, merge),
        per_model=tuple(() if merge.then is None else _own(get_method(merge.then).PerModel, m) for m in per_model),
        seed=recipe.seed,
        keys=tuple(inputs),
    )


def _own(kind: type[Parameters], resolved: Any) -> Pairs:
    """Of resolved parameters those that the method in ``then`` takes, by the names that recipes use."""
    return tuple((name, getattr(resolved, f.attribute)) for name, f in parameter_fields(kind).items())


def problems(merge: Any, models: tuple[Any, ...]) -> list[str]:
    """What is wrong with ``then``, and what the method it names says of its own parameters."""
    if merge.then is None:
        return []
    try:
        method = get_method(merge.then)
    except RecipeError as e:
        return [f"then: {e}"]
    if not isinstance(method, Method):
        return [f"then: {merge.then} lays out its own output and cannot follow an alignment"]
    if method.companion is not None:
        return [
            f"then: {merge.then} reads a file beside each model's weights ({method.companion.parameter}), which was "
            "made before the alignment and does not fit after it"
        ]
    try:
        merged = method.Merge.model_validate(dict(_own(method.Merge, merge)))
        resolved = tuple(method.PerModel.model_validate(dict(_own(method.PerModel, m))) for m in models)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return [f"then: {merge.then}: {where}: {first['msg']}"]
    empty = Call(name="", shape=(0,), merge=merged, models=resolved, has_base=method.base is Base.REQUIRED)
    if method.model_statistics([empty]) is not None:
        return [f"then: {merge.then} needs statistics of the whole model and cannot follow an alignment"]
    if method.max_models is not None and len(models) > method.max_models:
        return [f"then: {merge.then} takes at most {method.max_models} models"]
    return method.problems(merged, resolved)
