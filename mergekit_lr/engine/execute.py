"""Carries out a graph: workers read pieces, let the method merge them, and write them where the layout says."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import nullcontext
from functools import partial
from typing import Any

from mergekit_lr.engine.desk import TaskDesk
from mergekit_lr.engine.evaluate import Evaluator
from mergekit_lr.engine.job import Job, Stopped
from mergekit_lr.engine.memory import return_surplus
from mergekit_lr.engine.output import Output
from mergekit_lr.engine.units import Unit
from mergekit_lr.graph.nodes import Result, Source, operation_of
from mergekit_lr.lazy import torch
from mergekit_lr.registry import rewrite


class Worker(Evaluator):
    """One thread of a run: its way through a unit, from the inputs to the shard and the journal."""

    job: Job

    def __init__(self, job: Job) -> None:
        super().__init__(job)

    def run(self, unit: Unit) -> None:
        """Do one unit, or the whole task that it is a result of, note it in the journal, and free what it took."""
        self._run(unit)
        return_surplus()

    def _run(self, unit: Unit) -> None:
        sink = self.job.graph.sinks[unit.sink]
        if isinstance(sink.value, Result):
            desk = TaskDesk(self.job, sink.value.task)
            rewrite(desk.task.method).compute(desk.task, desk)
            desk.finish()
            return
        operation = operation_of(sink.value)
        out = Output(self.job, sink, partial(self.room, -1))
        if operation is None:
            assert isinstance(sink.value, Source)
            self._copy(sink.value, unit, out)
        else:
            for start, narrow in self.merged(sink, operation, unit.start, unit.stop, out):
                out.write(start, narrow)
        out.finish(unit)
        record: dict[str, Any] = {"unit": unit.key(self.job.graph), "chunks": out.digests.finish()}
        if operation is not None:
            record["max_abs"] = out.largest
            if out.counts:
                record["counts"] = out.counts
        self.job.journal.record(record)

    def _copy(self, source: Source, unit: Unit, out: Output) -> None:
        checkpoint = self.job.checkpoints[source.model]
        for start in range(unit.start, unit.stop, self.job.read) or [0]:
            stop = min(unit.stop, start + self.job.read)
            out.write(start, checkpoint.read(source.tensor, start, stop, self.room(0, stop - start, out.dtype)))


def work(job: Job, queue: deque[Unit], failures: list[BaseException], finished: threading.Event) -> None:
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
    finally:
        finished.set()


def _stream(device: str) -> Any:
    """A stream of the worker's own, so that one worker's copies overlap another's arithmetic."""
    if device == "cpu":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
