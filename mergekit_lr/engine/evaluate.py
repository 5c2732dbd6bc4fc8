"""Computes outputs of a graph: reads pieces of every input, lets the method merge them, checks what comes out."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mergekit_lr.checkpoint.dtypes import ITEM_BYTES, OVERFLOWS_AT
from mergekit_lr.engine.finite import check_companion, complain
from mergekit_lr.engine.fused import Fused, fused_sum
from mergekit_lr.engine.job import Inputs, Stopped
from mergekit_lr.engine.output import add_counts
from mergekit_lr.engine.units import slicing_of
from mergekit_lr.graph.nodes import Delta, Operation, Restore, Sink, Source, sources_of
from mergekit_lr.lazy import torch
from mergekit_lr.method import Call, Method, Pass, Piece
from mergekit_lr.pieces import Span, drive, fold_all, sample_spans, spans
from mergekit_lr.registry import tensor_method

if TYPE_CHECKING:
    from torch import Tensor

KEPT_STATES = 4


class Tally(Protocol):
    """Where a merge leaves what it found out on the way, and gets room for its results."""

    largest: float
    counts: dict[str, int]

    def buffer(self, elements: int) -> Tensor:
        """Room for output elements, in the output's dtype."""
        ...


class Evaluator:
    """One thread's scratch memory and its way to merged values.

    Inputs are read in blocks of some hundred thousand elements into reused buffers, and widened to fp32 piece by
    piece into one reused matrix: what a method sees stays in the core's own cache.
    """

    def __init__(self, job: Inputs) -> None:
        self.job = job
        self.on_gpu = job.device != "cpu"
        self._raw: dict[int, Tensor] = {}
        self._wide: Tensor | None = None
        self._states: OrderedDict[str, tuple[Any, Fused | None]] = OrderedDict()

    def merged(
        self, sink: Sink, operation: Operation, start: int, stop: int, tally: Tally
    ) -> Iterator[tuple[int, Tensor]]:
        """Elements ``start .. stop`` of an output as runs of ``(first index, values in the output's dtype)``."""
        method = tensor_method(operation.method)
        state, fused = self._state(method, operation, sink)
        inside = spans(sink.shape, slicing_of(sink), self.job.piece, start, stop)
        for block in blocks_of(inside, self.job.read):
            read = self.read_block(operation, block)
            narrow = tally.buffer(block[-1].stop - block[0].start)
            for span in block:
                if fused is not None:
                    merged = self._fused(fused, read, span)
                else:
                    piece = self.piece(operation, span, read)
                    if not method.exposes_nonfinite:
                        self.check_inputs(operation, piece)
                    merged = method.merge(operation.call, piece, state)
                    add_counts(tally.counts, piece.counts)
                    if isinstance(sink.value, Restore):
                        assert piece.base is not None
                        merged = merged.add_(piece.base)
                tally.largest = max(tally.largest, self._check(sink, operation, merged))
                narrow[span.start - block[0].start : span.stop - block[0].start].copy_(merged.reshape(-1))
            yield block[0].start, narrow

    def _state(self, method: Method, operation: Operation, sink: Sink) -> tuple[Any, Fused | None]:
        """What the method found out about this tensor; the last few are kept, for whoever comes back for more."""
        known = self._states.pop(sink.name, None)
        if known is None:
            shared = self.job.artifacts.get(operation.method)
            state = drive(method.statistics(operation.call, shared), Looks(self, method, operation, shared).run)
            known = state, fused_sum(method, operation, sink, state)
        self._states[sink.name] = known
        while len(self._states) > KEPT_STATES:
            self._states.popitem(last=False)
        return known

    def _fused(self, fused: Fused, read: Block, span: Span) -> Tensor:
        """``sum_j c_j x_j`` over all sources at once: one matrix-vector product."""
        wide = self._widen([read.values[s] for s in fused.sources], read, span)
        if self.on_gpu:
            return fused.coefficients.to(wide.device) @ wide
        return torch.mv(wide.t(), fused.coefficients)

    def read_block(self, operation: Operation, block: list[Span]) -> Block:
        """Every source of an operation over consecutive spans, as stored, in this worker's buffers."""
        if self.job.stop.is_set():
            raise Stopped
        start, stop = block[0].start, block[-1].stop
        values = {}
        whole = set(operation.companions) if operation.whole else set()
        for slot, source in enumerate(sources_of(operation)):
            checkpoint = self.job.checkpoints[source.model]
            info = checkpoint.tensors[source.tensor]
            a, b = (0, info.numel) if source in whole else (start, stop)
            raw = checkpoint.read(source.tensor, a, b, self.room(slot, b - a, info.dtype))
            values[source] = raw.to(self.job.device) if self.on_gpu else raw
        return Block(start, values)

    def piece(self, operation: Operation, span: Span, read: Block) -> Piece:
        """One piece of every input in fp32, the base subtracted where a delta is asked for."""
        wanted = [i.value if isinstance(i, Delta) else i for i in operation.inputs]
        if operation.base is not None:
            wanted.append(operation.base)
        if not operation.whole:
            wanted += operation.companions
        wide = self._widen([read.values[s] for s in wanted], read, span)
        n = len(operation.inputs)
        tensors = list(wide[:n].unbind())
        base = wide[n] if operation.base is not None else None
        for x, value in zip(tensors, operation.inputs, strict=True):
            if isinstance(value, Delta):
                assert base is not None
                x.sub_(base)
        shaped = [x.view(span.shape) for x in tensors]
        extra = self._extra(operation, read, wide[len(wanted) - len(operation.companions) :], span)
        return Piece(shaped, None if base is None else base.view(span.shape), span.start, extra=extra)

    def _extra(self, operation: Operation, read: Block, wide: Tensor, span: Span) -> list[Tensor]:
        """The companions of a piece in fp32, cut as it is or whole; checked."""
        if not operation.companions:
            return []
        companion = tensor_method(operation.method).companion
        assert companion is not None
        if operation.whole:
            shape = companion.shape(operation.call.shape)
            found = [read.values[s].to(torch.float32).view(shape) for s in operation.companions]
        else:
            found = [x.view(span.shape) for x in wide]
        for x, source in zip(found, operation.companions, strict=True):
            check_companion(x, companion, self.job.checkpoints[source.model].reference, source.tensor)
        return found

    def _widen(self, values: list[Tensor], read: Block, span: Span) -> Tensor:
        """The same part of several inputs as fp32 ``[inputs, elements]``, in this worker's scratch."""
        a, b = span.start - read.start, span.stop - read.start
        if self.on_gpu:
            return torch.stack([v[a:b].to(torch.float32) for v in values])
        room = self._wide
        if room is None or room.shape[0] < len(values) or room.shape[1] < span.numel:
            shape = (len(values), max(span.numel, self.job.piece))
            room = self._wide = torch.empty(shape, dtype=torch.float32)
        wide = room[: len(values), : span.numel]
        for row, value in zip(wide.unbind(), values, strict=True):
            row.copy_(value[a:b])
        return wide

    def room(self, slot: int, elements: int, dtype: str) -> Tensor:
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
        complain(self.job, sources_of(operation), operation.call.name, operation.method, sink, largest)


