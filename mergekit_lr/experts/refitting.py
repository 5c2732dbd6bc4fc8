"""Methods that reduce a mixture by selecting neurons and refitting down projections: what they share.

Preparing runs the model once, layer by layer (`mergekit_lr.experts.passes`), and keeps every reduced layer in a file
as the output will have it, with what it costs; the outline copies the rest.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mergekit_lr.arch.layers import positions
from mergekit_lr.arch.moe import MoeLayer, moe_layers
from mergekit_lr.arch.moe_config import shrunk_config
from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.dtypes import RECIPE_DTYPES
from mergekit_lr.checkpoint.model import Checkpoint, open_file
from mergekit_lr.errors import CheckpointError, RecipeError
from mergekit_lr.experts.refitted import LayerFiles
from mergekit_lr.experts.size import refit_card, sizes
from mergekit_lr.graph.nodes import Operation, Result, Sink, Source, Task
from mergekit_lr.method import Base, Call, Parameters, Space, parameter
from mergekit_lr.registry import tensor_method
from mergekit_lr.rewrite import Desk, Outline, Preparation, Rewrite, model_order

if TYPE_CHECKING:
    from mergekit_lr.calibration.text import Windows
    from mergekit_lr.experts.bank import ExpertBank
    from mergekit_lr.experts.budget import Concentration
    from mergekit_lr.experts.problem import Fit, Reduced
    from mergekit_lr.recipe.schema import Recipe

SUMMARY = "summary.json"


class RefitParameters(Parameters):
    """What every method that refits is told."""

    seed: int | None = parameter(None, ge=0, description="decides windows of text; absent: the recipe's seed")


class ExpertRefit(Rewrite):
    """Base of the methods. Subclasses give `shape` and `fit`."""

    base = Base.UNUSED
    max_models = 1
    stochastic = True
    prepares = True
    settings: ClassVar[frozenset[str]] = frozenset({"calibration"})
    required_settings: ClassVar[frozenset[str]] = frozenset({"calibration"})

    class Merge(RefitParameters):
        """Parameters of the whole reduction."""

    @abstractmethod
    def shape(self, job: Job, prepared: Path | None) -> tuple[int, int]:
        """Experts and width that every layer ends with; as far as known where nothing is prepared."""

    @abstractmethod
    def fit(self, job: Job) -> Fit:
        """How one layer is reduced."""

    @abstractmethod
    def unseen(self, job: Job, layer: MoeLayer, fit: Fit, last: Reduced) -> Reduced:
        """A layer that calibration cannot run (for predicting further tokens): by its weights and the last layer's."""

    def layers_in(self, job: Job, prepared: Path) -> Path:
        """The folder of the layers' files."""
        return prepared

    def prepare(self, work: Preparation) -> None:
        job = Job(self, work.recipe, work.inputs)
        if not (work.folder / SUMMARY).exists():
            self.find(job, work)

    def find(self, job: Job, work: Preparation) -> None:
        """Fit all layers and write the summary."""
        windows = job.windows()
        if job.unchanged(None):
            write_json(work.folder / SUMMARY, {})
            return
        write_json(work.folder / SUMMARY, fit_layers(job, work, windows, self.fit(job), work.folder))

    def outline(self, recipe: Recipe, inputs: Mapping[str, Checkpoint], prepared: Path | None) -> Outline:
        return Job(self, recipe, inputs).outline(prepared)

    def compute(self, task: Task, desk: Desk) -> None:
        raise AssertionError(f"{task.key}: layers are fitted while preparing")  # tasks only stand in a bare plan


def fit_layers(job: Job, work: Preparation, windows: Windows, fit: Fit, folder: Path) -> dict[str, Any]:
    """Fit every layer into ``folder``, and say what they cost. Layers that are there already are taken as they are."""
    from mergekit_lr.experts.heldout import Losses
    from mergekit_lr.experts.passes import Reduction

    layers: dict[str, Any] = {}
    losses: dict[str, Any] = {}
    last: Reduced | None = None
    states = work.folder / "states"
    run = Reduction(job.checkpoint, windows, device=work.device, limit=work.limit, folder=states)
    files = job.files(folder)
    fs.make_folder(folder)
    for found in run.run(fit, files, job.texts):
        if isinstance(found, Losses):
            losses = found.plain()
            continue
        layer, last = found
        layers[layer.block] = last.notes
        work.tell(len(layers), len(job.layers), "fitting layers")
    assert last is not None
    for layer in (x for x in job.layers if x.extra):
        if files.said(layer) is None:
            files.save(layer, job.method.unseen(job, layer, fit, last))
        layers[layer.block] = {"note": "no token reaches this layer: by its weights, as the last one"}
    return {"layers": layers, "held_out": losses}


