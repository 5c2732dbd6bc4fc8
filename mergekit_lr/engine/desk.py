"""A task's way to its inputs and outputs: what `mergekit_lr.rewrite.Desk` promises, over files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint.dtypes import AVERAGED, ITEM_BYTES, OVERFLOWS_AT, torch_dtype
from mergekit_lr.engine.finite import complain
from mergekit_lr.engine.job import Job, Stopped
from mergekit_lr.engine.output import Output
from mergekit_lr.engine.units import Unit
from mergekit_lr.graph.nodes import Task
from mergekit_lr.lazy import torch
from mergekit_lr.pieces import element_count

if TYPE_CHECKING:
    from torch import Tensor


def _room(elements: int, dtype: str) -> Tensor:
    return torch.empty(elements * ITEM_BYTES[dtype], dtype=torch.uint8)


def _sum_is_finite(values: Tensor) -> bool:
    return math.isfinite(float((values.to(torch.float32) if values.element_size() == 1 else values).sum()))


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values.to(torch.float32) if values.element_size() == 1 else values).all())


class TaskDesk:
    """One task of the graph while a worker computes it."""

    def __init__(self, job: Job, number: int) -> None:
        self.job = job
        self.task: Task = job.graph.tasks[number]
        self.device = job.device
        self.step = job.read
        self._numbers = job.graph.results[number]
        self._outputs = [Output(job, job.graph.sinks[n], _room) for n in self._numbers]
        self._notes: dict[str, Any] = {}

    def shape(self, index: int) -> tuple[int, ...]:
        source = self.task.inputs[index]
        return self.job.checkpoints[source.model].tensors[source.tensor].shape

    def read(
        self, index: int, start: int | None = None, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        if self.job.stop.is_set():
            raise Stopped
        source = self.task.inputs[index]
        checkpoint = self.job.checkpoints[source.model]
        shape = checkpoint.tensors[source.tensor].shape
        whole = start is None and stop is None
        n = element_count(shape)
        raw = checkpoint.read(source.tensor, start or 0, n if stop is None else stop).to(self.device)
        value = raw.to(torch.float32 if dtype is None else dtype)
        # A sum is several times quicker than a look at every value, and finite where all of them are, but for overflow.
        if raw.is_floating_point() and raw.numel() and not _sum_is_finite(value) and not _finite(raw):
            self._spoilt(None, math.nan)
        return value.reshape(shape) if whole else value

    def room(self, index: int, start: int, stop: int) -> Tensor:
        return torch.empty(stop - start, dtype=torch_dtype(self._outputs[index].dtype), device=self.device)

    def write(self, index: int, tensor: Tensor, start: int = 0) -> None:
        out = self._outputs[index]
        if start != out.written:
            raise ValueError(f"output {index} of {self.task.key}: element {start} comes after {out.written}")
        flat = tensor.detach().reshape(-1)
        if out.dtype in AVERAGED:
            self._check(out, flat)
        elif flat.dtype != torch_dtype(out.dtype):
            raise ValueError(f"output {index} of {self.task.key} is {out.dtype}, not {flat.dtype}")
        out.write(start, flat.to(torch_dtype(out.dtype)).cpu().contiguous())

    def note(self, facts: Mapping[str, Any]) -> None:
        self._notes.update(facts)

    def finish(self) -> None:
        """Check that every output was written whole, and note each in the journal."""
        for number, out in zip(self._numbers, self._outputs, strict=True):
            unit = Unit(number, 0, element_count(out.sink.shape))
            out.finish(unit)
        for place, (number, out) in enumerate(zip(self._numbers, self._outputs, strict=True)):
            record: dict[str, Any] = {
                "unit": Unit(number, 0, element_count(out.sink.shape)).key(self.job.graph),
                "chunks": out.digests.finish(),
            }
            if out.dtype in AVERAGED:
                record["max_abs"] = out.largest
            if self._notes and place == 0:
                record["notes"] = self._notes
            self.job.journal.record(record)

    def _check(self, out: Output, flat: Tensor) -> None:
        if flat.numel() == 0:
            return
        low, high = torch.aminmax(flat)
        largest = max(-float(low), float(high))
        if not largest < OVERFLOWS_AT[out.dtype]:
            self._spoilt(out, largest)
        out.largest = max(out.largest, largest if math.isfinite(largest) else 0.0)

    def _spoilt(self, out: Output | None, largest: float) -> None:
        name = self.task.key if out is None else out.sink.name
        sink = None if out is None else out.sink
        complain(self.job, list(dict.fromkeys(self.task.inputs)), name, self.task.method, sink, largest)
