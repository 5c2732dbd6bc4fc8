"""What must hold of a recipe as a whole: a base where one is needed, counts, required parameters, combinations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.errors import RecipeError
from mergekit_lr.method import Base, Declared
from mergekit_lr.recipe.entries import ListedModel, ListedModule, ListedSlice
from mergekit_lr.recipe.fields import parameter_fields
from mergekit_lr.recipe.groups import ModelEntry, entry_of, ordered_inputs
from mergekit_lr.recipe.problems import Mark, Problems, shown
from mergekit_lr.recipe.schema import Recipe
from mergekit_lr.recipe.yaml import Entry, Scalar


@dataclass(frozen=True)
class WholeCheck:
    """Checks the parts of a recipe against each other and against what the method wants."""

    problems: Problems
    method: Declared
    entries: Mapping[str, Entry]

    def models(self, models: list[ListedModel], base: ModelReference | None, shared: set[str]) -> None:
        """Note what is wrong; ``shared`` names the parameters that the recipe gives to all models."""
        self._base(base)
        for first, second in _repeats(models):
            self.problems.warn(second.mark, second.path, f"names the same model as {first.path}")
        if models and all(m.reference for m in models) and (base is not None or self.base_is_null):
            self._count(models, base)
        self._required(shared)
        for model in models:
            self.required_of(model, base, shared)
        if self.method.base is Base.UNUSED and base and all(m.reference != base for m in models):
            self._base_joins(base, shared)

    def _base_joins(self, base: ModelReference, shared: set[str]) -> None:
        """A base that is only a name for others is one more model here: say so, and see that it has parameters."""
        mark = self.entries["base_model"].value.mark
        what = f"is merged too: {self.method.name} takes every model, and the base is not listed under models"
        fix = "drop base_model to merge only the models listed, or list it with parameters of its own"
        missing = [n for n, f in parameter_fields(self.method.PerModel).items() if f.required and n not in shared]
        if missing:
            self.problems.add(mark, "base_model", f"{what}; it has no {missing[0]}", fix)
        else:
            self.problems.warn(mark, "base_model", f"{what}, as in mergekit", fix)

    @property
    def method_mark(self) -> Mark | None:
        return self.entries["merge_method"].value.mark

    @property
    def base_is_null(self) -> bool:
        """No base is named, as against one that is named wrongly."""
        entry = self.entries.get("base_model")
        return entry is None or (isinstance(entry.value, Scalar) and entry.value.value is None)

    def _base(self, base: ModelReference | None) -> None:
        if base is not None or self.method.base not in (Base.REQUIRED, Base.OPERAND, Base.FRAME):
            return
        entry = self.entries.get("base_model")
        fix = "add `base_model: PATH_OR_HUB_ID`"
        if entry is None:
            self.problems.add(self.method_mark, "base_model", f"is missing, and {self.method.name} needs it", fix)
        elif self.base_is_null:
            what = f"is empty, and {self.method.name} needs it"
            self.problems.add(entry.value.mark, "base_model", what, "name a model")

    def _count(self, models: list[ListedModel], base: ModelReference | None) -> None:
        entries = tuple(ModelEntry(m.reference) for m in models if m.reference)
        joined = self.method.base is Base.UNUSED and base is not None and all(e.reference != base for e in entries)
        self.count(
            ordered_inputs(self.method, entries, entry_of(entries, base, whole=True)),
            self.entries["models"].value.mark,
            "models",
            "drop base_model, which is merged too where models does not list it" if joined else "",
        )

    def count(self, inputs: tuple[ModelEntry, ...], mark: Mark | None, path: str, fix: str = "") -> None:
        """Note a number of inputs that the method does not take."""
        least, most, count = self.method.min_models, self.method.max_models, len(inputs)
        if count >= least and (most is None or count <= most):
            return
        wanted = f"exactly {least}" if least == most else f"at least {least}" if count < least else f"at most {most}"
        plural = "" if wanted.endswith(" 1") else "s"
        beside = {Base.OPERAND: ", the base among them", Base.UNUSED: ""}.get(self.method.base, " beside the base")
        what = f"{self.method.name} merges {wanted} model{plural}{beside}; here are {count}"
        self.problems.add(mark, path, what, "list more" if count < least else fix or "list fewer")

    def _required(self, shared: set[str]) -> None:
        for name, info in parameter_fields(self.method.Merge).items():
            if info.required and name not in shared:
                what = f"{name} is missing, and {self.method.name} needs it"
                self.problems.add(self.method_mark, "parameters", what, f"add `{name}: VALUE` there")

    def required_of(self, model: ListedModel, base: ModelReference | None, shared: set[str]) -> None:
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


@dataclass(frozen=True)
class ModuleCheck:
    """Checks of a recipe with modules, each of which is checked like a recipe of its own."""

    whole: WholeCheck
    base: ModelReference | None
    shared: set[str]

    def run(self, modules: list[ListedModule]) -> None:
        """Note what is wrong with any module."""
        for module in modules:
            base, given = (module.base if module.names_base else self.base), self.shared | module.tried
            if module.slices:
                SliceCheck(self.whole, base, given).run(module.slices)
            elif module.models:
                self._models(module, base, given)

    def _models(self, module: ListedModule, base: ModelReference | None, given: set[str]) -> None:
        whole, method, problems = self.whole, self.whole.method, self.whole.problems
        for first, second in _repeats(module.models):
            problems.warn(second.mark, second.path, f"names the same model as {first.path}")
        for name, info in parameter_fields(method.Merge).items():
            if info.required and name not in given:
                what = f"{name} is missing, and {method.name} needs it"
                problems.add(module.mark, module.path, what, f"add `parameters: {{{name}: VALUE}}` to it")
        for model in module.models:
            whole.required_of(model, base, given)
        unnamed = module.base is None if module.names_base else whole.base_is_null
        if base is None and unnamed and method.base in (Base.REQUIRED, Base.OPERAND):
            fix = "add `base_model: PATH_OR_HUB_ID` to the module or to the recipe"
            problems.add(module.mark, module.path, f"has no base_model, and {method.name} needs it", fix)
        elif all(m.reference for m in module.models) and (base is not None or unnamed):
            entries = tuple(ModelEntry(m.reference) for m in module.models if m.reference)
            joins = method.base is Base.UNUSED and base is not None and all(e.reference != base for e in entries)
            fix = "write `base_model: ~` in the module, or the base is merged too" if joins else ""
            if joins:
                missing = [n for n, f in parameter_fields(method.PerModel).items() if f.required and n not in given]
                what = f"the base is merged too: {method.name} takes every model"
                if missing:
                    problems.add(module.mark, module.path, f"{what}; it has no {missing[0]}", fix)
                else:
                    problems.warn(module.mark, module.path, f"{what}, as in mergekit", fix)
            inputs = ordered_inputs(method, entries, entry_of(entries, base, whole=True))
            whole.count(inputs, module.models_mark, f"{module.path}.models", fix)


@dataclass(frozen=True)
class SliceCheck:
    """Checks of a recipe with slices. ``shared``: parameters given in the recipe's own ``parameters``."""

    whole: WholeCheck
    base: ModelReference | None
    shared: set[str]

    def run(self, slices: list[ListedSlice]) -> None:
        """Note what is wrong with any slice."""
        for part in slices:
            self._base(part)
            self._twice(part)
            self._lengths(part)
            self._required(part)

    def _base(self, part: ListedSlice) -> None:
        """The base of a slice is one of its sources, for nothing else says which layers of it are meant."""
        method, problems = self.whole.method, self.whole.problems
        base = part.base if part.names_base else self.base
        unnamed = not part.names_base and self.whole.base_is_null
        if base is None and method.base in (Base.REQUIRED, Base.OPERAND) and unnamed:
            fix = "add `base_model: PATH_OR_HUB_ID` to the slice or to the recipe, and list it under the sources"
            problems.add(part.mark, part.path, f"has no base_model, and {method.name} needs it", fix)
        if not part.sources or any(s.reference is None for s in part.sources) or (base is None and not unnamed):
            return
        entries = tuple(ModelEntry(s.reference) for s in part.sources if s.reference)
        listed = entry_of(entries, base, whole=False)
        if base is not None and listed is None and method.base is not Base.UNUSED:
            problems.add(
                part.sources_mark,
                f"{part.path}.sources",
                f"do not list the base {shown(str(base))}, so nothing says which of its layers are meant",
                "add it there with its layer_range",
            )
        elif base is not None or method.base not in (Base.REQUIRED, Base.OPERAND):
            self.whole.count(ordered_inputs(method, entries, listed), part.sources_mark, f"{part.path}.sources")

    def _twice(self, part: ListedSlice) -> None:
        for first, second in _repeats(part.sources):
            what = f"names the same model as {first.path}"
            self.whole.problems.add(second.mark, second.path, what, "list each model once in a slice")

    def _lengths(self, part: ListedSlice) -> None:
        ranged = [s for s in part.sources if s.layers]
        for source in ranged[1:]:
            assert source.layers and ranged[0].layers
            count, wanted = (end - first for first, end in (source.layers, ranged[0].layers))
            if count != wanted:
                what = f"holds {count} layers where that of {ranged[0].path} holds {wanted}"
                self.whole.problems.add(
                    source.layers_mark, f"{source.path}.layer_range", what, "give every source of a slice as many"
                )

    def _required(self, part: ListedSlice) -> None:
        method, given = self.whole.method, self.shared | part.tried
        for name, info in parameter_fields(method.Merge).items():
            if info.required and name not in given:
                what = f"{name} is missing, and {method.name} needs it"
                fix = f"add `parameters: {{{name}: VALUE}}` to the slice or to the recipe"
                self.whole.problems.add(part.mark, part.path, what, fix)
        base = part.base if part.names_base else self.base
        for source in part.sources:
            self.whole.required_of(source, base, given)


def check_combinations(recipe: Recipe, problems: Problems, mark: Mark | None) -> None:
    """Ask the method about every combination that filters and gradients can reach."""
    for i, group in enumerate(recipe.groups):
        path = f"slices[{i}]" if recipe.slices else f"modules.{group.module}" if group.module else "parameters"
        for name, t in group.table.samples(len(recipe.groups)):
            if not group.table.complete_at(name):
                continue
            try:
                group.resolve(name, t)
            except RecipeError as e:
                where = f"tensors named like {name!r}: " if name else ""
                problems.add(mark, path, f"{where}{e.what}", e.fix)


def _repeats(models: list[ListedModel]) -> Iterator[tuple[ListedModel, ListedModel]]:
    seen: dict[ModelReference, ListedModel] = {}
    for model in models:
        if model.reference is None:
            continue
        if model.reference in seen:
            yield seen[model.reference], model
        else:
            seen[model.reference] = model