class Job:
    """One recipe against one model."""

    def __init__(self, method: ExpertRefit, recipe: Recipe, inputs: Mapping[str, Checkpoint]) -> None:
        [self.name] = model_order(recipe)
        self.method, self.recipe, self.checkpoint = method, recipe, inputs[self.name]
        self.layers = moe_layers(self.checkpoint)
        self.config = self.checkpoint.config or {}
        self.p = self._parameters()
        self.seed: int = recipe.seed if self.p.seed is None else self.p.seed
        self._check()

    @property
    def first(self) -> MoeLayer:
        return self.layers[0]

    @property
    def texts(self) -> list[str]:
        """The recipe's texts by name."""
        assert self.recipe.calibration is not None  # the recipe was checked for it
        return [*self.recipe.calibration.text, *filter(None, [self.recipe.calibration.dataset])]

    def windows(self) -> Windows:
        """The windows of text that layers are fitted on; every second one is held out."""
        from mergekit_lr.calibration.layers import windows_for

        calibration = self.recipe.calibration
        assert calibration is not None
        found = windows_for(
            self.checkpoint,
            self.texts,
            samples=calibration.samples,
            sequence_length=calibration.sequence_length,
            seed=self.seed,
        )
        if len(set(found.held_out)) < 2:
            raise CheckpointError(
                "there is too little text to fit and to judge",
                where=", ".join(self.texts),
                why=f"{calibration.samples} windows leave one half empty",
                fix="ask for at least 2 samples of each text",
            )
        return found

    def concentrations(self, windows: Windows, work: Preparation) -> dict[str, Concentration]:
        """How unequally experts and neurons of each layer that calibration runs are used, by the layer's block."""
        from mergekit_lr.calibration.layers import stream_layers
        from mergekit_lr.experts.bank import Routing
        from mergekit_lr.experts.budget import concentration
        from mergekit_lr.experts.passes import activation_of, bank_of

        by_index = {layer.index: layer for layer in self.layers if not layer.extra}
        found = {}
        for seen in stream_layers(self.checkpoint, windows, device=work.device, limit=work.limit):
            layer = by_index[seen.index]
            bank = bank_of(self.checkpoint, layer, activation_of(seen.block.experts))
            found[layer.block] = concentration(bank, seen.inputs, Routing(seen.indices, seen.weights))
        return found

    def bank(self, layer: MoeLayer) -> ExpertBank:
        """The experts of a layer, fp32; with no activation of the family's, for it is not run."""
        from mergekit_lr.experts.bank import swiglu
        from mergekit_lr.experts.passes import bank_of

        return bank_of(self.checkpoint, layer, swiglu)

    def files(self, folder: Path) -> LayerFiles:
        """Where layers are kept."""
        code = RECIPE_DTYPES[self.recipe.output_dtype] if self.recipe.output_dtype else None
        return LayerFiles(self.checkpoint, folder, code)

    def unchanged(self, prepared: Path | None) -> bool:
        """Whether everything is kept, so that nothing is to be fitted."""
        return self.method.shape(self, prepared) == (self.first.experts, self.first.width)

    def _parameters(self) -> Any:
        at = positions(self.checkpoint.tensors)
        names = [layer.router[0].name for layer in self.layers]
        found = [self.recipe.resolve(n, at[n])[0] for n in names]
        if any(p != found[0] for p in found):
            raise RecipeError(
                "parameters differ between layers",
                where=str(self.recipe.origin or "recipe"),
                why=f"{self.recipe.merge_method} gives all layers one shape",
                fix="give each parameter one value",
            )
        return found[0]

    def _check(self) -> None:
        calibration = self.recipe.calibration
        if calibration is not None and not (calibration.text or calibration.dataset):
            raise RecipeError(
                "calibration.text is missing",
                where=str(self.recipe.origin or "recipe"),
                why="a refit needs the tokens themselves, which statistics do not hold",
                fix="add text: [FILE]",
            )
        if self.config.get("quantization_config"):
            raise CheckpointError(
                "a quantised model cannot be refitted", where=self.checkpoint.reference,
                fix="use the unquantised weights, or dequantise it first",
            )  # fmt: skip
        count, width = self.method.shape(self, None)
        shrunk_config(self.config, self.first, experts=count, width=width, reference=self.checkpoint.reference)

    def outline(self, prepared: Path | None) -> Outline:
        """Copied tensors, and those of the fitted layers."""
        count, width = self.method.shape(self, prepared)
        found = Composition(self, prepared, count, width)
        if self.unchanged(prepared):
            found.owner = {}
        found.run()
        shrunk = shrunk_config(self.config, self.first, experts=count, width=width, reference=self.checkpoint.reference)
        config, warnings = shrunk.config, list(shrunk.notices)
        if self.recipe.output_dtype:
            keys = [k for k in ("dtype", "torch_dtype") if k in config] or ["dtype"]
            config = {**config, **dict.fromkeys(keys, self.recipe.output_dtype)}
        details: dict[str, Any] = {"size": sizes(self.checkpoint, self.layers, count, width)}
        if prepared is None:
            warnings.append("layers are fitted on calibration text when the merge runs")
        else:
            details |= json.loads((prepared / SUMMARY).read_text(encoding="utf-8"))
        return Outline(
            models=(self.name, *found.extra),
            sinks=tuple(found.sinks),
            tasks=tuple(found.tasks),
            dropped=tuple(found.dropped),
            config=config,
            extra=found.extra,
            warnings=tuple(warnings),
            details=details,
            card=refit_card(details) if prepared else "",
        )


