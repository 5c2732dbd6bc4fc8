"""Everything that is known of a merge before a weight is read."""

from __future__ import annotations

import gc
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from mergekit_lr.bundle.manifest import FILE as BUNDLE
from mergekit_lr.checkpoint.layout import Layout, lay_out
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.open import open_model
from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.checkpoint.store import ShardStore
from mergekit_lr.engine.beside import code_beside, files_beside
from mergekit_lr.engine.code_files import CodeFile, refuse_kind
from mergekit_lr.engine.describe import describe, in_words
from mergekit_lr.engine.memory import Budget, make_budget
from mergekit_lr.engine.output_files import kind_of, output_files
from mergekit_lr.engine.stages import Write, held_for_stages, open_stage, searches, staged_plans, streamed
from mergekit_lr.engine.tied_heads import refuse_untied_heads
from mergekit_lr.engine.units import Unit, slicing_of, units_of
from mergekit_lr.errors import CheckpointError
from mergekit_lr.graph.build import build_graph
from mergekit_lr.graph.companions import open_companions
from mergekit_lr.graph.nodes import MergeGraph, Result, Sink
from mergekit_lr.graph.places import refuse_partial_ranges
from mergekit_lr.graph.summary import Block, summarise
from mergekit_lr.pieces import element_count
from mergekit_lr.recipe import Recipe, load_recipe
from mergekit_lr.recipe.stages import stage_of
from mergekit_lr.rewrite import Kind, Outline, Rewrite
from mergekit_lr.sizes import parse_size
from mergekit_lr.tokenizer.align import Tokens, align, refuse_where_unused
from mergekit_lr.tokenizer.compare import check_vocabularies
from mergekit_lr.tokenizer.source import open_source

DEFAULT_SHARD = "5GB"


@dataclass(frozen=True)
class Settings:
    """How a run was asked to work. ``device`` is chosen; ``shard_size`` in bytes; ``copy_code``: see `code_files`."""

    device: str
    max_memory: str | int | None
    threads: int | None
    shard_size: int
    copy_code: bool = False

    @property
    def limit(self) -> int | None:
        return None if self.max_memory is None else parse_size(self.max_memory)


