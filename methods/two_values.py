"""Two values: pack task models as two weights an entry and one bit for each task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from mergekit_lr.bundle.manifest import Entry
from mergekit_lr.bundle.masks import packed_bytes
from mergekit_lr.bundle.packing import BundleLayout
from mergekit_lr.bundle.two_values import Pairing, pair_tensor
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.graph.nodes import Result, Sink, Task
from mergekit_lr.method import Base, Source
from mergekit_lr.recipe import Recipe
from mergekit_lr.rewrite import Desk, Kind, Outline, Rewrite


class TwoValues(Rewrite):
    r"""Two values: a bundle of two weights for each entry and one mask of bits for each task.

    For the T weights ``w_t`` of one entry, low and high minimise ``sum_t min((w_t - low)^2, (w_t - high)^2)``: of the
    T - 1 cuts of the sorted weights the best, and the mean of each side. A task's bit says which of the two is its
    weight. TALL masks are the case low = base, high = base + tau, so at the same size, ``(2 + T / 16) / T`` of T bf16
    models, no task is kept worse in total squared error. Two tasks are kept exactly, and one. The base is not kept.
    Elementwise in fp32, each input is read once.

    Source: this project, after TALL masks (Wang et al., arXiv:2405.07813); two-means in one dimension is Fisher,
    "On grouping for maximum homogeneity", 1958, https://doi.org/10.1080/01621459.1958.10501479.
    """

    name = "two_values"
    summary = "pack task models: two weights an entry, and one bit an entry for each task"
    source = Source("On grouping for maximum homogeneity", url="https://doi.org/10.1080/01621459.1958.10501479")
    base = Base.REQUIRED
    settings = frozenset({"names"})
    kind: ClassVar[Kind] = "bundle"

    def outline(self, recipe: Recipe, inputs: Mapping[str, Checkpoint], prepared: Path | None) -> Outline:
        layout = BundleLayout(recipe, inputs)
        layout.run(_paired)
        return layout.outline(self.name)

    def compute(self, task: Task, desk: Desk) -> None:
        desk.note(pair_tensor(task.call, desk))


def _paired(layout: BundleLayout, info: TensorInfo, tasks: list[str]) -> None:
    """One tensor: low, high, and a mask for each task."""
    name, out, number = info.name, layout.dtype(info), len(layout.tasks)
    shape, masks = (packed_bytes(info.numel),), [f"mask/{t}/{info.name}" for t in tasks]
    layout.sinks += [
        Sink(f"low/{name}", out, info.shape, Result(number, 0), "stored: low value"),
        Sink(f"high/{name}", out, info.shape, Result(number, 1), "stored: high value"),
        *(Sink(m, "U8", shape, Result(number, 2 + i), "stored: mask") for i, m in enumerate(masks)),
    ]
    own = {t: (m,) for t, m in zip(tasks, masks, strict=True)}
    layout.entries.append(Entry(name, out, info.shape, "select", (f"low/{name}", f"high/{name}"), own))
    call = Pairing(info.shape, layout.stored_dtypes(name, tasks), out)
    layout.tasks.append(Task("two_values", name, layout.sources(name, tasks), call, held=2 * len(tasks) + 4))
