"""Where every output tensor comes from: one list for whole models and for slices, before any shape is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergekit_lr.arch.layers import positions
from mergekit_lr.arch.stack import Stack, main_stack, precedes_layers
from mergekit_lr.arch.tied import config_ties, tied_source
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError, join_problems
from mergekit_lr.graph.nodes import OUTSIDE_SLICES
from mergekit_lr.recipe import Group, ModelEntry, Recipe

TIED = "tied to the embeddings in "
"""How the rule of a dropped head begins, before the reference's name."""


@dataclass(frozen=True, slots=True)
class Place:
    """One output tensor before its inputs are looked up.

    ``template``: the model and the tensor whose dtype and shape it has. ``t``: its place among the layers of its
    group, for gradients. ``stack`` and ``offset``: where it is in a layer that was moved; None and 0 elsewhere.
    """

    name: str
    template: tuple[str, str]
    group: Group
    t: float
    stack: Stack | None = None
    offset: int = 0

    def name_in(self, entry: ModelEntry) -> str:
        """What one of the group's models calls this tensor."""
        if self.stack is None or entry.layers is None:
            return self.name
        return self.stack.name(self.name, entry.layers[0] + self.offset)


@dataclass(frozen=True)
class Places:
    """All output tensors, and by what models the output's layers were led: (model, layer) each, None if unmoved."""

    every: Sequence[Place]
    stack: Stack | None = None
    layers: tuple[tuple[str, int], ...] | None = None


def find_places(recipe: Recipe, inputs: Mapping[str, Checkpoint]) -> Places:
    """The output tensors of a recipe, in the order in which the output holds them.

    The reference gives the names: for whole models the base, else the first of them. With slices, it gives those
    outside the layers (before them merged as the first slice says, after them as the last), and each slice's own
    base or first source gives those of its layers.

    Raises:
        CheckpointError: slices cannot be taken from a model, or reach beyond its layers.
    """
    if recipe.slices:
        return _sliced(recipe, inputs)
    [group] = recipe.groups
    lead = str(group.lead.reference)
    checkpoint = inputs[lead]
    ordered = sorted(checkpoint.tensors, key=checkpoint.file_position)
    t = positions(ordered)
    return Places([Place(n, (lead, n), group, t[n]) for n in ordered])


def _sliced(recipe: Recipe, inputs: Mapping[str, Checkpoint]) -> Places:
    reference = str(recipe.config_source)
    stack = _common_stack(recipe, inputs, reference)
    layers = [(str(group.lead.reference), index) for group in recipe.groups for index in range(*_range(group.lead))]
    found = [(0 if precedes_layers(p.name) else len(recipe.groups) - 1, p) for p in _outside(recipe, inputs, stack)]
    start = 0
    for number, group in enumerate(recipe.groups):
        found += [(number, p) for p in _inside(group, inputs[str(group.lead.reference)], stack, start)]
        first, end = _range(group.lead)
        start += end - first

    def on_disk(item: tuple[int, Place]) -> tuple[int, str, int, int]:
        number, place = item
        model, tensor = place.template
        return (number, *inputs[model].file_position(tensor), place.offset)

    return Places([p for _, p in sorted(found, key=on_disk)], stack, tuple(layers))


def _common_stack(recipe: Recipe, inputs: Mapping[str, Checkpoint], reference: str) -> Stack:
    """The reference's stack; every source must have one of that name, with all the layers asked of it."""
    own = main_stack(inputs[reference].tensors, inputs[reference].config, reference)
    counts = {reference: own.count}
    problems: list[str] = []
    for i, group in enumerate(recipe.groups):
        for entry in group.entries:
            model = str(entry.reference)
            if model not in counts:
                found = main_stack(inputs[model].tensors, inputs[model].config, model)
                counts[model] = found.count
                if found.prefix != own.prefix:
                    problems.append(
                        f"{model}: its layers are called {found.prefix!r} where {reference} has {own.prefix!r}; "
                        "merge models of one architecture"
                    )
            first, end = _range(entry)
            if end > counts[model]:
                problems.append(
                    f"{model}: slices[{i}] asks for layers {first} to {end - 1}, and it has {counts[model]}; "
                    f"write a layer_range within [0, {counts[model]}]"
                )
    if problems:
        raise join_problems(CheckpointError, problems)
    return own


def refuse_partial_ranges(recipe: Recipe, inputs: Mapping[str, Checkpoint]) -> None:
    """A ``layer_range`` under ``models`` does nothing; one that is not the whole model asks for something else.

    Raises:
        CheckpointError: names every model whose range is not all of its layers.
    """
    problems = []
    for entry in recipe.models:
        if entry.claimed is None:
            continue
        model = str(entry.reference)
        count = main_stack(inputs[model].tensors, inputs[model].config, model).count
        if entry.claimed != (0, count):
            problems.append(
                f"{model}: models gives it the layers {list(entry.claimed)}, and it has {count}; `models` merges whole "
                "models, so remove layer_range, or pick layers under `slices`"
            )
    if problems:
        raise join_problems(CheckpointError, problems)


def _outside(recipe: Recipe, inputs: Mapping[str, Checkpoint], stack: Stack) -> Iterator[Place]:
    """Embeddings, final norm, head and towers: as the first slice says, or as the last."""
    reference = str(recipe.config_source)
    names = [n for n in inputs[reference].tensors if stack.index(n) is None]
    t = positions(names)
    for name in names:
        group = recipe.groups[0] if precedes_layers(name) else recipe.groups[-1]
        yield Place(name, (reference, name), group, t[name])


def _inside(group: Group, lead: Checkpoint, stack: Stack, start: int) -> Iterator[Place]:
    """The layers of one slice, which become the output's from ``start`` on."""
    first, end = _range(group.lead)
    count = end - first
    for name in lead.tensors:
        index = stack.index(name)
        if index is None or not first <= index < end:
            continue
        offset = index - first
        t = offset / (count - 1) if count > 1 else 1.0
        renamed = stack.name(name, start + offset)
        yield Place(renamed, (lead.reference, name), group, t, stack, offset)


def _range(entry: ModelEntry) -> tuple[int, int]:
    assert entry.layers is not None, "every source of a slice has a range"
    return entry.layers


def why_absent(name: str, reference: Checkpoint) -> str:
    """Why the output has no place for an input's tensor ``name``."""
    tied = tied_source(name, reference.tensors) and config_ties(reference.config)
    return f"{TIED}{reference.reference}" if tied else f"absent from {reference.reference}"


def left_out(recipe: Recipe, inputs: Mapping[str, Checkpoint], places: Places) -> Iterator[tuple[str, str, str]]:
    """(model, tensor, rule) of every tensor that no slice takes, on purpose or because its layout has none such."""
    stack = places.stack
    assert stack is not None
    taken = {(str(e.reference), p.name_in(e)) for p in places.every for e in p.group.entries}
    taken |= {p.template for p in places.every}
    entries: dict[str, list[tuple[int, ModelEntry]]] = {}
    for number, group in enumerate(recipe.groups):
        for entry in group.entries:
            entries.setdefault(str(entry.reference), []).append((number, entry))
    for model, uses in entries.items():
        for name in inputs[model].tensors:
            if (model, name) in taken:
                continue
            index = stack.index(name)
            if index is not None:
                wanted = any(first <= index < end for first, end in (_range(e) for _, e in uses))
            else:
                wanted = (0 if precedes_layers(name) else len(recipe.groups) - 1) in {n for n, _ in uses}
            reference = inputs[str(recipe.config_source)]
            yield model, name, why_absent(name, reference) if wanted else OUTSIDE_SLICES
