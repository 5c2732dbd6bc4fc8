"""Quantized: pack task models as one center and, for each task, its offsets in a few bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from mergekit_lr.bundle.bits import stream_bytes
from mergekit_lr.bundle.manifest import Entry
from mergekit_lr.bundle.packing import BundleLayout
from mergekit_lr.bundle.quantized import Quantizing, groups_of, quantize_tensor, rows_of
from mergekit_lr.checkpoint.dtypes import ITEM_BYTES
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.graph.nodes import Result, Sink, Task
from mergekit_lr.method import GRID, Base, Parameters, Source, parameter
from mergekit_lr.recipe import Recipe
from mergekit_lr.rewrite import Desk, Kind, Outline, Rewrite


class Quantized(Rewrite):
    r"""Quantized: a bundle of one center and each task's offsets from it, rounded to a few bits.

    The center C is the mean of the tasks' weights (``center: mean``; the base is then not kept) or the base. It is
    stored in the output's dtype, and the offsets ``W_t - C`` are taken from it as it is stored. A row of a tensor is
    cut into groups of ``group`` neighbours, each with one bf16 scale s; an entry is one of ``2^bits`` levels,

        W_t = C + s (code - zero),   zero = 2^(bits - 1), with one or two bits (2^bits - 1) / 2,

    the nearest to its offset. s is the smallest that leaves every entry within s / 2 (``scale: covering``), or one that
    is fitted by squared error. Tensors of fewer than two dimensions, and those that would not become smaller, are
    stored exactly. Size: ``(1 + T (bits + 16 / group) / 16) / T`` of T bf16 models. Elementwise in fp32; each input is
    read once.

    Source: Kim et al., "Task vector quantization for memory-efficient model merging", ICCV 2025, arXiv:2503.06921, of
    which this is a variant: groups with a scale each, and its residual form's shared part in the center.
    """

    name = "quantized"
    summary = "pack task models: one center, and each task's offsets from it in a few bits"
    source = Source("Task vector quantization", arxiv="2503.06921")
    base = Base.REQUIRED
    settings = frozenset({"names"})
    kind: ClassVar[Kind] = "bundle"

    class Merge(Parameters):
        group: int = parameter(64, ge=8, le=GRID, description="neighbours in a row that share one bf16 scale")
        scale: Literal["covering", "squares"] = parameter(
            "covering",
            description="a group's scale: the smallest that leaves no offset off by more than half a step, or that of "
            "least squared error; one bit always takes the second",
        )
        center: Literal["mean", "base"] = parameter(
            "mean", description="what offsets are taken from: the mean of the tasks, or the base, which is then kept"
        )

    class PerModel(Parameters):
        bits: int = parameter(4, ge=1, le=8, description="bits for each entry of the task's offsets")

    def outline(self, recipe: Recipe, inputs: Mapping[str, Checkpoint], prepared: Path | None) -> Outline:
        layout = BundleLayout(recipe, inputs)
        layout.run(_quantized)
        return layout.outline(self.name)

    def compute(self, task: Task, desk: Desk) -> None:
        desk.note(quantize_tensor(task.call, desk))


def _quantized(layout: BundleLayout, info: TensorInfo, tasks: list[str]) -> None:
    """One tensor: its center, and codes and scales of each task; the tensor itself for a task that gains nothing."""
    name, out, number = info.name, layout.dtype(info), len(layout.tasks)
    merge, each = layout.recipe.groups[0].resolve(name, 0.0)
    assert isinstance(merge, Quantized.Merge)
    bits = [p.bits for t, p in zip(layout.tasks_of, each, strict=True) if t in tasks]  # type: ignore[attr-defined]
    rows, columns = rows_of(info.shape)
    scales = (rows, groups_of(columns, merge.group))
    packed = [_smaller(b, info, scales, ITEM_BYTES[out]) for b in bits]
    sinks: list[Sink] = []
    center = f"{'mean' if merge.center == 'mean' else 'base'}/{name}"

    def store(stored: str, dtype: str, shape: tuple[int, ...], rule: str) -> str:
        sinks.append(Sink(stored, dtype, shape, Result(number, len(sinks)), rule))
        return stored

    if any(packed):
        store(center, out, info.shape, f"stored: {merge.center}")
    quantized: dict[str, tuple[str, ...]] = {}
    exact: dict[str, tuple[str, ...]] = {}
    for task, b, worth in zip(tasks, bits, packed, strict=True):
        if worth:
            codes = store(f"codes/{task}/{name}", "U8", (stream_bytes(info.numel, b),), f"stored: codes of {b} bits")
            quantized[task] = codes, store(f"scales/{task}/{name}", "BF16", scales, "stored: scales")
        else:
            exact[task] = (store(f"own/{task}/{name}", out, info.shape, "stored exactly: too small to quantise"),)
    if quantized:
        numbers = {t: {"bits": b} for t, b in zip(tasks, bits, strict=True) if t in quantized}
        call = {"group": merge.group}
        layout.entries.append(Entry(name, out, info.shape, "offsets", (center,), quantized, call, numbers))
    if exact:
        layout.entries.append(Entry(name, out, info.shape, "copy", (), exact))
    layout.sinks += sinks
    job = Quantizing(
        shape=info.shape,
        stored=layout.stored_dtypes(name, tasks),
        out=out,
        bits=tuple(b if worth else None for b, worth in zip(bits, packed, strict=True)),
        group=merge.group,
        mean=merge.center == "mean",
        squares=merge.scale == "squares",
    )
    layout.tasks.append(Task("quantized", name, layout.sources(name, tasks), job, held=2 * len(tasks) + 12))


def _smaller(bits: int, info: TensorInfo, scales: tuple[int, int], item: int) -> bool:
    """Whether a tensor of two dimensions or more takes less room in codes and scales than as it is."""
    coded = stream_bytes(info.numel, bits) + 2 * scales[0] * scales[1]
    return len(info.shape) > 1 and coded < item * info.numel
