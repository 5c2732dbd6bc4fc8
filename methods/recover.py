"""Recover: one task of a bundle, as the model that it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lr.bundle.checked import CheckedDesk
from mergekit_lr.bundle.codes import fitting, get_code
from mergekit_lr.bundle.manifest import BASE, SHARED, Recovered
from mergekit_lr.bundle.open import Bundle, open_bundle
from mergekit_lr.checkpoint.dtypes import torch_dtype
from mergekit_lr.checkpoint.foreign_code import without_code
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.small_files import inside, read_config, read_plain
from mergekit_lr.engine.side_files import LARGEST_FILE, OTHER_FILES, TOKENIZER_FILES
from mergekit_lr.graph.nodes import Result, Sink, Task
from mergekit_lr.graph.nodes import Source as Tensor
from mergekit_lr.method import Base, Parameters, Source, parameter
from mergekit_lr.recipe import Recipe
from mergekit_lr.rewrite import Desk, Outline, Rewrite


@dataclass(frozen=True)
class _Call:
    """What a task's computation must know: the tensor, and what its parts must be."""

    wanted: str  # the `Recovered`, as JSON: hashable
    dtypes: tuple[str, ...]
    digests: tuple[str | None, ...]
    where: str


class Recover(Rewrite):
    r"""Recover one task from a bundle that a packing method wrote: the model folder that was packed, or nearly.

    Every tensor of the task is computed from the stored ones by the code that ``bundle.json`` names, for a bundle of
    ``tall_masks`` for instance ``base + m_t * tau`` in fp32, rounded once. Config and tokenizer are the bundle's.
    Stored tensors are compared with their digests while they are read. `mergekit-lr recover BUNDLE TASK OUT` is
    this recipe in one line.

    Source: this project's bundle format, docs/formats.md,
    https://github.com/mergekit-lr/mergekit_lr/blob/main/docs/formats.md.
    """

    name = "recover"
    summary = "one task of a bundle, as a model again"
    source = Source("bundle format", url="https://github.com/mergekit-lr/mergekit_lr/blob/main/docs/formats.md")
    base = Base.UNUSED
    max_models = 1
    reads_bundles = True

    class Merge(Parameters):
        task: str = parameter(description="name of the task, as the packing recipe gave it")
        base: str | None = parameter(
            None, description="where the base model is, for a bundle that does not hold it; by default where it was"
        )

    def outline(self, recipe: Recipe, inputs: Mapping[str, Checkpoint], prepared: Path | None) -> Outline:
        reference = str(recipe.models[0].reference)
        merge, _ = recipe.resolve("", 0.0)
        assert isinstance(merge, Recover.Merge)
        folder = inputs[reference].folder
        with open_bundle(folder or Path(reference), base=merge.base) as bundle:
            wanted = list(bundle.tensors(merge.task).values())
            outside = any(p.startswith(BASE) for w in wanted for p in w.parts)
            sinks, tasks = [], []
            for number, w in enumerate(wanted):
                tasks.append(_task(bundle, w, inputs[reference]))
                sinks.append(Sink(w.name, w.dtype, w.shape, Result(number, 0), f"recovered: {w.code}"))
            config, files = _shared_files(bundle.folder)
            edits = next(t.facts.get("config", {}) for t in bundle.manifest.tasks if t.name == merge.task)
            config = without_code({**config, **edits})[0] if config is not None else None
            extra = {}
            if outside:
                extra["base"] = bundle.base
                bundle.__dict__.pop("base")  # the engine closes it now
        models = (reference, *extra)
        return Outline(models, tuple(sinks), tuple(tasks), config=config, files=files, extra=extra)

    def compute(self, task: Task, desk: Desk) -> None:
        call: _Call = task.call
        plain = json.loads(call.wanted)
        wanted = Recovered(**plain | {"shape": tuple(plain["shape"]), "parts": tuple(plain["parts"])})
        dtypes = [torch_dtype(d) for d in call.dtypes]
        checked = CheckedDesk(desk, wanted.parts, dtypes, call.digests, call.where)
        with fitting(wanted, call.where):
            get_code(wanted.code).decode(wanted, checked)
        checked.check()


def _task(bundle: Bundle, wanted: Recovered, stored: Checkpoint) -> Task:
    found = [Tensor(1, p.removeprefix(BASE)) if p.startswith(BASE) else Tensor(0, p) for p in wanted.parts]
    sources = [bundle.base if t.model else stored for t in found]
    call = _Call(
        wanted=json.dumps(_plain(wanted), sort_keys=True),
        dtypes=tuple(c.tensors[t.tensor].dtype for c, t in zip(sources, found, strict=True)),
        digests=tuple(bundle.manifest.digests.get(p) for p in wanted.parts),
        where=str(bundle.folder),
    )
    return Task("recover", wanted.name, tuple(found), call, fixed=get_code(wanted.code).fixed(wanted), held=4)


def _plain(wanted: Recovered) -> dict[str, Any]:
    """The fields as plain data."""
    return {f: getattr(wanted, f) for f in ("name", "dtype", "shape", "code", "parts")} | {"call": dict(wanted.call)}


def _shared_files(folder: Path) -> tuple[dict[str, Any] | None, dict[str, bytes]]:
    """The config and the other small files that every task's model has."""
    shared = folder / SHARED
    if shared.is_symlink() or not shared.is_dir():
        return None, {}
    allowed = {*TOKENIZER_FILES, *OTHER_FILES}
    present = sorted(p.name for p in shared.iterdir() if p.name in allowed)
    files = {name: read_plain(shared, name, most=LARGEST_FILE) for name in present}
    path = inside(shared, "config.json")
    return read_config(path) if path.exists() else None, files
