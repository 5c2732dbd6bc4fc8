"""Carries out a graph: workers read pieces, let the method merge them, and write them where the layout says."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.dtypes import ITEM_BYTES, OVERFLOWS_AT, torch_dtype
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.engine.digest import ChunkDigests
from mergekit_lr.engine.finite import NonFinite, explain_nonfinite
from mergekit_lr.engine.journal import Journal
from mergekit_lr.engine.units import Unit, slicing_of
from mergekit_lr.errors import NonFiniteError
from mergekit_lr.graph.nodes import Delta, MergeGraph, Operation, Restore, Sink, Source, operation_of
from mergekit_lr.lazy import torch
from mergekit_lr.method import Call, Method, Pass, Piece
from mergekit_lr.pieces import Span, drive, fold_all, sample_spans, spans
from mergekit_lr.registry import get_method

if TYPE_CHECKING:
    from torch import Tensor


class Stopped(Exception):
    """Another worker failed, or the user interrupted: leave quietly."""


@dataclass
class Job:
    """What all workers share."""

    graph: MergeGraph
    inputs: Mapping[str, Checkpoint]
    layout: Layout
    folder: Path
    journal: Journal
    device: str
    piece: int
    nonfinite: str
    artifacts: dict[str, Any] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    done_bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    _descriptors: dict[int, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.checkpoints = [self.inputs[m] for m in self.graph.models]

    def shard(self, number: int) -> tuple[int, Path]:
        """Descriptor and path of an output shard."""
        path = self.folder / self.layout.shards[number].file
        with self._lock:
            if number not in self._descriptors:
                self._descriptors[number] = fs.open_for_writing(path)
            return self._descriptors[number], path

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self.done_bytes += nbytes

    def warn(self, text: str) -> None:
        with self._lock:
            if text not in self.warnings:
                self.warnings.append(text)


class Worker:
    """One thread's scratch memory and its way through a unit. Buffers are reused from piece to piece."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.on_gpu = job.device != "cpu"
        self._raw: dict[int, Tensor] = {}
        self._wide: dict[int, Tensor] = {}

    def run(self, unit: Unit) -> None:
        """Do one unit and note it in the journal."""
        sink = self.job.graph.sinks[unit.sink]
        operation = operation_of(sink.value)
        digests = ChunkDigests()
        largest = 0.0
        if operation is None:
            assert isinstance(sink.value, Source)
            self._copy(sink, sink.value, unit, digests)
        else:
            largest = self._merge(sink, operation, unit, digests)
        self._start_writeback(sink, unit)
        record: dict[str, Any] = {"unit": unit.key(self.job.graph), "chunks": digests.finish()}
        if operation is not None:
            record["max_abs"] = largest
        self.job.journal.record(record)

    def _start_writeback(self, sink: Sink, unit: Unit) -> None:
        place, item = self.job.layout.places[sink.name], ITEM_BYTES[sink.dtype]
        fd, _ = self.job.shard(place.shard)
        fs.start_writeback(fd, place.offset + unit.start * item, (unit.stop - unit.start) * item)

    def _copy(self, sink: Sink, source: Source, unit: Unit, digests: ChunkDigests) -> None:
        checkpoint = self.job.checkpoints[source.model]
        for start in range(unit.start, unit.stop, self.job.piece):
            stop = min(unit.stop, start + self.job.piece)
            raw = checkpoint.read(source.tensor, start, stop, self._buffer(0, stop - start, sink.dtype))
            self._write(sink, start, raw, digests)

    def _merge(self, sink: Sink, operation: Operation, unit: Unit, digests: ChunkDigests) -> float:
        method = get_method(operation.method)
        shared = self.job.artifacts.get(operation.method)
        looks = Looks(self, method, operation, shared)
        state = drive(method.statistics(operation.call, shared), looks.run)
        largest = 0.0
        out_dtype = torch_dtype(sink.dtype)
        for span in self._spans_of(sink, unit):
            piece = self.piece(operation, span)
            if not method.exposes_nonfinite:
                self.check_inputs(operation, piece)
            merged = method.merge(operation.call, piece, state)
            if isinstance(sink.value, Restore):
                assert piece.base is not None
                merged = merged.add_(piece.base)
            largest = max(largest, self._check(sink, operation, merged))
            narrow = self._buffer(-1, span.numel, sink.dtype).view(out_dtype)[: span.numel]
            narrow.copy_(merged.reshape(-1))
            self._write(sink, span.start, narrow, digests)
        return largest

    def _spans_of(self, sink: Sink, unit: Unit) -> Iterator[Span]:
        for span in spans(sink.shape, slicing_of(sink), self.job.piece):
            if unit.start <= span.start and span.stop <= unit.stop:
                yield span

    def piece(self, operation: Operation, span: Span) -> Piece:
        """Read one piece of every input, widen it to fp32, and subtract the base where a delta is asked for."""
        if self.job.stop.is_set():
            raise Stopped
        base = None if operation.base is None else self._load(operation.base, span, 0)
        tensors = []
        for i, value in enumerate(operation.inputs):
            source = value.value if isinstance(value, Delta) else value
            x = self._load(source, span, i + 1)
            if isinstance(value, Delta):
                assert base is not None
                x.sub_(base)
            tensors.append(x.view(span.shape))
        return Piece(tensors, None if base is None else base.view(span.shape), span.start)

    def _load(self, source: Source, span: Span, slot: int) -> Tensor:
        """fp32 elements of one source, in this worker's scratch."""
        checkpoint = self.job.checkpoints[source.model]
        stored = checkpoint.tensors[source.tensor].dtype
        raw = checkpoint.read(source.tensor, span.start, span.stop, self._buffer(slot, span.numel, stored))
        if self.on_gpu:
            return raw.to(self.job.device).to(torch.float32)
        if raw.dtype is torch.float32:
            return raw
        wide = self._wide.get(slot)
        if wide is None or wide.numel() < span.numel:
            wide = self._wide[slot] = torch.empty(span.numel, dtype=torch.float32)
        return wide[: span.numel].copy_(raw)

    def _buffer(self, slot: int, elements: int, dtype: str) -> Tensor:
        nbytes = elements * ITEM_BYTES[dtype]
        buffer = self._raw.get(slot)
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._raw[slot] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.on_gpu)
        return buffer[:nbytes]

    def _check(self, sink: Sink, operation: Operation, merged: Tensor) -> float:
        """Largest magnitude of an output piece; an error where it is not finite or will not be after the cast."""
        if merged.numel() == 0:
            return 0.0
        low, high = torch.aminmax(merged)
        largest = max(-float(low), float(high))
        if largest < OVERFLOWS_AT[sink.dtype]:
            return largest
        self._complain(sink, operation, largest)
        return largest if math.isfinite(largest) else 0.0

    def check_inputs(self, operation: Operation, piece: Piece) -> None:
        """Refuse NaN and infinity before a method that might hide them sees them."""
        for x in piece.tensors:
            if x.numel() and not math.isfinite(float(x.sum())) and not bool(torch.isfinite(x).all()):
                self._complain(None, operation, math.nan)

    def _complain(self, sink: Sink | None, operation: Operation, largest: float) -> None:
        if self.job.nonfinite == "allow":
            return
        found: NonFinite = explain_nonfinite(self.job.checkpoints, operation, sink, largest)
        if self.job.nonfinite == "warn":
            self.job.warn(str(found))
            return
        raise NonFiniteError(found.what, where=found.where, why=found.why, fix=found.fix)

    def _write(self, sink: Sink, start: int, narrow: Tensor, digests: ChunkDigests) -> None:
        place = self.job.layout.places[sink.name]
        fd, path = self.job.shard(place.shard)
        data = narrow.view(torch.uint8).numpy().data
        fs.pwrite(fd, data, place.offset + start * ITEM_BYTES[sink.dtype], path)
        digests.update(data)
        inputs = 1 if operation_of(sink.value) is None else len(self.job.checkpoints)
        self.job.advance(len(data) * (1 + inputs))


