"""TALL masks: pack task models as one multi-task vector and a mask of one bit an entry for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mergekit_lr.bundle.grid import Open, choose, chosen
from mergekit_lr.bundle.learning import Course, learn, learned_masks, losses_of
from mergekit_lr.bundle.manifest import Entry
from mergekit_lr.bundle.masking import Packing, pack_tensor
from mergekit_lr.bundle.masks import packed_bytes
from mergekit_lr.bundle.packing import BundleLayout, task_names
from mergekit_lr.bundle.trimming import cuts_of, find_cuts, found_cuts
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import RecipeError
from mergekit_lr.graph.nodes import Result, Sink, Task
from mergekit_lr.graph.nodes import Source as Stored
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
        masks: Literal["threshold", "learned"] = parameter(
            "threshold",
            description="the threshold's masks as in the paper, or bits that are learned from there on the calibration "
            "text, to predict what the expert predicts",
        )
        steps: int = parameter(100, ge=1, le=100_000, description="steps of `masks: learned`, of 8 windows each")
        rate: float = parameter(0.006, gt=0, le=1, description="step size of `masks: learned`, falling to nothing")
        label_weight: float = parameter(
            0.0,
            ge=0,
            allow_inf_nan=False,
            description="with learned masks, what the text's own next tokens count beside the expert's predictions",
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
        found = _Found.in_folder(prepared, list(layout.tasks_of))
        tensors = _run(layout, found)
        outline = layout.outline(self.name)
        left_open, course = _on_grid(tensors), _course(tensors)
        if recipe.calibration is not None and not (left_open or course or found.lambdas):
            why = "calibration is not used: no lambda is grid, and masks are not learned"
            raise RecipeError(why, where="recipe", fix="remove calibration")
        details: dict[str, Any] = {"lambda": found.lambdas} if found.lambdas else {}
        if found.masks:
            details["learned"] = {t: {"losses": losses_of(m)} for t, m in found.masks.items()}
            names = (*outline.models, *(f"masks of {t}" for t in found.masks))
            outline = replace(outline, models=names, extra={f"masks of {t}": m for t, m in found.masks.items()})
        warnings = [f"lambda of {', '.join(left_open)} is chosen on text before packing"] if left_open else []
        if any(x.model_wide for x in tensors) and not found.cuts:
            warnings.append("thresholds are found over all tensors before packing")
        if course and not found.masks:
            warnings.append("masks are learned on text before packing")
        return replace(outline, details={**outline.details, **details}, warnings=tuple(warnings))

    def prepare(self, work: Preparation) -> None:
        found = _Found()
        tasks = task_names(work.recipe.groups[0].inputs)
        tensors = _laid_out(work, found)
        if wide := [x for x in tensors if x.model_wide]:
            find_cuts(work, wide, tasks)
            found = _Found(cuts=found_cuts(work.folder))
            tensors = _laid_out(work, found)
        if left_open := _on_grid(tensors):
            choose(work, tensors, left_open)
            tensors = _laid_out(work, replace(found, lambdas=chosen(work.folder)))
        if course := _course(tensors):
            learn(work, tensors, tasks, course)

    def problems(self, merge: Any, models: tuple[Any, ...]) -> list[str]:
        found = []
        if merge.threshold_scope == "model" and merge.multi_task != "ties":
            found.append("threshold_scope: model is about what TIES trims; it needs multi_task: ties")
        if merge.factor == "fitted" and any(m.lam == "grid" for m in models):
            found.append("lambda: grid measures a factor of one; use lambda: auto with factor: fitted")
        if merge.masks == "learned" and merge.factor == "fitted":
            found.append("masks: learned has a factor of one; use factor: one")
        if merge.masks != "learned" and _lessons(merge) != _lessons(self.Merge()):
            found.append("steps, rate and label_weight are of masks: learned")
        return found

    def compute(self, task: Task, desk: Desk) -> None:
        desk.note(pack_tensor(task.call, desk))


@dataclass(frozen=True)
class _Found:
    """What was prepared: ``lambdas`` of tasks by held-out loss, TIES' ``cuts``, learned ``masks``; by task."""

    lambdas: Mapping[str, Any] = field(default_factory=dict)
    cuts: Mapping[str, ModelCut] = field(default_factory=dict)
    masks: Mapping[str, Checkpoint] = field(default_factory=dict)

    @classmethod
    def in_folder(cls, prepared: Path | None, tasks: Sequence[str]) -> _Found:
        return cls(chosen(prepared), found_cuts(prepared), learned_masks(prepared, tasks))


def _laid_out(work: Preparation, found: _Found) -> list[Open]:
    return _run(BundleLayout(work.recipe, work.inputs), found)


def _run(layout: BundleLayout, found: _Found) -> list[Open]:
    """Lay out everything; returns each masked tensor with its tasks, a lambda of None where it is still open."""
    tensors: list[Open] = []
    layout.run(lambda layout, info, tasks: tensors.append(_masked(layout, info, tasks, found)))
    return tensors


def _lessons(merge: Any) -> Course:
    return Course(merge.steps, merge.rate, merge.label_weight)


def _course(tensors: Sequence[Open]) -> Course | None:
    """How masks are learned, which is the same for all tensors; None where they are thresholds'."""
    ways = {x.course for x in tensors}
    if len(ways) > 1:
        why = "masks, steps, rate and label_weight differ between tensors; a model's masks are learned together"
        raise RecipeError(why, where="parameters", fix="give one value for all tensors")
    return next(iter(ways), None)


def _on_grid(tensors: Sequence[Open]) -> list[str]:
    """Tasks that leave their lambda to the grid."""
    return list(dict.fromkeys(t for x in tensors for t in x.on_grid))


def _masked(
    layout: BundleLayout,
    info: TensorInfo,
    tasks: list[str],
    found: _Found,
) -> Open:
    """One tensor: base, vector, a mask for each task, and what was fitted."""
    name = info.name
    merge, each = layout.recipe.groups[0].resolve(name, 0.0)
    assert isinstance(merge, TallMasks.Merge)
    lambdas = [p.lam for t, p in zip(layout.tasks_of, each, strict=True) if t in tasks]  # type: ignore[attr-defined]
    on_grid = tuple(t for t, x in zip(tasks, lambdas, strict=True) if x == "grid" and t not in found.lambdas)
    measured = {t: x["lambda"] for t, x in found.lambdas.items()}
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
        cuts=cuts_of(name, merge.density, tasks, found.cuts) if model_wide and found.cuts else (),
        learned=tuple(1 + len(tasks) + i for i in range(len(tasks))) if found.masks else (),
    )
    first, order = len(layout.models), list(found.masks)
    given = [Stored(first + order.index(t), name) for t in tasks] if found.masks else []
    sources = (*layout.sources(name, tasks), *given)
    layout.tasks.append(Task("tall_masks", name, sources, call, held=len(tasks) + 4))
    checkpoints = (layout.base, *(layout.tasks_of[t] for t in tasks))
    course = _lessons(merge) if merge.masks == "learned" else None
    return Open(call, tuple(tasks), checkpoints, on_grid, model_wide, course)
