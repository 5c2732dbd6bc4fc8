"""Where every output tensor comes from: one list for models, slices and modules, before any shape is looked at."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergekit_lr.arch.layers import positions
from mergekit_lr.arch.modules import WHOLE, module_named, modules_of
from mergekit_lr.arch.naming import Aliases, place_in
from mergekit_lr.arch.stack import Stack, part_stack, precedes_layers
from mergekit_lr.arch.tied import config_ties, tied_source
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError, join_problems
from mergekit_lr.graph.nodes import OUTSIDE_MODULES, OUTSIDE_SLICES
from mergekit_lr.recipe import Group, ModelEntry, Recipe

TIED = "tied to the embeddings in "
"""How the rule of a dropped head begins, before the reference's name."""

Inputs = Mapping[str, Checkpoint]
Layers = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Place:
    """One output tensor before its inputs are looked up.

    ``template``: the model and the tensor whose dtype and shape it has. ``group``: what is merged there; None where
    the recipe says nothing of it, and the template itself is meant. ``t``: its place among the layers of its
    group, for gradients. ``stack`` and ``offset``: where it is in a layer that was moved; None and 0 elsewhere.
    """

    name: str
    template: tuple[str, str]
    group: Group | None
    t: float
    stack: Stack | None = None
    offset: int = 0

    def name_in(self, entry: ModelEntry) -> str:
        """What one of the group's models calls this tensor, were it laid out as the output is."""
        if self.stack is None or entry.layers is None:
            return self.name
        return self.stack.name(self.name, entry.layers[0] + self.offset)


@dataclass(frozen=True)
class Places:
    """All output tensors.

    ``layers``: for each part whose layers were picked anew, the (model, layer) that each of its output layers was led
    by. ``parts``: what is left out of each model on purpose, by the groups that read it; see `left_out`.
    """

    every: Sequence[Place]
    layers: Mapping[str, Layers]
    stacks: Mapping[str, Stack]
    chosen: Mapping[str, Sequence[Group]]


def find_places(recipe: Recipe, inputs: Inputs) -> Places:
    """The output tensors of a recipe, in the order in which the output holds them.

    The reference gives the names: for whole models the base, else the first of them. With slices, it gives those
    outside the layers (before them merged as the first slice says, after them as the last), and each slice's own
    base or first source gives those of its layers. With modules, each module's tensors are placed so; what no module
    speaks of stays as the reference has it.

    Raises:
        CheckpointError: slices cannot be taken from a model or reach beyond its layers; there is no such module.
    """
    if not recipe.slices and not recipe.modules:
        [group] = recipe.groups
        lead = str(group.lead.reference)
        return Places(_whole(inputs[lead], inputs[lead].tensors, group), {}, {}, {})
    return _Finder(recipe, inputs).run()


def _whole(lead: Checkpoint, names: Collection[str], group: Group | None) -> list[Place]:
    ordered = sorted(names, key=lead.file_position)
    t = positions(ordered)
    return [Place(n, (lead.reference, n), group, t[n]) for n in ordered]