@dataclass
class Looks:
    """Runs a method's passes over one tensor with a worker's scratch."""

    worker: Worker
    method: Method
    operation: Operation
    shared: Any

    def pieces(self, wanted: Pass[Any, Any]) -> Iterator[tuple[Call, Piece]]:
        call = self.operation.call
        slicing = self.method.slicing(call.merge)
        cut = sample_spans(call.shape, wanted.sample) if wanted.sample else None
        for span in cut or spans(call.shape, slicing, self.worker.job.piece):
            piece = self.worker.piece(self.operation, span)
            self.worker.check_inputs(self.operation, piece)
            yield call, piece

    def run(self, wanted: Pass[Any, Any]) -> Any:
        return fold_all(wanted, self.pieces(wanted))


def work(job: Job, queue: deque[Unit], failures: list[BaseException]) -> None:
    """A worker thread: take units until there are none, or until something failed anywhere."""
    # One thread inside each operation: the split of a reduction must not depend on the machine.
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), _stream(job.device):
            worker = Worker(job)
            while not job.stop.is_set():
                try:
                    unit = queue.popleft()
                except IndexError:
                    return
                worker.run(unit)
    except Stopped:
        return
    except BaseException as e:  # handed to the main thread, which raises it
        failures.append(e)
        job.stop.set()


def _stream(device: str) -> Any:
    """A stream of the worker's own, so that one worker's copies overlap another's arithmetic."""
    if device == "cpu":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
