"""Reads the lists of models: ``models`` and ``slices``, every item with its place in the text."""

from __future__ import annotations

import re
from collections.abc import Mapping as AbstractMapping
from dataclasses import dataclass, field

from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.recipe.fields import ParameterField
from mergekit_lr.recipe.foreign import RESIDUAL_WEIGHT
from mergekit_lr.recipe.groups import ModelEntry, Module, Slice
from mergekit_lr.recipe.parameters import Scope
from mergekit_lr.recipe.problems import Mark, Problems, nearest, shown
from mergekit_lr.recipe.references import read_reference
from mergekit_lr.recipe.scope import Misplaced, ScopeReader
from mergekit_lr.recipe.yaml import Entry, Mapping, Node, Scalar, Sequence

MODEL_KEYS = ("model", "name", "parameters", "layer_range")
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SOURCE_KEYS = ("model", "layer_range", "parameters")
SLICE_KEYS = ("sources", "base_model", "parameters")
MODULE_KEYS = ("models", "slices", "base_model", "parameters")
MAX_SLICES = 1_000
MAX_SOURCES = 2_000

Fields = AbstractMapping[str, ParameterField]


@dataclass
class ListedModel:
    """An entry of ``models`` or ``sources`` while it is read. ``tried``: parameters given, rightly or wrongly."""

    reference: ModelReference | None
    parameters: Scope
    mark: Mark | None
    path: str
    tried: set[str] = field(default_factory=set)
    layers: tuple[int, int] | None = None
    layers_mark: Mark | None = None
    name: str | None = None
    claimed: tuple[int, int] | None = None


@dataclass
class ListedSlice:
    """An entry of ``slices`` while it is read. ``names_base``: it has a base of its own, rightly or wrongly."""

    mark: Mark | None
    path: str
    sources: list[ListedModel] = field(default_factory=list)
    sources_mark: Mark | None = None
    base: ModelReference | None = None
    names_base: bool = False
    parameters: Scope = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)


