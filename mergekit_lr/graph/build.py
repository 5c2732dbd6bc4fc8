"""From a recipe and opened inputs to a graph. Headers only; every misfit is found here, all at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mergekit_lr.arch.layers import positions
from mergekit_lr.arch.tied import config_ties, tied_source
from mergekit_lr.checkpoint.dtypes import AVERAGED, RECIPE_DTYPES
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError, join_problems
from mergekit_lr.graph.nodes import Artifact, MergeGraph, Operation, Sink, Source
from mergekit_lr.graph.spaces import as_input, as_weight
from mergekit_lr.method import Base, Call
from mergekit_lr.recipe import Recipe

MAX_PROBLEMS = 50


@dataclass
class _Builder:
    recipe: Recipe
    inputs: Mapping[str, Checkpoint]
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.entries = recipe.input_models()
        base = str(recipe.base_model) if recipe.base_model else None
        #: the model whose names, layout, config and tokenizer the output gets
        self.reference = base or str(self.entries[0].reference)
        self.models = tuple(dict.fromkeys([self.reference, *(str(e.reference) for e in self.entries)]))
        takes_base = recipe.method.base in (Base.REQUIRED, Base.OPTIONAL)
        self.base = base if takes_base else None
        self.space = recipe.method.space(self.base is not None)
        self.out_dtype = recipe.out_dtype or recipe.dtype

    def source(self, model: str, name: str) -> Source | None:
        """Where ``model`` keeps what the output calls ``name``; a tied head is its embeddings."""
        checkpoint = self.inputs[model]
        if name in checkpoint.tensors:
            return Source(self.models.index(model), name)
        stand_in = tied_source(name, checkpoint.tensors) if config_ties(checkpoint.config) else None
        return Source(self.models.index(model), stand_in) if stand_in else None

    def fits(self, name: str, info: TensorInfo, model: str, source: Source | None) -> bool:
        """Whether one input has the tensor, in the reference's shape; notes a problem if not."""
        if source is None:
            self.problems.append(
                f"{model}: tensor {name!r} is missing (the output is laid out as {self.reference}); "
                "merge models of one architecture, or name another base_model"
            )
            return False
        found = self.inputs[model].tensors[source.tensor]
        if found.shape != info.shape:
            hint = "merge models of one architecture and size"
            if "embed" in name or "lm_head" in name or "wte" in name:
                hint = "the vocabularies differ; resize one model's embeddings to the other's tokenizer first"
            self.problems.append(
                f"{model}: tensor {name!r} has shape {list(found.shape)} where {self.reference} has "
                f"{list(info.shape)}; {hint}"
            )
            return False
        if found.dtype not in AVERAGED:
            self.problems.append(
                f"{model}: tensor {name!r} is stored as {found.dtype} and cannot be averaged; "
                "convert the checkpoint to float16, bfloat16 or float32 first"
            )
            return False
        return True

    def sink(self, info: TensorInfo, place: float) -> Sink | None:
        """The output tensor that ``info`` of the reference becomes."""
        name, own = info.name, Source(0, info.name)
        if info.dtype not in AVERAGED:
            return Sink(name, info.dtype, info.shape, own, f"copied: {info.dtype} is not averaged")
        sources = [(str(e.reference), self.source(str(e.reference), name)) for e in self.entries]
        fitting = [self.fits(name, info, model, source) for model, source in sources]  # note every misfit
        if not all(fitting):
            return None
        base = Source(self.models.index(self.base), name) if self.base else None
        merge, per_model = self.recipe.resolve(name, place)
        call = Call(
            name=name,
            shape=info.shape,
            merge=merge,
            models=per_model,
            has_base=base is not None,
            seed=self.recipe.seed,
            keys=tuple(model for model, _ in sources),
        )
        inputs = tuple(as_input(s, self.space, base) for _, s in sources if s is not None)
        method = self.recipe.method
        operation = Operation(method.name, call, inputs, base, self.space)
        dtype = RECIPE_DTYPES[self.out_dtype] if self.out_dtype else info.dtype
        return Sink(name, dtype, info.shape, as_weight(operation, base), "merged")

    def dropped(self) -> Iterable[tuple[str, str, str]]:
        """Input tensors that nothing takes."""
        reference = self.inputs[self.reference].tensors
        for model in self.models[1:]:
            for name in self.inputs[model].tensors:
                if name not in reference:
                    tied = tied_source(name, reference) and config_ties(self.inputs[self.reference].config)
                    why = f"tied to the embeddings in {self.reference}" if tied else f"absent from {self.reference}"
                    yield model, name, why


def build_graph(recipe: Recipe, inputs: Mapping[str, Checkpoint]) -> MergeGraph:
    """The graph of a recipe over opened inputs (by reference text).

    Raises:
        CheckpointError: the inputs do not fit each other; ``problems`` holds every misfit.
        RecipeError: a parameter has no value at some tensor.
    """
    builder = _Builder(recipe, inputs)
    refuse_quantised([inputs[m] for m in builder.models])
    reference = inputs[builder.reference]
    ordered = sorted(reference.tensors, key=reference.file_position)
    places = positions(ordered)
    sinks = [builder.sink(reference.tensors[n], places[n]) for n in ordered]
    if builder.problems:
        raise join_problems(CheckpointError, builder.problems[:MAX_PROBLEMS])
    complete = with_artifact(recipe, [s for s in sinks if s is not None])
    return MergeGraph(builder.models, tuple(complete), tuple(builder.dropped()))


def with_artifact(recipe: Recipe, sinks: Sequence[Sink]) -> Sequence[Sink]:
    """Make every operation wait for the method's model-wide statistics, where it has any."""
    from dataclasses import replace

    from mergekit_lr.graph.nodes import Restore, operation_of

    operations = [o for o in (operation_of(s.value) for s in sinks) if o is not None]
    if recipe.method.model_statistics([o.call for o in operations]) is None:
        return sinks
    artifact = Artifact(recipe.method.name)
    out = []
    for sink in sinks:
        operation = operation_of(sink.value)
        if operation is None:
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
