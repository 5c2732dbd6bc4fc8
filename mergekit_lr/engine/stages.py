"""Opens what an earlier stage of a recipe makes as a model that a later one reads.

A stage is *streamed* where any piece of its output can be computed by itself: its model then exists only as numbers
that are asked for, computed as they would have been written, rounding included. Otherwise, and where the later stage
would repeat a costly search of the earlier one, or reads single rows, it is *written* once under
``OUT.partial/stages``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mergekit_lr.checkpoint.dtypes import ITEM_BYTES, torch_dtype
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.layout import nbytes_of
from mergekit_lr.checkpoint.model import Checkpoint, open_folder
from mergekit_lr.checkpoint.open import adapted
from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.engine.evaluate import Evaluator
from mergekit_lr.engine.job import Inputs
from mergekit_lr.engine.memory import worker_bytes
from mergekit_lr.engine.units import slicing_of
from mergekit_lr.errors import ResourceError, UsageError
from mergekit_lr.graph.nodes import MergeGraph, Sink, Source, operation_of
from mergekit_lr.lazy import torch
from mergekit_lr.method import GRID, Declared, Method, Slicing
from mergekit_lr.recipe import Recipe
from mergekit_lr.registry import tensor_method

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lr.engine.plan import Plan

Write: TypeAlias = Callable[[str, Recipe], tuple[Path, str]]
"""Makes a stage's model on disk, given its name: the folder, and the digest of the run that made it."""


@dataclass
class _Room:
    """Scratch for the values of one request. Satisfies `engine.evaluate.Tally`."""

    dtype: torch.dtype
    held: Tensor | None = None
    largest: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)

    def buffer(self, elements: int) -> Tensor:
        if self.held is None or self.held.numel() < elements:
            self.held = torch.empty(elements, dtype=self.dtype)
        return self.held[:elements]


@dataclass
class StagedCheckpoint(Checkpoint):
    """The model that a stage would write, computed while it is read. ``plan``: how."""

    plan: Plan = field(kw_only=True, repr=False)
    inside: Inputs = field(kw_only=True, repr=False)
    _sinks: dict[str, Sink] = field(default_factory=dict, repr=False)
    _order: dict[str, int] = field(default_factory=dict, repr=False)
    _local: threading.local = field(default_factory=threading.local, repr=False)
    _home: Path | None = field(default=None, repr=False)

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Elements ``start .. stop`` of the flattened tensor, 1-D, in the dtype in which the stage would write it."""
        sink = self._sinks[name]
        dtype = torch_dtype(sink.dtype)
        nbytes = (stop - start) * dtype.itemsize
        if buffer is None or buffer.numel() < nbytes:
            buffer = torch.empty(nbytes, dtype=torch.uint8)
        out = buffer[:nbytes].view(dtype) if nbytes else torch.empty(0, dtype=dtype)
        operation = operation_of(sink.value)
        if operation is None:
            assert isinstance(sink.value, Source)
            source = sink.value
            return self.inside.checkpoints[source.model].read(source.tensor, start, stop, buffer)
        if start < stop:
            # Pieces lie on a fixed grid, so that a value is the same whoever asks for it.
            first = start // GRID * GRID
            last = min(sink_elements(sink), -(-stop // GRID) * GRID)
            for at, values in self._evaluator().merged(sink, operation, first, last, self._room(dtype)):
                a, b = max(start, at), min(stop, at + values.numel())
                out[a - start : b - start] = values[a - at : b - at]
        return out

    def _evaluator(self) -> Evaluator:
        """This thread's own; after a fork, a copy of it."""
        found: Evaluator | None = getattr(self._local, "evaluator", None)
        if found is None:
            found = self._local.evaluator = Evaluator(self.inside)
        return found

    def _room(self, dtype: torch.dtype) -> _Room:
        rooms: dict[torch.dtype, _Room] = self._local.__dict__.setdefault("rooms", {})
        return rooms.setdefault(dtype, _Room(dtype))

    def settle(self, piece: int, read: int) -> None:
        """Work in pieces of the size that the outermost run chose."""
        self.inside.piece, self.inside.read = piece, read
        for stage in streamed(self.plan.inputs.values()):
            stage.settle(piece, read)

    def report_to(self, run: Inputs) -> None:
        """Let warnings of this stage, and of those under it, go where those of the run go."""
        self.inside.told = run
        for stage in streamed(self.plan.inputs.values()):
            stage.report_to(run)

    def bytes_held(self, piece: int, read: int) -> int:
        """What one worker holds for this stage and for those under it."""
        graph = self.plan.graph
        own = max((worker_bytes(graph, s, piece, read) for s in graph.sinks), default=0)
        return own + held_for_stages(self.plan.inputs.values(), piece, read)

    def reads(self, name: str) -> tuple[Path, ...]:
        """Files of the stage's own inputs that the tensor is computed from."""
        sources = self.plan.graph.sources(self._sinks[name])
        inputs = [self.plan.inputs[file] for file in self.plan.graph.files]
        return tuple(path for model, tensor in sources for path in inputs[model].reads(tensor))

    def file_position(self, name: str) -> tuple[str, int]:
        """The order in which the stage has its tensors."""
        return "", self._order[name]

    def changed(self) -> list[str]:
        """Files of the stage's own inputs that changed."""
        return [path for m in self.plan.graph.files for path in self.plan.inputs[m].changed()]

    def identity(self) -> list[list[Any]]:
        """The run that would make it."""
        return [[self.reference, 0, 0, self.made_by]]

    def places(self) -> list[Path]:
        """Where the inputs of the stage lie."""
        return [path for checkpoint in self.plan.inputs.values() for path in checkpoint.places()]

    def close(self) -> None:
        """Forget the small files; the stage's own inputs are closed by whoever opened them."""
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
            self._home = None


