"""TALL masks: pack task models as one multi-task vector and a mask of one bit an entry for each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mergekit_lr.bundle.manifest import Entry
from mergekit_lr.bundle.masking import Packing, pack_tensor
from mergekit_lr.bundle.masks import packed_bytes
from mergekit_lr.bundle.packing import BundleLayout
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.graph.nodes import Result, Sink, Task
from mergekit_lr.method import Base, Parameters, Source, parameter
from mergekit_lr.recipe import Recipe
from mergekit_lr.rewrite import Desk, Kind, Outline, Rewrite

Lambda = Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"]


class TallMasks(Rewrite):
    r"""TALL masks: a bundle of a base, one multi-task vector and one mask of bits for each task.

    With task vectors ``D_t = W_t - base`` the vector is ``tau = sum_t D_t`` (``multi_task: task_arithmetic``) or TIES'
    disjoint sum of the largest entries of each (``ties``). A task's mask is ``m_t = [ |D_t| > lambda_t |tau - D_t| ]``
    and its recovered weights are ``base + f_t m_t tau``; f is 1, or with ``factor: fitted`` the number that brings
    them nearest, ``<m tau, D> / |m tau|^2``, for each tensor and task. Base, tau (in the base's dtype) and T masks
    take ``(2 + T / 16) / T`` of T bf16 models. Elementwise in fp32; each input is read once, twice where lambda is
    ``auto`` with a factor or the vector is TIES', and a tensor does not fit one step.

    Source: Wang et al., "Localizing task information for improved model merging and compression", ICML 2024,
    arXiv:2405.07813, section 3.
    """

    name = "tall_masks"
    summary = "pack task models: one multi-task vector, and one bit an entry for each task"
    source = Source("Localizing task information (TALL masks)", arxiv="2405.07813")
    base = Base.REQUIRED
    settings = frozenset({"names"})
    kind: ClassVar[Kind] = "bundle"

    class Merge(Parameters):
        multi_task: Literal["task_arithmetic", "ties"] = parameter(
            "task_arithmetic", description="the multi-task vector: the sum of task vectors, or TIES' disjoint sum"
        )
        density: float = parameter(
            0.2, ge=0, le=1, description="with ties, share of each task vector's entries that is kept, by tensor"
        )
        factor: Literal["one", "fitted"] = parameter(
            "one", description="factor on a task's masked vector: one as in the paper, or fitted to each tensor"
        )

    class PerModel(Parameters):
        lam: Lambda = parameter(
            0.4,
            alias="lambda",
            description="how selective the task's mask is; auto leaves the least of the task vector, which is 1 "
            "without a fitted factor and the best of 0.2 .. 1 for each tensor with one",
        )

    def outline(self, recipe: Recipe, inputs: Mapping[str, Checkpoint], prepared: Path | None) -> Outline:
        layout = BundleLayout(recipe, inputs)
        layout.run(_masked)
        return layout.outline(self.name)

    def compute(self, task: Task, desk: Desk) -> None:
        desk.note(pack_tensor(task.call, desk))


def _masked(layout: BundleLayout, info: TensorInfo, tasks: list[str]) -> None:
    """One tensor: base, vector, a mask for each task, and what was fitted."""
    name = info.name
    merge, each = layout.recipe.groups[0].resolve(name, 0.0)
    assert isinstance(merge, TallMasks.Merge)
    lambdas = [p.lam for t, p in zip(layout.tasks_of, each, strict=True) if t in tasks]  # type: ignore[attr-defined]
    number, out = len(layout.tasks), layout.dtype(info)
    masks = [f"mask/{t}/{name}" for t in tasks]
    layout.sinks += [
        Sink(f"base/{name}", out, info.shape, Result(number, 0), "stored: base"),
        Sink(f"vector/{name}", out, info.shape, Result(number, 1), "stored: multi-task vector"),
        *(
            Sink(m, "U8", (packed_bytes(info.numel),), Result(number, 2 + i), "stored: mask")
            for i, m in enumerate(masks)
        ),
    ]
    own: dict[str, tuple[str, ...]] = {t: (m,) for t, m in zip(tasks, masks, strict=True)}
    rows: dict[str, dict[str, Any]] = {}
    if merge.factor == "fitted":
        fit = f"fit/{name}"
        layout.sinks.append(Sink(fit, "F32", (len(tasks), 2), Result(number, 2 + len(tasks)), "stored: fit"))
        own = {t: (*parts, fit) for t, parts in own.items()}
        rows = {t: {"row": i} for i, t in enumerate(tasks)}
    shared = (f"base/{name}", f"vector/{name}")
    layout.entries.append(Entry(name, out, info.shape, "masked", shared, own, numbers=rows))
    call = Packing(
        name=name,
        shape=info.shape,
        stored=layout.stored_dtypes(name, tasks),
        out=out,
        lambdas=tuple(None if x == "auto" else float(x) for x in lambdas),
        ties=merge.multi_task == "ties",
        density=merge.density,
        factor=merge.factor == "fitted",
    )
    layout.tasks.append(Task("tall_masks", name, layout.sources(name, tasks), call, held=len(tasks) + 4))
