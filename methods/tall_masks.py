"""TALL masks: pack task models as one multi-task vector and a mask of one bit an entry for each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mergekit_lr.bundle.manifest import Entry, Manifest
from mergekit_lr.bundle.manifest import Task as Packed
from mergekit_lr.bundle.masking import Packing, pack_tensor
from mergekit_lr.bundle.masks import packed_bytes
from mergekit_lr.bundle.packing import identity, storage_table, task_names, verbatim
from mergekit_lr.checkpoint.dtypes import AVERAGED, RECIPE_DTYPES
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.graph.build import refuse_quantised
from mergekit_lr.graph.nodes import Result, Sink, Task
from mergekit_lr.graph.nodes import Source as Tensor
from mergekit_lr.method import Base, Parameters, Source, parameter
from mergekit_lr.recipe import Recipe
from mergekit_lr.rewrite import Desk, Kind, Outline, Rewrite, model_order

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
        models = model_order(recipe)
        refuse_quantised([inputs[m] for m in models])
        entries = recipe.groups[0].inputs
        names = task_names(entries)
        layout = _Layout(recipe, inputs, models, dict(zip(names, (str(e.reference) for e in entries), strict=True)))
        layout.run()
        base = inputs[models[0]]
        packed = [inputs[str(e.reference)] for e in entries]
        storage = storage_table(layout.sinks, packed)
        manifest = Manifest(
            method=self.name,
            tasks=tuple(
                Packed(n, str(e.reference), {"files": identity(c)})
                for n, e, c in zip(names, entries, packed, strict=True)
            ),
            parameters=recipe.canonical()["parameters"],
            base={"model": models[0], "files": identity(base)},
            entries=tuple(layout.entries),
            storage=storage,
        )
        return Outline(
            tuple(models),
            tuple(layout.sinks),
            tuple(layout.tasks),
            dropped=tuple(layout.dropped),
            details={"storage": storage},
            bundle=manifest,
        )

    def compute(self, task: Task, desk: Desk) -> None:
        desk.note(pack_tensor(task.call, desk))


class _Layout:
    """What the bundle stores, tensor by tensor of the base and then what only tasks have."""

    def __init__(
        self, recipe: Recipe, inputs: Mapping[str, Checkpoint], models: list[str], references: Mapping[str, str]
    ) -> None:
        self.recipe, self.models = recipe, models
        self.base = inputs[models[0]]
        self.tasks_of = {t: inputs[r] for t, r in references.items()}
        self.numbers = {t: models.index(r) for t, r in references.items()}
        self.sinks: list[Sink] = []
        self.tasks: list[Task] = []
        self.entries: list[Entry] = []
        self.dropped: list[tuple[str, str, str]] = []

    def run(self) -> None:
        for name, info in self.base.tensors.items():
            alike = [t for t, c in self.tasks_of.items() if _alike(info, c.tensors.get(name))]
            if alike:
                self._masked(name, info, alike)
            else:
                self.dropped.append((self.models[0], name, "no task has it as the base does"))
            for t in self.tasks_of:
                if t not in alike:
                    self._verbatim(t, name)
        for t, checkpoint in self.tasks_of.items():
            for name in checkpoint.tensors:
                if name not in self.base.tensors:
                    self._verbatim(t, name)

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

    def _masked(self, name: str, info: TensorInfo, tasks: list[str]) -> None:
        merge, each = self.recipe.groups[0].resolve(name, 0.0)
        lambdas = [p.lam for t, p in zip(self.tasks_of, each, strict=True) if t in tasks]  # type: ignore[attr-defined]
        out = RECIPE_DTYPES[self.recipe.output_dtype] if self.recipe.output_dtype else info.dtype
        fitted = merge.factor == "fitted"  # type: ignore[attr-defined]
        number = len(self.tasks)
        masks = [f"mask/{t}/{name}" for t in tasks]
        mask_bytes = (packed_bytes(info.numel),)
        self.sinks += [
            Sink(f"base/{name}", out, info.shape, Result(number, 0), "stored: base"),
            Sink(f"vector/{name}", out, info.shape, Result(number, 1), "stored: multi-task vector"),
            *(Sink(m, "U8", mask_bytes, Result(number, 2 + i), "stored: mask") for i, m in enumerate(masks)),
        ]
        own: dict[str, tuple[str, ...]] = {t: (m,) for t, m in zip(tasks, masks, strict=True)}
        rows: dict[str, dict[str, Any]] = {}
        if fitted:
            fit = f"fit/{name}"
            self.sinks.append(Sink(fit, "F32", (len(tasks), 2), Result(number, 2 + len(tasks)), "stored: fit"))
            own = {t: (*parts, fit) for t, parts in own.items()}
            rows = {t: {"row": i} for i, t in enumerate(tasks)}
        shared = (f"base/{name}", f"vector/{name}")
        self.entries.append(Entry(name, out, info.shape, "masked", shared, own, numbers=rows))
        checkpoints = [self.tasks_of[t] for t in tasks]
        call = Packing(
            name=name,
            shape=info.shape,
            stored=(info.dtype, *(c.tensors[name].dtype for c in checkpoints)),
            out=out,
            lambdas=tuple(None if x == "auto" else float(x) for x in lambdas),
            ties=merge.multi_task == "ties",  # type: ignore[attr-defined]
            density=merge.density,  # type: ignore[attr-defined]
            factor=fitted,
        )
        sources = (Tensor(0, name), *(Tensor(self.numbers[t], name) for t in tasks))
        self.tasks.append(Task("tall_masks", name, sources, call, held=len(tasks) + 4))


def _alike(info: TensorInfo, own: TensorInfo | None) -> bool:
    return own is not None and own.shape == info.shape and {own.dtype, info.dtype} <= AVERAGED
