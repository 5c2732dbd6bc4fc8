"""What must hold of a recipe as a whole: a base where one is needed, counts, required parameters, combinations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.errors import RecipeError
from mergekit_lr.method import Base, Method
from mergekit_lr.recipe.fields import parameter_fields
from mergekit_lr.recipe.parameters import Scope
from mergekit_lr.recipe.problems import Mark, Problems
from mergekit_lr.recipe.schema import ModelEntry, Recipe, ordered_inputs
from mergekit_lr.recipe.yaml import Entry, Scalar


@dataclass
class ListedModel:
    """An entry of ``models`` while it is read. ``tried``: parameters given to it, rightly or wrongly."""

    reference: ModelReference | None
    parameters: Scope
    mark: Mark | None
    path: str
    tried: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class WholeCheck:
    """Checks the parts of a recipe against each other and against what the method wants."""

    problems: Problems
    method: Method
    entries: Mapping[str, Entry]
    mark: Mark | None

    def models(self, models: list[ListedModel], base: ModelReference | None, shared: set[str]) -> None:
        """Note what is wrong; ``shared`` names the parameters that the recipe gives to all models."""
        self._base(base)
        for first, second in _repeats(models):
            self.problems.warn(second.mark, second.path, f"names the same model as {first.path}")
        if models and all(m.reference for m in models) and (base is not None or self._base_is_null):
            self._count(models, base)
        self._required(shared)
        for model in models:
            self._required_of(model, base, shared)
        if self.method.base is Base.UNUSED and base and all(m.reference != base for m in models):
            self.problems.warn(
                self.entries["base_model"].value.mark,
                "base_model",
                f"is not merged: {self.method.name} takes only config and tokenizer from it",
                "list it under `models` to merge it too, as mergekit does by itself",
            )

    @property
    def _method_mark(self) -> Mark | None:
        return self.entries["merge_method"].value.mark

    @property
    def _base_is_null(self) -> bool:
        """No base is named, as against one that is named wrongly."""
        entry = self.entries.get("base_model")
        return entry is None or (isinstance(entry.value, Scalar) and entry.value.value is None)

    def _base(self, base: ModelReference | None) -> None:
        if base is not None or self.method.base not in (Base.REQUIRED, Base.OPERAND):
            return
        entry = self.entries.get("base_model")
        fix = "add `base_model: PATH_OR_HUB_ID`"
        if entry is None:
            self.problems.add(self._method_mark, "base_model", f"is missing, and {self.method.name} needs it", fix)
        elif self._base_is_null:
            what = f"is empty, and {self.method.name} needs it"
            self.problems.add(entry.value.mark, "base_model", what, "name a model")

    def _count(self, models: list[ListedModel], base: ModelReference | None) -> None:
        method = self.method
        entries = tuple(ModelEntry(m.reference) for m in models if m.reference)
        count = len(ordered_inputs(method, entries, base))
        least, most = method.min_models, method.max_models
        if count >= least and (most is None or count <= most):
            return
        wanted = f"exactly {least}" if least == most else f"at least {least}" if count < least else f"at most {most}"
        plural = "" if wanted.endswith(" 1") else "s"
        beside = {Base.OPERAND: ", the base among them", Base.UNUSED: ""}.get(method.base, " beside the base")
        self.problems.add(
            self.entries["models"].value.mark,
            "models",
            f"{method.name} merges {wanted} model{plural}{beside}; here are {count}",
            "list more" if count < least else "list fewer",
        )

    def _required(self, shared: set[str]) -> None:
        for name, info in parameter_fields(self.method.Merge).items():
            if info.required and name not in shared:
                what = f"{name} is missing, and {self.method.name} needs it"
                self.problems.add(self._method_mark, "parameters", what, f"add `{name}: VALUE` there")

    def _required_of(self, model: ListedModel, base: ModelReference | None, shared: set[str]) -> None:
        reference_only = self.method.base in (Base.REQUIRED, Base.OPTIONAL)
        if reference_only and base is not None and model.reference == base:
            if model.parameters:
                self.problems.warn(model.mark, model.path, "parameters of the base model have no effect")
            return
        for name, info in parameter_fields(self.method.PerModel).items():
            if info.required and name not in shared and name not in model.tried:
                self.problems.add(
                    model.mark,
                    model.path,
                    f"{name} is missing, and {self.method.name} needs one for each model",
                    f"add `parameters: {{{name}: VALUE}}` to this model or to the recipe",
                )


def check_combinations(recipe: Recipe, problems: Problems, mark: Mark | None) -> None:
    """Ask the method about every combination that filters and gradients can reach."""
    for name, t in recipe.table.samples():
        if not recipe.table.complete_at(name):
            continue
        try:
            recipe.resolve(name, t)
        except RecipeError as e:
            where = f"tensors named like {name!r}: " if name else ""
            problems.add(mark, "parameters", f"{where}{e.what}", e.fix)


def _repeats(models: list[ListedModel]) -> Iterator[tuple[ListedModel, ListedModel]]:
    seen: dict[ModelReference, ListedModel] = {}
    for model in models:
        if model.reference is None:
            continue
        if model.reference in seen:
            yield seen[model.reference], model
        else:
            seen[model.reference] = model
