"""What a method must know of the whole model before any tensor is written."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mergekit_lr.engine.execute import Looks, Worker
from mergekit_lr.engine.job import Job
from mergekit_lr.engine.plan import Plan
from mergekit_lr.lazy import torch
from mergekit_lr.method import Pass
from mergekit_lr.pieces import drive
from mergekit_lr.registry import tensor_method


def compute_artifacts(plan: Plan, job: Job) -> None:
    """Model-wide statistics: every pass over every tensor that the method merges, in output order."""
    for artifact in plan.graph.artifacts:
        method = tensor_method(artifact.method)
        operations = [o for o in plan.graph.operations if o.artifact == artifact]

        def look(wanted: Pass[Any, Any], operations: Any = operations, method: Any = method) -> Any:
            def one(operation: Any) -> Any:
                total = None
                looks = Looks(_worker(job), method, operation, None)
                for call, piece in looks.pieces(wanted):
                    total = wanted.fold(total, wanted.map(call, piece))
                return total

            total = None
            with ThreadPoolExecutor(plan.budget.threads, initializer=_begin_thread) as pool:
                for partial in pool.map(one, operations):
                    total = partial if total is None else wanted.fold(total, partial)
            return wanted.finish(total)

        job.artifacts[artifact.method] = drive(method.model_statistics([o.call for o in operations]), look)


_local = threading.local()


def _begin_thread() -> None:
    torch.set_num_threads(1)


def _worker(job: Job) -> Worker:
    """This thread's worker for artifact passes."""
    worker: Worker | None = getattr(_local, "worker", None)
    if worker is None or worker.job is not job:
        worker = _local.worker = Worker(job)
    return worker
