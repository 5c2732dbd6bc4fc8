"""What a method must know of the whole model before any tensor is written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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


def compute_artifacts(plan: Plan, job: Job, *, fork: bool = True) -> None:
    """Model-wide statistics: every pass over every tensor that the method merges, in output order.

    Without ``fork`` threads do it, whatever the size: shards that are fetched when they are read need one process.
    """
    for artifact in plan.graph.artifacts:
        method = tensor_method(artifact.method)
        operations = [o for o in plan.graph.operations if o.artifact == artifact]

        nbytes = sum(input_bytes(o, job) for o in operations)

        def look(
            wanted: Pass[Any, Any], operations: Any = operations, method: Any = method, nbytes: int = nbytes
        ) -> Any:
            def one(worker: Worker, i: int) -> Any:
                total = None
                for call, piece in Looks(worker, method, operations[i], None).pieces(wanted):
                    total = wanted.fold(total, wanted.map(call, piece))
                return total

            workers = min(plan.budget.threads, len(operations))
            # A sample reads next to nothing: not worth a fork.
            forked = fork and not wanted.sample and processes.worth_it(job, workers, nbytes)
            run = processes.in_order if forked else _threads_in_order
            total = None
            for partial in run(job, len(operations), one, workers):
                total = partial if total is None else wanted.fold(total, partial)
            return wanted.finish(total)

        job.artifacts[artifact.method] = drive(method.model_statistics([o.call for o in operations]), look)


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
