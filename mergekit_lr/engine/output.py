"""The way of one unit's results to disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.dtypes import ITEM_BYTES, torch_dtype
from mergekit_lr.engine.digest import ChunkDigests
from mergekit_lr.engine.job import Job
from mergekit_lr.engine.units import Unit
from mergekit_lr.errors import VerificationError
from mergekit_lr.graph.nodes import MergeGraph, Sink, operation_of
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Output:
    """The way of one unit's results to disk: narrowed, written, digested."""

    job: Job
    sink: Sink
    room: Callable[[int, str], Tensor]  # scratch bytes for so many elements of a dtype
    digests: ChunkDigests = field(default_factory=ChunkDigests)
    largest: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    written: int = 0

    @property
    def dtype(self) -> str:
        return self.sink.dtype

    def buffer(self, elements: int) -> Tensor:
        """Room for output elements, in the output's dtype."""
        return self.room(elements, self.dtype).view(torch_dtype(self.dtype))[:elements]

    def write(self, start: int, narrow: Tensor) -> None:
        job, place = self.job, self.job.layout.places[self.sink.name]
        fd, path = job.shard(place.shard)
        data = narrow.view(torch.uint8).numpy().data
        fs.pwrite(fd, data, place.offset + start * ITEM_BYTES[self.dtype], path)
        self.digests.update(data)
        self.written += narrow.numel()
        job.advance(len(data) * (1 + inputs_counted(job.graph, self.sink)))

    def finish(self, unit: Unit) -> None:
        """Check that every element was written, and let the disk begin on them."""
        if self.written != unit.stop - unit.start:
            raise VerificationError(
                f"{self.written} of {unit.stop - unit.start} elements were written",
                where=f"tensor {self.sink.name!r}",
                why="a bug in how the tensor was cut",
                fix="please report it, with the recipe",
            )
        place, item = self.job.layout.places[self.sink.name], ITEM_BYTES[self.dtype]
        fd, _ = self.job.shard(place.shard)
        fs.start_writeback(fd, place.offset + unit.start * item, (unit.stop - unit.start) * item)


def inputs_counted(graph: MergeGraph, sink: Sink) -> int:
    """How many inputs of an output's size progress counts for it."""
    return 1 if operation_of(sink.value) is None else len(graph.files)


def add_counts(total: dict[str, int], more: Mapping[str, int]) -> None:
    """Add counts of the same names."""
    for name, n in more.items():
        total[name] = total.get(name, 0) + n