@dataclass
class Block:
    """Consecutive elements of every source, flat and as stored; ``start`` is the first one's index."""

    start: int
    values: dict[Source, Tensor]


def blocks_of(inside: list[Span], most: int) -> Iterator[list[Span]]:
    """Consecutive spans together, up to ``most`` elements."""
    block: list[Span] = []
    for span in inside:
        if block and span.stop - block[0].start > most:
            yield block
            block = []
        block.append(span)
    if block:
        yield block


@dataclass
class Looks:
    """Runs a method's passes over one tensor with a worker's scratch."""

    worker: Evaluator
    method: Method
    operation: Operation
    shared: Any

    def pieces(self, wanted: Pass[Any, Any]) -> Iterator[tuple[Call, Piece]]:
        call = self.operation.call
        slicing = self.method.slicing(call.merge)
        if wanted.sample:
            blocks = iter([[s] for s in sample_spans(call.shape, wanted.sample)])
        else:
            job = self.worker.job
            blocks = blocks_of(spans(call.shape, slicing, job.piece), job.read)
        for block in blocks:
            read = self.worker.read_block(self.operation, block)
            for span in block:
                piece = self.worker.piece(self.operation, span, read)
                if not self.method.exposes_nonfinite:
                    self.worker.check_inputs(self.operation, piece)
                yield call, piece

    def run(self, wanted: Pass[Any, Any]) -> Any:
        return fold_all(wanted, self.pieces(wanted))