@dataclass
class ListedModule:
    """An entry of ``modules`` while it is read."""

    name: str
    mark: Mark | None
    path: str
    models: list[ListedModel] = field(default_factory=list)
    models_mark: Mark | None = None
    slices: list[ListedSlice] = field(default_factory=list)
    base: ModelReference | None = None
    names_base: bool = False
    parameters: Scope = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class EntryReader:
    """Turns nodes into entries and notes what is wrong with them.

    ``misplaced`` says where a parameter that is unknown at its place belongs. ``known`` is False where the method
    is not: parameters are then not looked at. ``named``: the method has a use for names of models.
    """

    problems: Problems
    merge_fields: Fields
    model_fields: Fields
    misplaced: Misplaced
    known: bool
    named: bool = True

    def reference(self, node: Node, path: str) -> ModelReference | None:
        return read_reference(node, path, self.problems)

    def items(self, node: Node, path: str, empty: str, each: str) -> list[Node]:
        """The items of a list that must not be empty."""
        if not isinstance(node, Sequence):
            self.problems.add(node.mark, path, "must be a list", f"write each as `{each}`")
            return []
        if not node.items:
            self.problems.add(node.mark, path, "is empty", empty)
        return node.items

    def models(self, node: Node, path: str = "models") -> list[ListedModel]:
        """``models``: whole models."""
        found = self.items(node, path, "list the models to merge", "- model: PATH")
        return [self._model(item, f"{path}[{i}]", MODEL_KEYS) for i, item in enumerate(found)]

    def slices(self, node: Node, path: str = "slices") -> list[ListedSlice]:
        """``slices``: runs of layers, in the order of the output."""
        found = self.items(node, path, "list the slices of the output", "- sources: [...]")
        if len(found) > MAX_SLICES:
            self.problems.add(found[MAX_SLICES].mark, path, f"are more than {MAX_SLICES:,}", "join adjoining ones")
            return []
        read: list[ListedSlice] = []
        for i, item in enumerate(found):
            read.append(self._slice(item, f"{path}[{i}]"))
            if sum(len(s.sources) for s in read) > MAX_SOURCES:
                self.problems.add(item.mark, path, f"have more than {MAX_SOURCES:,} sources", "join adjoining ones")
                break
        return read

    def modules(self, node: Node) -> list[ListedModule]:
        """``modules``: parts of the model by name, each with ``models`` or ``slices``."""
        if not isinstance(node, Mapping) or not node.entries:
            what = "is empty" if isinstance(node, Mapping) else "must be a mapping"
            self.problems.add(node.mark, "modules", what, "write each part as `NAME: {models: [...]}`")
            return []
        return [self._module(name[:64], entry) for name, entry in node.entries.items()]

    def _module(self, name: str, entry: Entry) -> ListedModule:
        node, path = entry.value, f"modules.{name}"
        read = ListedModule(name, entry.key_mark, path)
        if not isinstance(node, Mapping):
            self.problems.add(node.mark, path, "must be a mapping", "write `{models: [...]}` or `{slices: [...]}`")
            return read
        every = {**self.model_fields, **self.merge_fields}
        self._unknown(node, path, MODULE_KEYS, every, "this module's")
        models, slices = node.entries.get("models"), node.entries.get("slices")
        if models is not None and slices is None:
            read.models, read.models_mark = self.models(models.value, f"{path}.models"), models.value.mark
        elif slices is not None and models is None:
            read.slices = self.slices(slices.value, f"{path}.slices")
        else:
            what = "has neither models nor slices" if models is None else "has both models and slices"
            self.problems.add(node.mark, path, what, "give it one of the two")
        base = node.entries.get("base_model")
        if base is not None:
            read.names_base = True
            if not (isinstance(base.value, Scalar) and base.value.value is None):
                read.base = self.reference(base.value, f"{path}.base_model")
        read.parameters, read.tried = self._parameters(node, path, every)
        return read

    def _slice(self, node: Node, path: str) -> ListedSlice:
        read = ListedSlice(node.mark, path)
        if not isinstance(node, Mapping):
            self.problems.add(node.mark, path, "must be a mapping", "write `- sources: [...]`")
            read.tried = {*self.merge_fields, *self.model_fields}
            return read
        self._unknown(node, path, SLICE_KEYS, {**self.model_fields, **self.merge_fields}, "this slice's")
        sources = node.entries.get("sources")
        if sources is None:
            if all(k in SLICE_KEYS for k in node.entries):
                self.problems.add(node.mark, path, "has no sources", "add `sources:` with the layers to merge")
        else:
            read.sources_mark = sources.value.mark
            each = "- {model: PATH, layer_range: [FIRST, END]}"
            found = self.items(sources.value, f"{path}.sources", "list the layers to merge", each)
            within = enumerate(found[: MAX_SOURCES + 1])
            read.sources = [self._model(item, f"{path}.sources[{i}]", SOURCE_KEYS) for i, item in within]
        base = node.entries.get("base_model")
        if base is not None and not (isinstance(base.value, Scalar) and base.value.value is None):
            read.names_base = True
            read.base = self.reference(base.value, f"{path}.base_model")
        read.parameters, read.tried = self._parameters(node, path, {**self.model_fields, **self.merge_fields})
        return read

    def _model(self, node: Node, path: str, keys: tuple[str, ...]) -> ListedModel:
        read = ListedModel(None, {}, node.mark, path)
        if not isinstance(node, Mapping):
            self.problems.add(node.mark, path, "must be a mapping", "write `- model: PATH`")
            read.tried = set(self.model_fields)
            return read
        hints = self._unknown(node, path, keys, self.model_fields, "this model's")
        if "did you mean 'parameters'?" in hints:
            read.tried = set(self.model_fields)
        model = node.entries.get("model")
        if model is not None:
            read.reference = self.reference(model.value, f"{path}.model")
        elif not hints:
            self.problems.add(node.mark, path, "names no model", "add `model: PATH`")
        if "name" in node.entries and "name" in keys:
            read.name = self._name(node.entries["name"], f"{path}.name")
        given = node.entries.get("layer_range")
        if keys is MODEL_KEYS:
            if given is not None:
                what = "has no effect under models, as in mergekit: whole models are merged"
                self.problems.warn(given.key_mark, f"{path}.layer_range", what, "merge runs of layers under `slices`")
                read.claimed = self._range(given, f"{path}.layer_range")
        else:
            if given is not None:
                read.layers, read.layers_mark = self._range(given, f"{path}.layer_range"), given.value.mark
            elif not hints:
                fix = "add `layer_range: [FIRST, END]`, END not included"
                self.problems.add(node.mark, path, "has no layer_range", fix)
        read.parameters, tried = self._parameters(node, path, self.model_fields)
        read.tried |= tried
        return read

    def _name(self, entry: Entry, path: str) -> str | None:
        """What the output calls a model."""
        node = entry.value
        if not self.named:
            self.problems.add(entry.key_mark, path, "is not used by this method", "remove it")
        elif not isinstance(node, Scalar) or not MODEL_NAME.fullmatch(str(node.value)):
            what = "must be letters, digits, dots, underscores and hyphens, at most 64"
            self.problems.add(node.mark, path, what, "write a short name")
        else:
            return str(node.value)
        return None

    def _range(self, entry: Entry, path: str) -> tuple[int, int] | None:
        """Two whole numbers, the first layer and the one after the last."""
        node = entry.value
        values = [i.value for i in node.items if isinstance(i, Scalar)] if isinstance(node, Sequence) else []
        if len(values) != 2 or not isinstance(node, Sequence) or len(node.items) != 2:
            what = "must be two numbers"
            self.problems.add(node.mark, path, what, "write [FIRST, END], END not included, counted from 0")
            return None
        for i, value in enumerate(values):
            if type(value) is not int or value < 0:
                what = f"{shown(value)} is not a layer"
                self.problems.add(node.items[i].mark, f"{path}[{i}]", what, "write a whole number, counted from 0")
                return None
        first, end = (v for v in values if type(v) is int)
        if first >= end:
            self.problems.add(node.mark, path, f"[{first}, {end}] holds no layer", "the second number is not included")
            return None
        return first, end

    def _unknown(self, node: Mapping, path: str, keys: tuple[str, ...], fields: Fields, whose: str) -> list[str]:
        """Note unknown keys; returns the hints given."""
        hints = []
        for key, entry in node.entries.items():
            if key not in keys:
                known = {**self.model_fields, **self.merge_fields}
                foreign = self.misplaced(key, entry.value) if self.known and key not in known else None
                if (key == RESIDUAL_WEIGHT and keys is SLICE_KEYS) or (foreign is not None and foreign.harmless):
                    what = "has no effect, here as in mergekit"
                    self.problems.warn(entry.key_mark, f"{path}.{key}", what, "remove it")
                    continue
                hint = f"put it under {whose} `parameters`" if key in fields else nearest(key, keys)
                self.problems.add(entry.key_mark, f"{path}.{key[:60]}", "unknown key", hint)
                hints.append(hint)
        return hints

    def _parameters(self, node: Mapping, path: str, fields: Fields) -> tuple[Scope, set[str]]:
        given = node.entries.get("parameters")
        if given is None or not self.known:
            return {}, set()
        return ScopeReader(self.problems).read(given.value, fields, f"{path}.parameters", self.misplaced)


def model_entry(model: ListedModel) -> ModelEntry:
    """The entry of a recipe that was read without a problem."""
    assert model.reference is not None
    return ModelEntry(model.reference, model.parameters, model.layers, model.name, model.claimed)


def slice_entry(part: ListedSlice) -> Slice:
    """The slice of a recipe that was read without a problem."""
    return Slice(tuple(model_entry(s) for s in part.sources), part.base, part.parameters)


def module_entry(part: ListedModule) -> Module:
    """The module of a recipe that was read without a problem."""
    models, slices = tuple(map(model_entry, part.models)), tuple(map(slice_entry, part.slices))
    return Module(part.name, models, slices, part.base, part.names_base, part.parameters)
