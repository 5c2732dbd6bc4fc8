"""What packing methods share when they lay out a bundle: task names, what is stored verbatim, the table of sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lr.bundle.manifest import Entry, Manifest
from mergekit_lr.bundle.manifest import Task as Packed
from mergekit_lr.checkpoint.dtypes import AVERAGED, RECIPE_DTYPES
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.layout import nbytes_of
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import RecipeError
from mergekit_lr.graph.build import refuse_quantised
from mergekit_lr.graph.nodes import Sink, Source, Task
from mergekit_lr.recipe import ModelEntry, Recipe
from mergekit_lr.rewrite import Outline, model_order

_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")


def task_names(entries: Sequence[ModelEntry]) -> list[str]:
    """What each model is called in the bundle: its ``name``, or the last part of its path (of its adapter's).

    Raises:
        RecipeError: two models would have one name.
    """
    names: list[str] = []
    for entry in entries:
        place = entry.reference.adapter or entry.reference.model
        short = _UNFIT.sub("-", Path(place.path).name.removesuffix(".safetensors")).strip("-.")[:64]
        name = entry.name or short or "task"
        if name in names:
            raise RecipeError(
                f"two models would be called {name!r} in the bundle",
                where="models",
                fix="give each a `name:` of its own",
            )
        names.append(name)
    return names


def identity(checkpoint: Checkpoint) -> list[list[Any]]:
    """``[file, bytes, sha256 of the header]`` of a model's files: what tells one revision from another."""
    return [[name, size, header] for name, size, _, header in checkpoint.identity()]


class BundleLayout:
    """What a bundle of full fine-tunes stores: tensor by tensor of the base, then what only tasks have.

    ``tasks_of``: each task's checkpoint by name; ``numbers``: its index among ``models``, the base's being 0. A tensor
    that a task has in the base's shape is given to ``encode`` with all such tasks; any other is stored verbatim.
    """

    def __init__(self, recipe: Recipe, inputs: Mapping[str, Checkpoint]) -> None:
        entries = recipe.groups[0].inputs
        references = dict(zip(task_names(entries), (str(e.reference) for e in entries), strict=True))
        self.recipe, self.models = recipe, model_order(recipe)
        refuse_quantised([inputs[m] for m in self.models])
        self.base = inputs[self.models[0]]
        self.references = references
        self.tasks_of = {t: inputs[r] for t, r in references.items()}
        self.numbers = {t: self.models.index(r) for t, r in references.items()}
        self.sinks: list[Sink] = []
        self.tasks: list[Task] = []
        self.entries: list[Entry] = []
        self.dropped: list[tuple[str, str, str]] = []

    def run(self, encode: Callable[[BundleLayout, TensorInfo, list[str]], None]) -> None:
        """Lay out every tensor."""
        for name, info in self.base.tensors.items():
            alike = [t for t, c in self.tasks_of.items() if _alike(info, c.tensors.get(name))]
            if alike:
                encode(self, info, alike)
            else:
                self.dropped.append((self.models[0], name, "no task has it as the base does"))
            for t in self.tasks_of:
                if t not in alike:
                    self._verbatim(t, name)
        for t, checkpoint in self.tasks_of.items():
            for name in checkpoint.tensors:
                if name not in self.base.tensors:
                    self._verbatim(t, name)

    def dtype(self, info: TensorInfo) -> str:
        """What the recovered tensor is written as."""
        return RECIPE_DTYPES[self.recipe.output_dtype] if self.recipe.output_dtype else info.dtype

    def sources(self, name: str, tasks: Sequence[str]) -> tuple[Source, ...]:
        """The base's tensor and those of tasks."""
        return (Source(0, name), *(Source(self.numbers[t], name) for t in tasks))

    def stored_dtypes(self, name: str, tasks: Sequence[str]) -> tuple[str, ...]:
        return tuple(c.tensors[name].dtype for c in (self.base, *(self.tasks_of[t] for t in tasks)))

    def outline(self, method: str) -> Outline:
        """Everything as the engine wants it."""
        storage = storage_table(self.sinks, list(self.tasks_of.values()))
        packed = [Packed(t, r, {"files": identity(self.tasks_of[t])}) for t, r in self.references.items()]
        manifest = Manifest(
            method=method,
            tasks=tuple(packed),
            parameters=self.recipe.canonical()["parameters"],
            base={"model": self.models[0], "files": identity(self.base)},
            entries=tuple(self.entries),
            storage=storage,
        )
        return Outline(
            tuple(self.models),
            tuple(self.sinks),
            tuple(self.tasks),
            dropped=tuple(self.dropped),
            details={"storage": storage},
            bundle=manifest,
        )

    def _verbatim(self, task: str, name: str) -> None:
        checkpoint = self.tasks_of[task]
        if name not in checkpoint.tensors:
            return
        own, info = checkpoint.tensors[name], self.base.tensors.get(name)
        why = "the base does not have it" if info is None else "its shape is not the base's"
        if own.dtype not in AVERAGED:
            why = f"{own.dtype} is not averaged"
        sink, entry = verbatim(task, self.numbers[task], checkpoint, name, why)
        self.sinks.append(sink)
        self.entries.append(entry)


def _alike(info: TensorInfo, own: TensorInfo | None) -> bool:
    return own is not None and own.shape == info.shape and {own.dtype, info.dtype} <= AVERAGED


def verbatim(task: str, model: int, checkpoint: Checkpoint, name: str, why: str) -> tuple[Sink, Entry]:
    """A tensor that is stored as it is for one task."""
    info = checkpoint.tensors[name]
    stored = f"own/{task}/{name}"
    sink = Sink(stored, info.dtype, info.shape, Source(model, name), f"stored verbatim: {why}")
    return sink, Entry(name, info.dtype, info.shape, "copy", (), {task: (stored,)})


def storage_table(sinks: Iterable[Sink], models: Sequence[Checkpoint]) -> dict[str, Any]:
    """Bytes and bits of each kind of stored tensor (the first part of its name), beside the models unpacked.

    ``ratio``: stored bytes over those of the packed models; headers and small files are not counted.
    """
    kinds: dict[str, int] = {}
    for sink in sinks:
        kind = sink.name.partition("/")[0]
        kinds[kind] = kinds.get(kind, 0) + nbytes_of(sink)
    total = sum(kinds.values())
    unpacked = sum(t.nbytes for m in models for t in m.tensors.values())
    return {
        "bytes": {**kinds, "total": total},
        "bits": {**{k: 8 * n for k, n in kinds.items()}, "total": 8 * total},
        "unpacked_bytes": unpacked,
        "ratio": round(total / unpacked, 6) if unpacked else 0.0,
    }


def storage_lines(storage: Mapping[str, Any]) -> list[str]:
    """The table for people: one kind a line, in bytes and in bits."""
    rows = [f"  {kind:<10} {n:>18,} bytes {8 * n:>20,} bits" for kind, n in storage.get("bytes", {}).items()]
    return [
        *rows,
        f"  {'unpacked':<10} {storage.get('unpacked_bytes', 0):>18,} bytes, ratio {storage.get('ratio', 0):.4f}",
    ]