class _Finder:
    """Places part by part; a recipe without modules has one part, the whole."""

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        self.recipe, self.inputs = recipe, inputs
        self.reference = inputs[str(recipe.config_source)]
        names = self.reference.tensors
        self.part_of = modules_of(names, self.reference.config) if recipe.modules else dict.fromkeys(names, WHOLE)
        self.chosen = self._chosen()

    def run(self) -> Places:
        every: list[Place] = []
        layers: dict[str, Layers] = {}
        stacks: dict[str, Stack] = {}
        for part in dict.fromkeys(self.part_of.values()):
            names = [n for n, p in self.part_of.items() if p == part]
            groups = self.chosen.get(part)
            if groups is None:
                every += _whole(self.reference, names, None)
            elif groups[0].lead.layers is None:
                every += _whole(self.reference, names, groups[0])
            else:
                found, stacks[part], layers[part] = self._sliced(part, names, groups)
                every += found
        if not self.recipe.slices:  # several parts: in the order of the reference's own bytes
            every.sort(key=lambda p: (*self.inputs[p.template[0]].file_position(p.template[1]), p.offset))
        return Places(every, layers, stacks, self.chosen)

    def _chosen(self) -> dict[str, Sequence[Group]]:
        """The groups of each part that the recipe speaks of."""
        if not self.recipe.modules:
            return {WHOLE: self.recipe.groups}
        known = list(dict.fromkeys(self.part_of.values()))
        found: dict[str, Sequence[Group]] = {}
        problems = []
        for module in self.recipe.modules:
            part = module_named(module.name, known)
            groups = [g for g in self.recipe.groups if g.module == module.name]
            if part is None:
                problems.append(
                    f"{self.reference.reference}: there is no module {module.name!r} in it; "
                    f"it has {', '.join(sorted(known))}"
                )
            elif part in found:
                problems.append(f"modules.{module.name}: is the same part as another module; keep one of them")
            else:
                found[part] = groups
        if problems:
            raise join_problems(CheckpointError, problems)
        return found

    def _sliced(self, part: str, names: list[str], groups: Sequence[Group]) -> tuple[list[Place], Stack, Layers]:
        stacks = self._stacks(part, names, groups)
        stack = stacks[self.reference.reference]
        layers = [(str(group.lead.reference), i) for group in groups for i in range(*_range(group.lead))]
        found = [(0 if precedes_layers(p.name) else len(groups) - 1, p) for p in self._outside(names, stack, groups)]
        start = 0
        for number, group in enumerate(groups):
            lead = str(group.lead.reference)
            found += [(number, p) for p in _inside(group, self.inputs[lead], stack, stacks[lead], start)]
            first, end = _range(group.lead)
            start += end - first

        def on_disk(item: tuple[int, Place]) -> tuple[int, str, int, int]:
            number, place = item
            model, tensor = place.template
            return (number, *self.inputs[model].file_position(tensor), place.offset)

        return [p for _, p in sorted(found, key=on_disk)], stack, tuple(layers)

    def _stacks(self, part: str, names: list[str], groups: Sequence[Group]) -> dict[str, Stack]:
        """Every source's stack; all must read like the reference's, with all the layers asked of them."""
        reference = self.reference.reference
        own = part_stack(part, names, self.reference.config, reference)
        found = {reference: own}
        problems: list[str] = []
        for i, group in enumerate(groups):
            for entry in group.entries:
                model = str(entry.reference)
                if model not in found:
                    theirs = self.inputs[model]
                    found[model] = part_stack(part, _of_part(part, theirs), theirs.config, model)
                    if place_in(found[model].prefix) != place_in(own.prefix):
                        problems.append(
                            f"{model}: its layers are called {found[model].prefix!r} where {reference} has "
                            f"{own.prefix!r}; merge models of one architecture"
                        )
                first, end = _range(entry)
                count = found[model].count
                if end > count:
                    where = f"modules.{group.module}.slices" if group.module else "slices"
                    problems.append(
                        f"{model}: {where}[{i}] asks for layers {first} to {end - 1}, and it has {count}; "
                        f"write a layer_range within [0, {count}]"
                    )
        if problems:
            raise join_problems(CheckpointError, problems)
        return found

    def _outside(self, names: list[str], stack: Stack, groups: Sequence[Group]) -> Iterator[Place]:
        """Embeddings, final norm, head and towers: as the first slice says, or as the last."""
        outside = [n for n in names if stack.index(n) is None]
        t = positions(outside)
        for name in outside:
            yield Place(
                name, (self.reference.reference, name), groups[0] if precedes_layers(name) else groups[-1], t[name]
            )


