"""What is merged with what: a recipe as groups of layers, each with its inputs in the order of the method.

A recipe that lists whole ``models`` is one group; one with ``slices`` has a group for each slice. What reads a
recipe after this sees groups only. One with ``modules`` has the groups of each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.method import Base, Declared
from mergekit_lr.recipe.fields import parameter_fields
from mergekit_lr.recipe.parameters import ParameterTable, Resolved, Scope, beneath, chains


@dataclass(frozen=True)
class ModelEntry:
    """One item of ``models``, or of a slice's ``sources``: the model and the parameters given to it there.

    ``layers``: the first layer and the one after the last; None for a whole model. ``name``: what the output calls
    this model, where the method keeps models apart. ``claimed``: a range given to a whole model, which must be all of
    its layers.
    """

    reference: ModelReference
    parameters: Scope = field(default_factory=dict)
    layers: tuple[int, int] | None = None
    name: str | None = None
    claimed: tuple[int, int] | None = None


@dataclass(frozen=True)
class Slice:
    """One item of ``slices``: equally long runs of layers that become the next layers of the output."""

    sources: tuple[ModelEntry, ...]
    base_model: ModelReference | None = None
    parameters: Scope = field(default_factory=dict)


@dataclass(frozen=True)
class Module:
    """One item of ``modules``: a part of the model (`mergekit_lr.arch.modules`) that is merged in a way of its own.

    It lists whole ``models`` or has ``slices`` of the part's own layers. ``names_base``: ``base_model`` stands in
    place of the recipe's, be it None.
    """

    name: str
    models: tuple[ModelEntry, ...] = ()
    slices: tuple[Slice, ...] = ()
    base_model: ModelReference | None = None
    names_base: bool = False
    parameters: Scope = field(default_factory=dict)

    def base(self, of_recipe: ModelReference | None) -> ModelReference | None:
        """The base of this part."""
        return self.base_model if self.names_base else of_recipe


@dataclass(frozen=True)
class Group:
    """Layers that are merged alike. ``inputs`` as the method sees them, ``base`` beside or among them.

    ``base`` is the entry that task vectors, or only names and dtypes, are taken from; None where there is none.
    ``module``: the part of the model that this is about, as the recipe calls it; None for all of it.
    """

    inputs: tuple[ModelEntry, ...]
    base: ModelEntry | None
    table: ParameterTable = field(repr=False, compare=False)
    module: str | None = None

    @property
    def lead(self) -> ModelEntry:
        """The entry whose names, layout and dtypes the output's layers get."""
        return self.base or self.inputs[0]

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """Inputs and base, each once, the lead first."""
        return (self.lead, *(e for e in self.inputs if e is not self.lead))

    def resolve(self, tensor_name: str, t: float, input_names: Sequence[str] | None = None) -> Resolved:
        """The `Merge` parameters and one `PerModel` for each input, as `ParameterTable.resolve` gives them."""
        return self.table.resolve(tensor_name, t, input_names)


def ordered_inputs(method: Declared, listed: tuple[ModelEntry, ...], base: ModelEntry | None) -> tuple[ModelEntry, ...]:
    """``listed`` models, and the base where it takes part, in the order the method sees them.

    Without the base where it is only a reference (`Base.REQUIRED`, `Base.OPTIONAL`); with the base first where it
    is an operand; as listed where it is the frame; as listed otherwise too, a base that is not listed at the end, as
    in mergekit. Models are the same if their references are.
    """
    if base is None or method.base is Base.FRAME:
        return listed
    others = tuple(e for e in listed if e.reference != base.reference)
    if method.base is Base.OPERAND:
        return (base, *others)
    if method.base is Base.UNUSED:
        return listed if len(others) < len(listed) else (*listed, base)
    return others


def entry_of(listed: tuple[ModelEntry, ...], base: ModelReference | None, *, whole: bool) -> ModelEntry | None:
    """The base's entry among ``listed``. One that is not listed has an entry where ``whole`` models are merged.

    In a slice it has none: nobody said which of its layers would be meant.
    """
    if base is None:
        return None
    found = next((e for e in listed if e.reference == base), None)
    return found or (ModelEntry(base) if whole else None)


def build_groups(
    method: Declared,
    models: tuple[ModelEntry, ...],
    slices: tuple[Slice, ...],
    base: ModelReference | None,
    parameters: Scope,
    origin: str,
    modules: tuple[Module, ...] = (),
) -> tuple[Group, ...]:
    """The groups of a recipe, parameters looked up in the order source, slice, module, recipe, default."""
    merge_fields, model_fields = parameter_fields(method.Merge), parameter_fields(method.PerModel)
    shared = chains(merge_fields, parameters), chains(model_fields, parameters)
    found = []
    for module in modules or (Module("", models, slices),):
        merge_below = beneath(merge_fields, _only(module.parameters, merge_fields), shared[0])
        model_below = beneath(model_fields, _only(module.parameters, model_fields), shared[1])
        for part in module.slices or (Slice(module.models),):
            base_entry = entry_of(part.sources, part.base_model or module.base(base), whole=not module.slices)
            inputs = ordered_inputs(method, part.sources, base_entry)
            below = beneath(model_fields, _only(part.parameters, model_fields), model_below)
            table = ParameterTable(
                method=method,
                merge=beneath(merge_fields, _only(part.parameters, merge_fields), merge_below),
                models=tuple((str(e.reference), beneath(model_fields, e.parameters, below)) for e in inputs),
                origin=origin,
            )
            found.append(Group(inputs, base_entry, table, module.name or None))
    return tuple(found)


def _only(scope: Scope, names: Mapping[str, object]) -> Scope:
    return {name: chain for name, chain in scope.items() if name in names}