@dataclass
class Plan:
    """A merge, laid out: what is read, computed and written, and what it costs. Holds its inputs open.

    ``how``: what becomes of the output of a plan that is a stage of another.
    """

    recipe: Recipe
    inputs: dict[str, Checkpoint]
    graph: MergeGraph
    layout: Layout
    budget: Budget
    units: list[Unit]
    device: str
    config: bytes | None
    files: dict[str, bytes]
    settings: Settings
    warnings: list[str] = field(default_factory=list)
    outline: Outline | None = None
    prepared: Path | None = None
    bandwidth: int | None = None
    tokens: Tokens | None = None
    how: str = ""
    code: Sequence[CodeFile] = ()

    @property
    def stages(self) -> list[tuple[str, Plan]]:
        """Every stage under this plan by its name, each after those that it needs."""
        return staged_plans(self.inputs.values())

    @property
    def kind(self) -> Kind:
        """What is written: a model, an adapter, or a bundle with the small files of models under ``shared/``."""
        return kind_of(self.recipe)

    @property
    def bytes_in(self) -> int:
        """Bytes read once over; methods with statistics read their inputs again."""
        tensors = [self.inputs[file].tensors for file in self.graph.files]
        total = 0
        for sink in self.graph.sinks:
            if first_result(sink):
                total += sum([tensors[model][name].nbytes for model, name in self.graph.sources(sink)])
        return total

    @property
    def parameters(self) -> int:
        return sum(element_count(s.shape) for s in self.graph.sinks)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the output's bytes. A run is resumed only under the same fingerprint."""
        from mergekit_lr import __version__

        source = inspect.getsource(type(self.recipe.method))
        return {
            "version": __version__,
            "recipe": self.recipe.digest(),
            "method": hashlib.sha256(source.encode()).hexdigest(),
            "graph": self.graph.digest,
            "inputs": {m: self._identity(self.inputs[m]) for m in self.graph.files},
            "files": files_beside(self.recipe, self._theirs()),
            "shards": [[s.file, s.size] for s in self.layout.shards],
            "device": self.device.partition(":")[0],
            **({"code": {c.name: c.sha256 for c in self.code}} if self.settings.copy_code else {}),
        }

    def _theirs(self) -> dict[str, Checkpoint]:
        """The inputs that were there before; what this run prepared itself is identified by what it was made from."""
        return {m: self.inputs[m] for m in self.graph.files if not self._own(self.inputs[m])}

    def _own(self, checkpoint: Checkpoint) -> bool:
        if self.prepared is None:
            return False
        folder = self.prepared.resolve()  # as the stamps are, however the output was named
        return all(Path(s.path).is_relative_to(folder) for s in checkpoint.stamps)

    def _identity(self, checkpoint: Checkpoint) -> list[list[Any]]:
        """An input's identity; what this run prepared itself may have been written again since, to the same bytes."""
        found = checkpoint.identity()
        return [[name, size, header] for name, size, _, header in found] if self._own(checkpoint) else found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `plan --json` prints it. Sizes in bytes."""
        return describe(self)

    def summary_lines(self) -> list[str]:
        """The plan in words."""
        return in_words(describe(self))

    @cached_property
    def blocks(self) -> list[Block]:
        """The graph summarised by layer."""
        return summarise(self.graph, [self.inputs[file].tensors for file in self.graph.files])


def choose_device(device: str) -> str:
    """``auto`` is a GPU where there is one."""
    from mergekit_lr.errors import UsageError

    if device == "cpu":
        return "cpu"
    if device == "auto" and not may_have_gpu():
        return "cpu"
    import torch

    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if kind != "cuda" or (number and not number.isdigit()):
        raise UsageError(f"device {device!r} is not known", fix="use auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available() or int(number or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {device!r} is not there", fix="use --device auto or cpu")
    return f"cuda:{int(number or 0)}"


def may_have_gpu() -> bool:
    """Whether it is worth importing torch to ask: on Linux every driver leaves a device file."""
    return sys.platform != "linux" or any(Path("/dev", name).exists() for name in ("nvidiactl", "dxg", "kfd"))


@contextmanager
def planned(
    recipe: Recipe | str | Path | dict[str, Any],
    *,
    device: str = "auto",
    max_memory: str | int | None = None,
    threads: int | None = None,
    shard_size: str | int = DEFAULT_SHARD,
    allow_pickle: bool = False,
    headers_only: bool = False,
    elsewhere: bool = False,
    prepare: Prepare | None = None,
    store: ShardStore | None = None,
    verify: bool = False,
    write: Write | None = None,
    copy_code: bool = False,
) -> Iterator[Plan]:
    """Open the inputs, check them against each other, and lay everything out.

    With ``headers_only`` a Hub model's weights are not downloaded, and the plan cannot be run. Without it, heads that
    a tied reference has no place for are compared with their model's embeddings. ``store`` keeps the shards of Hub
    models that are fetched one by one. ``verify``: downloads are compared with the Hub's digests. ``prepare`` is
    called for a method that must find something out first, and returns the folder in which it kept that; ``write`` for
    a stage whose output cannot be read before it is written. ``elsewhere``: other machines will compute, so the device
    is not looked for on this one. ``copy_code``: Python files of the model are carried over.

    Raises:
        RecipeError: the recipe is not valid.
        CheckpointError: an input is missing or damaged, or they do not fit each other.
        ResourceError: the memory budget is too small for a tensor that cannot be cut.
    """
    loaded = load_recipe(recipe)

    def stage(one: Recipe) -> AbstractContextManager[Plan]:
        return planned(
            one,
            device=device,
            max_memory=max_memory,
            threads=threads,
            shard_size=shard_size,
            allow_pickle=allow_pickle,
            headers_only=headers_only,
            store=store,
            elsewhere=elsewhere,
            verify=verify,
            write=write,
            copy_code=copy_code,
        )

    with ExitStack() as stack:
        opening = _Opening(loaded, stack, allow_pickle, headers_only, store, verify, stage, write)
        with _without_collector():
            inputs = opening.all()
            inputs, tokens = align(loaded, inputs, _tokenizer(loaded, inputs, opening))
            refuse_where_unused(loaded, tokens, kind_of(loaded))
        if copy_code:  # before anything is prepared, too
            refuse_kind(kind_of(loaded))
            code_beside(loaded, inputs)
        where = device if elsewhere else choose_device(device)
        settings = Settings(where, max_memory, threads, parse_size(shard_size), copy_code)
        prepared = None
        if prepare is not None and isinstance(loaded.method, Rewrite) and loaded.method.prepares:
            # What does not fit is found before anything is prepared, and before the output's place is taken.
            for opened in loaded.method.outline(loaded, inputs, None).extra.values():
                opened.close()
            prepared = prepare(loaded, inputs, settings)
        with _without_collector():
            plan = _lay_out(loaded, inputs, settings, prepared, tokens)
            for name in plan.inputs.keys() - inputs.keys():
                stack.callback(plan.inputs[name].close)
        if not headers_only:
            refuse_untied_heads(plan.graph, plan.inputs)
        yield plan


@contextmanager
def _without_collector() -> Iterator[None]:
    """Planning makes a million small objects and no cycles; the cyclic collector would take half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass
