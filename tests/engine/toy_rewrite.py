"""A toy method that lays out its own output: of each matrix the top half, scaled, and the packed signs of the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mergekit_lr.checkpoint.model import Checkpoint, open_file
from mergekit_lr.checkpoint.writer import write_safetensors
from mergekit_lr.graph.nodes import Result, Sink, Source, Task
from mergekit_lr.method import Base
from mergekit_lr.method import Source as Paper
from mergekit_lr.recipe import Recipe
from mergekit_lr.rewrite import Desk, Outline, Preparation, Rewrite, model_order

FORGET = False


class Halves(Rewrite):
    name = "halves"
    summary = "a toy"
    source = Paper("none")
    base = Base.UNUSED
    max_models = 1
    prepares = True

    def prepare(self, work: Preparation) -> None:
        path = work.folder / "factor.safetensors"
        if not path.exists():
            write_safetensors(path, {"factor": torch.tensor([3.0])})
        work.tell(1, 1, "preparing")

    def outline(self, recipe: Recipe, inputs: Mapping[str, Checkpoint], prepared: Path | None) -> Outline:
        [name] = models = model_order(recipe)
        model = inputs[name]
        matrices = [t for t in model.tensors.values() if len(t.shape) == 2]
        sinks, tasks = kept(0, model, [n for n, t in model.tensors.items() if len(t.shape) < 2], "copied: a vector"), []
        extra = {}
        if prepared is not None:
            extra["prepared"] = open_file(prepared / "factor.safetensors", "prepared")
            models = [*models, "prepared"]
        for number, t in enumerate(matrices):
            stem = t.name.removesuffix(".weight")
            factor = (Source(1, "factor"),) if prepared else ()
            tasks.append(Task("halves", stem, (Source(0, t.name), *factor), call=t.shape, held=3))
            rows, columns = t.shape
            sinks.append(Sink(f"{stem}.top", t.dtype, (rows // 2, columns), Result(number, 0), "halved"))
            sinks.append(Sink(f"{stem}.signs", "U8", (rows * columns // 8,), Result(number, 1), "halved"))
        return Outline(
            tuple(models),
            tuple(sinks),
            tuple(tasks),
            dropped=tuple((name, t.name, "replaced by its halves") for t in matrices),
            config={**(model.config or {}), "halved": True},
            extra=extra,
            warnings=() if prepared else ("the factor is not known before the merge",),
            details={"factor": 3.0},
        )

    def compute(self, task: Task, desk: Desk) -> None:
        rows, columns = task.call
        factor = desk.read(1)
        half, n = rows // 2 * columns, rows * columns
        for start in range(0, n, desk.step):
            stop = min(n, start + desk.step)
            x = desk.read(0, start, stop)
            if start < half and not FORGET:
                desk.write(0, x[: half - start] * factor, start)
            bits = (x > 0).to(torch.uint8).reshape(-1, 8) << torch.arange(8, dtype=torch.uint8)
            desk.write(1, bits.sum(1, dtype=torch.uint8), start // 8)
        desk.note({"elements": n})

    def files(self, recipe: Recipe, report: Mapping[str, Any]) -> dict[str, bytes]:
        return {"extra/note.txt": f"{len(report['tensors'])} tensors written".encode()}


def registered(patch: Callable[[Any, str, Any], None]) -> None:
    """Let the registry find the toy, through ``patch(object, attribute, value)``."""
    import mergekit_lr.registry as registry

    found = registry._by_file_name
    patch(registry, "_by_file_name", lambda name: Halves() if name == "halves" else found(name))


def kept(model: int, checkpoint: Checkpoint, names: Sequence[str], rule: str) -> list[Sink]:
    """Tensors that are written as they are, byte for byte."""
    found = [checkpoint.tensors[n] for n in names]
    return [Sink(t.name, t.dtype, t.shape, Source(model, t.name), rule) for t in found]