def sink_elements(sink: Sink) -> int:
    """How many elements an output has."""
    return nbytes_of(sink) // ITEM_BYTES[sink.dtype]


def streamed(checkpoints: Iterable[Checkpoint]) -> Iterator[StagedCheckpoint]:
    """The streamed stages among inputs, those under an adapter or another vocabulary too."""
    for checkpoint in checkpoints:
        if isinstance(checkpoint, StagedCheckpoint):
            yield checkpoint
        else:
            yield from streamed(checkpoint.beneath)


def held_for_stages(checkpoints: Iterable[Checkpoint], piece: int, read: int) -> int:
    """Bytes that one worker holds for every streamed stage among its inputs."""
    return sum(stage.bytes_held(piece, read) for stage in streamed(checkpoints))


def searches(graph: MergeGraph) -> bool:
    """Whether some tensor of the graph is looked at before it is merged."""
    if graph.artifacts:
        return True
    for operation in graph.operations:
        statistics = tensor_method(operation.method).statistics(operation.call, None)
        if statistics is not None:
            statistics.close()
            return True
    return False


def streamable(plan: Plan) -> bool:
    """Any piece of the stage's output can be had by itself."""
    if plan.outline is not None or plan.graph.artifacts or not isinstance(plan.recipe.method, Method):
        return False
    return all(slicing_of(s) is Slicing.ELEMENTWISE for s in plan.graph.sinks)


def often_read(method: Declared) -> bool:
    """Whether a method looks at its inputs several times, or in an order of its own."""
    if not isinstance(method, Method):
        return True
    return type(method).statistics is not Method.statistics or type(method).model_statistics is not (
        Method.model_statistics
    )


