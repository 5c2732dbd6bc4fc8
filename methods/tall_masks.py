"""TALL masks: pack task models as one multi-task vector and a mask of one bit an entry for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mergekit_lr.bundle.grid import Open, choose, chosen
from mergekit_lr.bundle.manifest import Entry
from mergekit_lr.bundle.masking import Packing, pack_tensor
from mergekit_lr.bundle.masks import packed_bytes
from mergekit_lr.bundle.packing import BundleLayout
from mergekit_lr.bundle.trimming import cuts_of, find_cuts, found_cuts
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import RecipeError
from mergekit_lr.graph.nodes import Result, Sink, Task
from mergekit_lr.method import Base, Parameters, Source, parameter
from mergekit_lr.recipe import Recipe
from mergekit_lr.rewrite import Desk, Kind, Outline, Preparation, Rewrite
from mergekit_lr.selection import ModelCut

Lambda = Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto", "grid"]


class TallMasks(Rewrite):
    r"""TALL masks: a bundle of a base, one multi-task vector and one mask of bits for each task.

    With task vectors ``D_t = W_t - base`` the vector is ``tau = sum_t D_t`` (``multi_task: task_arithmetic``) or TIES'
    disjoint sum of the largest entries of each (``ties``), of a tensor or of the model (``threshold_scope``). A task's
    mask is ``m_t = [ |D_t| > lambda_t |tau - D_t| ]`` and its recovered weights are ``base + f_t m_t tau``; f is 1, or
    with ``factor: fitted`` the number that brings them nearest, ``<m tau, D> / |m tau|^2``, for each tensor and task.
    Base, tau (in the base's dtype) and T masks take ``(2 + T / 16) / T`` of T bf16 models. Elementwise in fp32; each
    input is read once, twice where lambda is ``auto`` with a factor or the vector is TIES', and a tensor does not fit
    one step; trimming over the model reads all inputs two more times before.

    Source: Wang et al., "Localizing task information for improved model merging and compression", ICML 2024,
    arXiv:2405.07813, section 3.
    """

    name = "tall_masks"
    summary = "pack task models: one multi-task vector, and one bit an entry for each task"
    source = Source("Localizing task information (TALL masks)", arxiv="2405.07813")
    base = Base.REQUIRED
    settings = frozenset({"names", "calibration"})
    prepares = True
    kind: ClassVar[Kind] = "bundle"

    class Merge(Parameters):
        multi_task: Literal["task_arithmetic", "ties"] = parameter(
            "task_arithmetic", description="the multi-task vector: the sum of task vectors, or TIES' disjoint sum"
        )
        density: float = parameter(
            0.2, ge=0, le=1, description="with ties, share of each task vector's entries that is kept"
        )
        threshold_scope: Literal["tensor", "model"] = parameter(
            "tensor",
            description="with ties, where magnitudes compete: within each tensor, or over all tensors of a task "
            "vector together (the authors' code)",
        )
        factor: Literal["one", "fitted"] = parameter(
            "one", description="factor on a task's masked vector: one as in the paper, or fitted to each tensor"
        )

    class PerModel(Parameters):
        lam: Lambda = parameter(
            0.4,
            alias="lambda",
            description="how selective the task's mask is; grid takes that of 0.2 .. 0.6 with the least loss on the "
            "calibration text; auto leaves the least of the task vector, which is 1 without a fitted factor and the "
            "best of 0.2 .. 1 for each tensor with one",
        )

    def outline(self, recipe: Recipe, inputs: Mapping[str, Checkpoint], prepared: Path | None) -> Outline:
        layout = BundleLayout(recipe, inputs)
        measured, cuts = chosen(prepared), found_cuts(prepared)
        tensors = _run(layout, {t: found["lambda"] for t, found in measured.items()}, cuts)
        outline = layout.outline(self.name)
        left_open = _on_grid(tensors)
        if recipe.calibration is not None and not left_open and not measured:
            raise RecipeError("calibration is not used: no lambda is grid", where="recipe", fix="remove calibration")
        if measured:
            return replace(outline, details={**outline.details, "lambda": measured})
        warnings = [f"lambda of {', '.join(left_open)} is chosen on text before packing"] if left_open else []
        if any(x.model_wide for x in tensors) and not cuts:
            warnings.append("thresholds are found over all tensors before packing")
        return replace(outline, warnings=tuple(warnings))

    def prepare(self, work: Preparation) -> None:
        layout = BundleLayout(work.recipe, work.inputs)
        tensors = _run(layout, {}, {})
        if wide := [x for x in tensors if x.model_wide]:
            find_cuts(work, wide, list(layout.tasks_of))
            tensors = _run(BundleLayout(work.recipe, work.inputs), {}, found_cuts(work.folder))
        if left_open := _on_grid(tensors):
            choose(work, tensors, left_open)

    def problems(self, merge: Any, models: tuple[Any, ...]) -> list[str]:
        if merge.threshold_scope == "model" and merge.multi_task != "ties":
            return ["threshold_scope: model is about what TIES trims; it needs multi_task: ties"]
        if merge.factor == "fitted" and any(m.lam == "grid" for m in models):
            return ["lambda: grid measures a factor of one; use lambda: auto with factor: fitted"]
        return []

    def compute(self, task: Task, desk: Desk) -> None:
        desk.note(pack_tensor(task.call, desk))


def _run(layout: BundleLayout, measured: Mapping[str, float], cuts: Mapping[str, ModelCut]) -> list[Open]:
    """Lay out everything; returns each masked tensor with its tasks, a lambda of None where it is still open."""
    tensors: list[Open] = []
    layout.run(lambda layout, info, tasks: tensors.append(_masked(layout, info, tasks, measured, cuts)))
    return tensors


def _on_grid(tensors: Sequence[Open]) -> list[str]:
    """Tasks that leave their lambda to the grid."""
    return list(dict.fromkeys(t for x in tensors for t in x.on_grid))


def _masked(
    layout: BundleLayout,
    info: TensorInfo,
    tasks: list[str],
    measured: Mapping[str, float],
    cuts: Mapping[str, ModelCut],
) -> Open:
    """One tensor: base, vector, a mask for each task, and what was fitted."""
    name = info.name
    merge, each = layout.recipe.groups[0].resolve(name, 0.0)
    assert isinstance(merge, TallMasks.Merge)
    lambdas = [p.lam for t, p in zip(layout.tasks_of, each, strict=True) if t in tasks]  # type: ignore[attr-defined]
    on_grid = tuple(t for t, x in zip(tasks, lambdas, strict=True) if x == "grid" and t not in measured)
    lambdas = [measured.get(t, "auto") if x == "grid" else x for t, x in zip(tasks, lambdas, strict=True)]
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
    model_wide = merge.multi_task == "ties" and merge.threshold_scope == "model"
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
        cuts=cuts_of(name, merge.density, tasks, cuts) if model_wide and cuts else (),
    )
    layout.tasks.append(Task("tall_masks", name, layout.sources(name, tasks), call, held=len(tasks) + 4))
    checkpoints = (layout.base, *(layout.tasks_of[t] for t in tasks))
    return Open(call, tuple(tasks), checkpoints, on_grid, model_wide)