def refuse_partial_ranges(recipe: Recipe, inputs: Inputs) -> None:
    """A ``layer_range`` under ``models`` does nothing; one that is not the whole model asks for something else.

    Raises:
        CheckpointError: names every model whose range is not all of its layers.
    """
    problems = []
    listed = [(WHOLE, e) for e in recipe.models] + [(m.name, e) for m in recipe.modules for e in m.models]
    for word, entry in listed:
        if entry.claimed is None:
            continue
        model = str(entry.reference)
        theirs = inputs[model]
        part = module_named(word, set(modules_of(theirs.tensors, theirs.config).values())) or WHOLE
        count = part_stack(part, _of_part(part, theirs), theirs.config, model).count
        if entry.claimed != (0, count):
            problems.append(
                f"{model}: models gives it the layers {list(entry.claimed)}, and it has {count}; `models` merges whole "
                "models, so remove layer_range, or pick layers under `slices`"
            )
    if problems:
        raise join_problems(CheckpointError, problems)


def _of_part(part: str, model: Checkpoint) -> list[str]:
    """The tensors of a model that are of a part; all where the model has no parts, being the whole of it."""
    parts = modules_of(model.tensors, model.config)
    return (
        list(model.tensors)
        if part == WHOLE or set(parts.values()) == {WHOLE}
        else [n for n in parts if parts[n] == part]
    )


def _inside(group: Group, lead: Checkpoint, stack: Stack, own: Stack, start: int) -> Iterator[Place]:
    """The layers of one slice, which become the output's from ``start`` on. ``own``: what the lead calls them."""
    first, end = _range(group.lead)
    count = end - first
    for name in lead.tensors:
        index = own.index(name)
        if index is None or not first <= index < end:
            continue
        offset = index - first
        t = offset / (count - 1) if count > 1 else 1.0
        renamed = Stack(stack.prefix, own.count).name(f"{stack.prefix}{name[len(own.prefix) :]}", start + offset)
        yield Place(renamed, (lead.reference, name), group, t, stack, offset)


def _range(entry: ModelEntry) -> tuple[int, int]:
    assert entry.layers is not None, "every source of a slice has a range"
    return entry.layers


def why_absent(name: str, reference: Checkpoint) -> str:
    """Why the output has no place for an input's tensor ``name``."""
    tied = tied_source(name, reference.tensors) and config_ties(reference.config)
    return f"{TIED}{reference.reference}" if tied else f"absent from {reference.reference}"


def left_out(
    recipe: Recipe, inputs: Inputs, places: Places, names: Mapping[str, Aliases]
) -> Iterator[tuple[str, str, str]]:
    """(model, tensor, rule) of every tensor that no slice or module takes, on purpose or for want of a place."""
    reference = inputs[str(recipe.config_source)]
    taken = {p.template for p in places.every}
    for place in places.every:
        for entry in place.group.entries if place.group else ():
            model = str(entry.reference)
            own = names[model].of(place.name_in(entry))
            taken |= {(model, own)} if own else set()
    models = dict.fromkeys(str(e.reference) for groups in places.chosen.values() for g in groups for e in g.entries)
    for model in models:
        parts = modules_of(inputs[model].tensors, inputs[model].config) if recipe.modules else {}
        for name in inputs[model].tensors:
            if (model, name) not in taken:
                part = parts.get(name, WHOLE)
                yield model, name, _why_left_out(model, name, part, places, names[model], reference)


def _why_left_out(model: str, name: str, part: str, places: Places, aliases: Aliases, reference: Checkpoint) -> str:
    called = aliases.back(name)
    meant = part if part in places.chosen else module_named(part, places.chosen) or next(iter(places.chosen))
    uses = [
        (number, e)
        for number, group in enumerate(places.chosen[meant])
        for e in group.entries
        if str(e.reference) == model
    ]
    stack = places.stacks.get(meant)
    if stack is None:
        return why_absent(called, reference) if uses and part in (meant, WHOLE) else OUTSIDE_MODULES
    index = stack.index(called)
    if index is not None:
        wanted = any(first <= index < end for first, end in (_range(e) for _, e in uses))
    else:
        wanted = (0 if precedes_layers(called) else len(places.chosen[meant]) - 1) in {n for n, _ in uses}
    return why_absent(called, reference) if wanted else OUTSIDE_SLICES