class _Opening:
    """Opens every model that a recipe names, by what it calls it; all are closed with ``stack``."""

    recipe: Recipe
    stack: ExitStack
    allow_pickle: bool
    headers_only: bool
    store: ShardStore | None
    verify: bool
    plan: Callable[[Recipe], AbstractContextManager[Plan]]
    write: Write | None

    def all(self) -> dict[str, Checkpoint]:
        recipe, inputs = self.recipe, {}
        for reference in recipe.references():
            opened = self.one(reference)
            _check_kind(opened, reads_bundles=isinstance(recipe.method, Rewrite) and recipe.method.reads_bundles)
            inputs[str(reference)] = opened
        beside = open_companions(recipe)
        for checkpoint in beside.values():
            self.stack.callback(checkpoint.close)
        return inputs | beside

    def one(self, reference: ModelReference) -> Checkpoint:
        stage = stage_of(self.recipe, reference)
        if stage is not None:
            return open_stage(
                reference, *stage, self.recipe, self.stack, self.plan, self.write, headers_only=self.headers_only
            )
        opened = open_model(
            reference,
            allow_pickle=self.allow_pickle,
            headers_only=self.headers_only,
            store=self.store,
            verify=self.verify,
        )
        self.stack.callback(opened.close)
        return opened


def _tokenizer(recipe: Recipe, inputs: Mapping[str, Checkpoint], opening: _Opening) -> Checkpoint:
    """The model that the output's tokenizer comes from; one that is not merged is opened for its small files."""
    source = recipe.tokenizer_source
    if str(source) in inputs:
        return inputs[str(source)]
    if stage_of(recipe, source) is not None:
        return opening.one(source)
    opened = open_source(source)
    opening.stack.callback(opened.close)
    return opened


def _check_kind(opened: Checkpoint, *, reads_bundles: bool) -> None:
    """A bundle's tensors have names and shapes like a model's: refuse to merge them by mistake."""
    if opened.folder is not None and (opened.folder / BUNDLE).exists() and not reads_bundles:
        raise CheckpointError(
            "this is a bundle, not a model",
            where=opened.reference,
            why=f"it holds {BUNDLE}",
            fix=f"recover one of its tasks first: mergekit-lr recover {opened.reference} TASK OUT",
        )


Prepare: TypeAlias = Callable[[Recipe, dict[str, Checkpoint], Settings], Path]


def _lay_out(
    recipe: Recipe, inputs: dict[str, Checkpoint], settings: Settings, prepared: Path | None, tokens: Tokens | None
) -> Plan:
    method, outline = recipe.method, None
    refuse_partial_ranges(recipe, inputs)
    if isinstance(method, Rewrite):
        outline = method.outline(recipe, inputs, prepared)
        inputs = {**inputs, **outline.extra}
        graph = MergeGraph(outline.models, outline.sinks, outline.dropped, (), outline.tasks)
    else:
        graph = build_graph(recipe, inputs)
    merged = [inputs[m] for m in graph.models if outline is None or m not in outline.extra]
    if tokens is None and not (isinstance(method, Rewrite) and method.aligns_tokens):
        check_vocabularies(merged)
    kind = kind_of(recipe)
    stem = "adapter_model" if kind == "adapter" else kind
    layout = lay_out(graph.sinks, sys.maxsize if kind == "adapter" else settings.shard_size, stem)
    slicing = {i: slicing_of(s) for i, s in enumerate(graph.sinks)}
    used = [inputs[m] for m in graph.files]
    budget = make_budget(
        graph,
        slicing,
        settings.limit,
        settings.threads,
        settings.device,
        lambda piece, read: held_for_stages(used, piece, read),
    )
    for stage in streamed(used):
        stage.settle(budget.piece, budget.read)
    searched = {i for i, c in enumerate(used) for stage in streamed([c]) if searches(stage.plan.graph)}
    laid_beside = output_files(recipe, inputs, graph, merged, outline, tokens, settings.copy_code)
    config, files, warnings, code = laid_beside
    if kind == "adapter":
        config, files = None, {}
    if kind == "bundle":
        files = {f"shared/{name}": data for name, data in files.items()}
    if outline is not None:
        files |= outline.files
        warnings += outline.warnings
    units = units_of(graph, budget.threads, searched)
    laid = (recipe, inputs, graph, layout, budget, units, settings.device, config, files, settings, warnings)
    return Plan(*laid, outline, prepared, tokens=tokens, code=code)


def first_result(sink: Sink) -> bool:
    """Whether a sink is the one that its task's inputs are counted for."""
    return not isinstance(sink.value, Result) or sink.value.index == 0
