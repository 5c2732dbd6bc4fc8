"""What a method must know of the whole model before any tensor is written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from mergekit_lr.engine import processes
from mergekit_lr.engine.evaluate import Looks
from mergekit_lr.engine.execute import Worker
from mergekit_lr.engine.job import Job
from mergekit_lr.engine.plan import Plan
from mergekit_lr.graph.nodes import Operation, sources_of
from mergekit_lr.lazy import torch
from mergekit_lr.method import Pass
from mergekit_lr.pieces import drive
from mergekit_lr.registry import tensor_method

Gather: TypeAlias = Callable[[int, Pass[Any, Any]], Iterator[Any]]
"""Given an artifact's number and a pass: the pass's partial result of every operation, in output order."""


def compute_artifacts(plan: Plan, job: Job, gather: Gather | None = None, *, fork: bool = True) -> None:
    """Model-wide statistics: every pass over every tensor that the method merges, in output order.

    ``gather`` runs a pass elsewhere than with workers of this process. Without ``fork`` threads do it, whatever the
    size: shards that are fetched when they are read need one process.
    """
    for number, artifact in enumerate(plan.graph.artifacts):
        method = tensor_method(artifact.method)
        operations = operations_of(plan, number)

        def look(wanted: Pass[Any, Any], number: int = number) -> Any:
            total = None
            for partial in (gather or _gather_here(plan, job, fork))(number, wanted):
                total = partial if total is None else wanted.fold(total, partial)
            return wanted.finish(total)

        job.artifacts[artifact.method] = drive(method.model_statistics([o.call for o in operations]), look)


def operations_of(plan: Plan, number: int) -> list[Operation]:
    """The operations that an artifact of the graph is about, in output order."""
    artifact = plan.graph.artifacts[number]
    return [o for o in plan.graph.operations if o.artifact == artifact]


def look_at(worker: Worker, operation: Operation, wanted: Pass[Any, Any]) -> Any:
    """A pass's partial result of one operation."""
    total = None
    for call, piece in Looks(worker, tensor_method(operation.method), operation, None).pieces(wanted):
        total = wanted.fold(total, wanted.map(call, piece))
    return total


def _gather_here(plan: Plan, job: Job, fork: bool) -> Gather:
    def gather(number: int, wanted: Pass[Any, Any]) -> Iterator[Any]:
        operations = operations_of(plan, number)
        workers = min(plan.budget.threads, len(operations))
        # A sample reads next to nothing: not worth a fork.
        nbytes = sum(input_bytes(o, job) for o in operations)
        forked = fork and not wanted.sample and processes.worth_it(job.device, workers, nbytes)
        run = processes.in_order if forked else _threads_in_order
        return run(job, len(operations), lambda worker, i: look_at(worker, operations[i], wanted), workers)

    return gather


def input_bytes(operation: Operation, job: Job) -> int:
    """Bytes of all that an operation reads."""
    return sum(job.checkpoints[s.model].tensors[s.tensor].nbytes for s in sources_of(operation))


def _threads_in_order(job: Job, count: int, one: Callable[[Worker, int], Any], workers: int) -> Iterator[Any]:
    """The same as `processes.in_order` with threads of this process."""
    with ThreadPoolExecutor(workers, initializer=_begin_thread) as pool:
        yield from pool.map(lambda i: one(_worker(job), i), range(count))


_local = threading.local()


def _begin_thread() -> None:
    torch.set_num_threads(1)


def _worker(job: Job) -> Worker:
    """This thread's worker for artifact passes."""
    worker: Worker | None = getattr(_local, "worker", None)
    if worker is None or worker.job is not job:
        worker = _local.worker = Worker(job)
    return worker