@dataclass
class Composition:
    """Sinks in the making; input 0 is the model, then one for each fitted layer."""

    job: Job
    prepared: Path | None
    experts: int
    width: int
    extra: dict[str, Checkpoint] = field(default_factory=dict)
    sinks: list[Sink] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    dropped: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.owner = {n: layer for layer in self.job.layers for n in layer.names}

    def run(self) -> None:
        """Every tensor of the model, in the order of its files."""
        begun: set[str] = set()
        for name in self.job.checkpoint.tensors:
            layer = self.owner.get(name)
            if layer is None:
                self._copied(name)
            elif layer.block not in begun:
                begun.add(layer.block)
                self._fitted(layer)

    def _copied(self, name: str) -> None:
        """A tensor as it is, in the output's dtype; routers keep their own."""
        info = self.job.checkpoint.tensors[name]
        router = any(name == r.name for layer in self.job.layers for r in layer.router)
        dtype = info.dtype if router else self.job.files(Path()).code(info.dtype)
        own: Source | Operation = Source(0, name)
        if dtype != info.dtype:
            method = tensor_method("passthrough")
            call = Call(name, info.shape, method.Merge(), (method.PerModel(),), has_base=False)
            own = Operation("passthrough", call, (Source(0, name),), None, Space.WEIGHT)
        self.sinks.append(Sink(name, dtype, info.shape, own, KEPT))

    def _fitted(self, layer: MoeLayer) -> None:
        prepared = self.prepared or Path()
        files, routers = self.job.files(self.job.method.layers_in(self.job, prepared)), {r.name for r in layer.router}
        outputs = list(layer.outputs(self.experts, self.width))
        if self.prepared is None:  # a bare plan, which computes nothing
            sources = tuple(Source(0, n) for n in sorted(layer.names))
            self.tasks.append(Task(self.job.method.name, layer.block, sources, (self.experts, self.width)))
        else:
            self.extra[layer.block] = open_file(files.path(layer), layer.block)
        for number, o in enumerate(outputs):
            router = o.name in routers
            dtype = o.dtype if router else files.code(o.dtype)
            planned = Result(len(self.tasks) - 1, number)
            value = planned if self.prepared is None else Source(len(self.extra), o.name)
            self.sinks.append(Sink(o.name, dtype, o.shape, value, ROUTER if router else FITTED))
        left = sorted(layer.names - {o.name for o in outputs})
        self.dropped += [(self.job.checkpoint.reference, n, "expert left out") for n in left]


KEPT = "copied: no part of a router or of a routed expert"
ROUTER = "fitted: the rows of a reduced layer's router"
FITTED = "fitted: neurons chosen, down projection refitted"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A small file that has its name only when it is complete."""
    partial = path.with_name(path.name + ".partial")
    fs.write_file(partial, (json.dumps(content, indent=1) + "\n").encode())
    fs.rename(partial, path)