def open_stage(
    reference: ModelReference,
    name: str,
    recipe: Recipe,
    user: Recipe,
    stack: ExitStack,
    plan: Callable[[Recipe], AbstractContextManager[Plan]],
    write: Write | None,
    *,
    headers_only: bool,
) -> Checkpoint:
    """The model of stage ``name``, which ``user`` reads under ``reference``; closed with ``stack``.

    Raises:
        UsageError: the stage must be written, and there is no place for it.
    """
    laid_out = stack.enter_context(plan(recipe))
    made_by = hashlib.sha256(json.dumps(laid_out.fingerprint(), sort_keys=True).encode()).hexdigest()
    if laid_out.kind != "model":
        raise UsageError(
            f"the stage {name!r} makes a {laid_out.kind}, not a model",
            where=str(recipe.origin or "recipe"),
            fix=f"use it in a run of its own, with --stage {name}",
        )
    # Another vocabulary picks rows here and there, which a piece at a time is slow to give.
    often = user.tokenizer is not None or (searches(laid_out.graph) and often_read(user.method))
    stream = streamable(laid_out) and not often
    if stream or headers_only:
        opened: Checkpoint = _staged(str(reference), laid_out, made_by)
        laid_out.how = "streamed" if stream else "written first"
    elif write is None:
        raise UsageError(
            f"the stage {name!r} must be written before it can be used",
            where=str(recipe.origin or "recipe"),
            why=f"{recipe.merge_method} gives no piece of its output by itself",
            fix=f"make it first: merge RECIPE FOLDER --stage {name}, and name that FOLDER instead",
        )
    else:
        laid_out.how = "written first"
        folder, made_by = write(name, recipe)
        opened = open_folder(folder, str(reference))
        opened.made_by = made_by
    stack.callback(opened.close)
    opened.stage = laid_out
    return adapted(opened, reference)


def _staged(reference: str, plan: Plan, made_by: str) -> StagedCheckpoint:
    tensors, order = {}, {}
    for position, sink in enumerate(plan.graph.sinks):
        tensors[sink.name] = TensorInfo(sink.name, sink.dtype, sink.shape, 0, nbytes_of(sink))
        order[sink.name] = position
    inside = Inputs(
        graph=plan.graph,
        inputs=plan.inputs,
        device=plan.device,
        piece=plan.budget.piece,
        read=plan.budget.read,
        nonfinite=plan.recipe.nonfinite,
    )
    home = _small_files(plan)
    return StagedCheckpoint(
        reference,
        home,
        None if plan.config is None else json.loads(plan.config),
        tensors,
        dict.fromkeys(tensors, Path(reference)),
        (),
        plan=plan,
        made_by=made_by,
        inside=inside,
        _sinks={s.name: s for s in plan.graph.sinks},
        _order=order,
        _home=home,
    )


def _small_files(plan: Plan) -> Path | None:
    """Tokenizer and other small files of a streamed stage in a folder of their own, for whoever looks into folders."""
    files = dict(plan.files)
    if plan.config is not None:
        files["config.json"] = plan.config
    if not files:
        return None
    home: Path | None = None
    try:
        home = Path(tempfile.mkdtemp(prefix="mergekit_lr-stage-"))
        for name, data in files.items():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_bytes(data)
    except OSError as e:
        if home is not None:
            shutil.rmtree(home, ignore_errors=True)
        raise ResourceError(
            "cannot keep a stage's small files",
            where=str(home or tempfile.gettempdir()),
            why=e.strerror or str(e),
            fix="set TMPDIR to a folder that can be written and has some room",
        ) from e
    return home


def staged_plans(checkpoints: Iterable[Checkpoint]) -> list[tuple[str, Plan]]:
    """``(name, plan)`` of every stage among the inputs and under them, each after those that it needs."""
    found: dict[str, Plan] = {}
    for checkpoint in checkpoints:
        found.update(staged_plans(checkpoint.beneath))
        plan = checkpoint.stage
        if plan is not None:
            found.update(staged_plans(plan.inputs.values()))
            found.setdefault(checkpoint.reference.partition("+")[0], plan)
    return list(found.items())
