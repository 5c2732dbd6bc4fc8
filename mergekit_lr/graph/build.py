"""From a recipe and opened inputs to a graph. Headers only; every misfit is found here, all at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mergekit_lr.arch.naming import Aliases
from mergekit_lr.arch.tied import config_ties, tied_source
from mergekit_lr.checkpoint.dtypes import AVERAGED, RECIPE_DTYPES
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError, join_problems
from mergekit_lr.graph.companions import Beside, Lookup, companion_of, companion_paths, label
from mergekit_lr.graph.misfits import Parts, nearest_in
from mergekit_lr.graph.nodes import Artifact, MergeGraph, Operation, Sink, Source
from mergekit_lr.graph.places import Place, Places, find_places, left_out, why_absent
from mergekit_lr.graph.spaces import as_input, as_weight
from mergekit_lr.method import Base, Call, Method, Space
from mergekit_lr.recipe import Recipe
from mergekit_lr.registry import get_method

MAX_PROBLEMS = 50
SEARCHED = 3
"""Missing tensors for which the nearest name is looked for: that looks at all names."""
UNCOVERED = "copied: no module of the recipe speaks of it"


@dataclass
class _Builder:
    recipe: Recipe
    inputs: Mapping[str, Checkpoint]
    method: Method
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        recipe = self.recipe
        #: the model whose names, layout, config and tokenizer the output gets
        self.reference = str(recipe.config_source)
        taken = (str(e.reference) for g in recipe.groups for e in g.entries)
        self.models = tuple(dict.fromkeys([self.reference, *taken]))
        self.takes_base = recipe.method.base in (Base.REQUIRED, Base.OPTIONAL)
        self.out_dtype = recipe.out_dtype or recipe.dtype
        companion = companion_of(recipe)
        self.companions = tuple(label(companion, p) for p in companion_paths(recipe)) if companion else ()
        #: what each model calls the tensors that the reference names
        named = self.inputs[self.reference].tensors
        self.names = {m: Aliases(named.keys(), self.inputs[m].tensors.keys()) for m in self.models}
        self.absent: dict[tuple[str, str], int] = {}
        self.parts: Parts | None = None
        self.lookup = Lookup(companion, self.inputs, self.models, self.companions) if companion else None
        self.number = {model: i for i, model in enumerate(self.models)}
        self.labels = {id(g): tuple(str(e.reference) for e in g.inputs) for g in recipe.groups}

    def source(self, model: str, name: str) -> Source | None:
        """Where ``model`` keeps what it calls ``name``; a tied head is its embeddings."""
        checkpoint = self.inputs[model]
        own = self.names[model].of(name)
        if own is not None:
            return Source(self.number[model], own)
        stand_in = tied_source(name, checkpoint.tensors) if config_ties(checkpoint.config) else None
        return Source(self.number[model], stand_in) if stand_in else None

    def fits(self, place: Place, info: TensorInfo, model: str, name: str) -> Source | None:
        """One input's tensor where it has one, in the template's shape; notes a problem if not."""
        source = self.source(model, name)
        if source is None:
            self.note_missing(place.template[0], model, name)
            return None
        found = self.inputs[model].tensors[source.tensor]
        if found.shape != info.shape:
            hint = "merge models of one architecture and size"
            if "embed" in name or "lm_head" in name or "wte" in name:
                hint = (
                    f"the vocabularies differ by {abs(found.shape[0] - info.shape[0])} rows; add `tokenizer_source: "
                    "union` or `tokenizer_source: base`, and rows follow the tokens"
                )
            self.problems.append(
                f"{model}: tensor {name!r} has shape {list(found.shape)} where {place.template[0]} has "
                f"{list(info.shape)}; {hint}"
            )
            return None
        if found.dtype not in AVERAGED:
            self.problems.append(
                f"{model}: tensor {name!r} is stored as {found.dtype} and cannot be averaged; "
                "convert the checkpoint to float16, bfloat16 or float32 first"
            )
            return None
        return source

    def note_missing(self, reference: str, model: str, name: str) -> None:
        """A problem for each tensor that a model lacks, or one for a whole part of the reference that it lacks."""
        self.parts = self.parts or Parts(self.inputs[self.reference])
        part = self.parts.missing(name, self.inputs[model])
        if part is not None:
            self.absent[model, part] = self.absent.get((model, part), 0) + 1
            return
        near = nearest_in(name, self.inputs[model]) if len(self.problems) < SEARCHED else ""
        self.problems.append(
            f"{model}: tensor {name!r} is missing (the output is laid out as {reference}){near and ', ' + near}; "
            "merge models of one architecture, or name another base_model"
        )

    def complain_of_parts(self) -> None:
        """Parts of the reference that a model lacks altogether."""
        for (model, part), count in self.absent.items():
            assert self.parts is not None
            rest = " and ".join(self.parts.shared(self.inputs[model]))
            self.problems.append(
                f"{model}: it has no {part} ({count} tensor{'s' * (count > 1)}), and {self.reference} has one; "
                f"merge under `modules: {{{rest}: {{models: [...]}}}}` what it has, and the rest stays as in "
                f"{self.reference}"
            )

    def sink(self, place: Place) -> Sink | None:
        """The output tensor at a place; None if its inputs do not fit, which is noted."""
        model, tensor = place.template
        info = self.inputs[model].tensors[tensor]
        if info.dtype not in AVERAGED:
            own = Source(self.number[model], tensor)
            return Sink(place.name, info.dtype, info.shape, own, f"copied: {info.dtype} is not averaged")
        if place.group is None:
            return self.uncovered(place.name, model, info)
        group, method = place.group, self.method
        moved = place.stack is not None
        names = tuple([place.name_in(e) for e in group.inputs]) if moved else (place.name,) * len(group.inputs)
        labels = self.labels[id(group)]
        base_entry = group.base if self.takes_base else None
        found = [self.fits(place, info, m, n) for m, n in zip(labels, names, strict=True)]  # note every misfit
        base = None
        if base_entry is not None:
            base = self.fits(place, info, str(base_entry.reference), place.name_in(base_entry))
        sources = [s for s in found if s is not None]
        if len(sources) < len(found) or (base is None and base_entry is not None):
            return None
        merge, per_model = group.resolve(place.name, place.t, names if moved else None)
        call = Call(
            name=place.name,
            shape=info.shape,
            merge=merge,
            models=per_model,
            has_base=base is not None,
            seed=self.recipe.seed,
            keys=labels,
        )
        dtype = RECIPE_DTYPES[self.out_dtype] if self.out_dtype else info.dtype
        beside: Beside | None = Beside(call)
        if self.lookup is not None and method.wants_companion(call):
            beside = self.lookup.find(call, labels, names)
        if beside is None:
            return None
        if beside.rule == "base" and base is not None:
            return Sink(place.name, info.dtype, info.shape, base, "copied: no companion (missing: base)")
        wrong = method.misfits(beside.call)
        if beside.rule == "base":
            wrong.append("`missing: base` needs a base_model")
        self.problems += [f"tensor {place.name!r}: {w}" for w in wrong]
        space = method.space(base is not None)
        inputs = tuple(as_input(s, space, base) for s in sources)
        operation = Operation(
            method.name, beside.call, inputs, base, space, companions=beside.sources, whole=beside.whole
        )
        rule = "merged" if beside.rule is None else f"merged: without companions (missing: {beside.rule})"
        return Sink(place.name, dtype, info.shape, as_weight(operation, base), rule)

    def uncovered(self, name: str, model: str, info: TensorInfo) -> Sink:
        """A tensor of the reference that no module speaks of, in the dtype of the output."""
        own = Source(self.number[model], info.name)
        dtype = RECIPE_DTYPES[self.out_dtype] if self.out_dtype else info.dtype
        if dtype == info.dtype:
            return Sink(name, dtype, info.shape, own, UNCOVERED)
        as_is = get_method("passthrough")
        call = Call(name, info.shape, as_is.Merge(), (as_is.PerModel(),), has_base=False, keys=(model,))
        return Sink(name, dtype, info.shape, Operation(as_is.name, call, (own,), None, Space.WEIGHT), UNCOVERED)

    def dropped(self, places: Places) -> Iterable[tuple[str, str, str]]:
        """Input tensors that nothing takes."""
        if places.chosen:
            return left_out(self.recipe, self.inputs, places, self.names)
        reference = self.inputs[self.reference].tensors
        called = ((m, n, self.names[m].back(n)) for m in self.models[1:] for n in self.inputs[m].tensors)
        return ((m, n, why_absent(c, self.inputs[self.reference])) for m, n, c in called if c not in reference)


def build_graph(recipe: Recipe, inputs: Mapping[str, Checkpoint]) -> MergeGraph:
    """The graph of a recipe over opened inputs (by reference text).

    Raises:
        CheckpointError: the inputs do not fit each other, or slices do not fit them; ``problems`` holds every misfit.
        RecipeError: a parameter has no value at some tensor.
    """
    assert isinstance(recipe.method, Method)
    builder = _Builder(recipe, inputs, recipe.method)
    refuse_quantised([inputs[m] for m in builder.models])
    places = find_places(recipe, inputs)
    sinks = [builder.sink(place) for place in places.every]
    builder.complain_of_parts()
    if builder.lookup is not None:
        builder.problems += builder.lookup.complaints()
    if builder.problems:
        raise join_problems(CheckpointError, list(dict.fromkeys(builder.problems))[:MAX_PROBLEMS])
    complete = with_artifact(recipe.method, [s for s in sinks if s is not None])
    layers = tuple(
        (part, tuple((builder.models.index(model), index) for model, index in found))
        for part, found in places.layers.items()
    )
    dropped = tuple(builder.dropped(places))
    return MergeGraph(builder.models, tuple(complete), dropped, layers, companions=builder.companions)


def with_artifact(method: Method, sinks: Sequence[Sink]) -> Sequence[Sink]:
    """Make every operation wait for the method's model-wide statistics, where it has any."""
    from dataclasses import replace

    from mergekit_lr.graph.nodes import Restore, operation_of

    operations = [o for o in (operation_of(s.value) for s in sinks) if o is not None and o.method == method.name]
    if method.model_statistics([o.call for o in operations]) is None:
        return sinks
    artifact = Artifact(method.name)
    out = []
    for sink in sinks:
        operation = operation_of(sink.value)
        if operation is None or operation.method != method.name:
            out.append(sink)
            continue
        waiting = replace(operation, artifact=artifact)
        value = replace(sink.value, value=waiting) if isinstance(sink.value, Restore) else waiting
        out.append(replace(sink, value=value))
    return out


def refuse_quantised(checkpoints: Iterable[Checkpoint]) -> None:
    """Packed weights look like integers and would be copied unmerged: refuse them by their config."""
    problems = [
        f"{c.reference}: the checkpoint is quantised ({_quantiser(c)}) and cannot be merged; "
        "use the unquantised weights, or dequantise it first"
        for c in checkpoints
        if c.config is not None and c.config.get("quantization_config")
    ]
    if problems:
        raise join_problems(CheckpointError, problems)


def _quantiser(checkpoint: Checkpoint) -> str:
    section = (checkpoint.config or {}).get("quantization_config")
    return str(section.get("quant_method", "unknown method")) if isinstance(section, dict) else "unknown method"
