"""Units of work and how they are done: the one way that a whole run, a part of one and a task on a cluster take.

A portion is any of a plan's units. What is done of it already is read back and believed only where the bytes are
there; the rest goes to threads or forked workers; `make_durable` is for whoever reports to somebody else that it is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.dtypes import ITEM_BYTES
from mergekit_lr.engine import processes
from mergekit_lr.engine.digest import CHUNK, ChunkDigests
from mergekit_lr.engine.execute import work
from mergekit_lr.engine.job import Job
from mergekit_lr.engine.journal import Journal
from mergekit_lr.engine.memory import keep_freed_memory
from mergekit_lr.engine.output import inputs_counted
from mergekit_lr.engine.plan import Plan
from mergekit_lr.engine.processes import TICK
from mergekit_lr.engine.progress import Progress, ProgressEvent
from mergekit_lr.engine.stages import streamed
from mergekit_lr.engine.units import Unit, pending
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch


def job_of(plan: Plan, folder: Path, journal: Journal) -> Job:
    """What the workers of one process share; shards are in ``folder``."""
    job = Job(
        graph=plan.graph,
        inputs=plan.inputs,
        layout=plan.layout,
        folder=folder,
        journal=journal,
        device=plan.device,
        piece=plan.budget.piece,
        read=plan.budget.read,
        nonfinite=plan.recipe.nonfinite,
    )
    for stage in streamed(job.checkpoints):
        stage.report_to(job)
    return job


@contextmanager
def one_thread_each() -> Iterator[None]:
    """One thread inside each torch operation, so that no result depends on how many there are."""
    before = torch.get_num_threads()
    keep_freed_memory()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_back(plan: Plan, job: Job, units: Sequence[Unit]) -> None:
    """Compare what the journal says of ``units`` with the bytes, and forget what does not match.

    The journal may have outrun the data: after a power loss its line can be there and the tensor's pages not.
    """
    for unit in units:
        record = job.journal.done.get(unit.key(plan.graph))
        if record is not None and written(plan, job, unit) != record["chunks"]:
            job.journal.forget(unit.key(plan.graph))


def written(plan: Plan, job: Job, unit: Unit) -> list[str]:
    """Digests of the chunks of a unit, as they lie in the shard."""
    place, nbytes = byte_range(plan, unit)
    digests = ChunkDigests()
    path = job.folder / plan.layout.shards[place[0]].file
    with fs.explained("read back", path), path.open("rb") as f:
        f.seek(place[1])
        while nbytes > 0:
            data = f.read(min(nbytes, CHUNK))
            if not data:
                break
            digests.update(memoryview(data))
            nbytes -= len(data)
    return digests.finish()


def byte_range(plan: Plan, unit: Unit) -> tuple[tuple[int, int], int]:
    """``(shard, offset in its file), bytes`` of what a unit writes."""
    sink = plan.graph.sinks[unit.sink]
    place, item = plan.layout.places[sink.name], ITEM_BYTES[sink.dtype]
    return (place.shard, place.offset + unit.start * item), (unit.stop - unit.start) * item


def total_bytes(plan: Plan, units: Sequence[Unit]) -> int:
    """Bytes that units read and write at least, as progress counts them."""
    sinks = plan.graph.sinks
    return sum(byte_range(plan, u)[1] * (1 + inputs_counted(plan.graph, sinks[u.sink])) for u in units)


def drain(plan: Plan, job: Job, units: Sequence[Unit], progress: Progress | None) -> None:
    """Let workers of this process do every one of ``units`` that is not done yet."""
    todo = pending(units, plan.graph, job.journal.done)
    total = total_bytes(plan, units)

    def tick(done: int) -> None:
        if progress is not None:
            progress(ProgressEvent(done, total, "merging"))

    workers = min(plan.budget.threads, max(len(todo), 1))
    if processes.worth_it(job.device, workers, total):
        processes.drain(job, todo, workers, tick)
    else:
        threads_drain(job, deque(todo), workers, tick)
    tick(total)


def threads_drain(job: Job, todo: deque[Unit], workers: int, tick: Callable[[int], None]) -> None:
    """Do all of ``todo`` with threads of this process; see `processes.drain`."""
    # Events before Thread.join: an interrupted join marks a running thread as ended on CPython 3.11, and the
    # workspace must not be released while anyone still writes to it. The join is for the interpreter: a thread that
    # still frees its buffers when the process ends takes it down with it (pthread_exit inside torch).
    failures: list[BaseException] = []
    finished = [threading.Event() for _ in range(workers)]
    threads = [threading.Thread(target=work, args=(job, todo, failures, e), daemon=True) for e in finished]
    for thread in threads:
        thread.start()
    try:
        for event in finished:
            while not event.wait(TICK):
                tick(job.done_bytes)
    except BaseException:
        job.stop.set()
        raise
    finally:
        for event in finished:
            event.wait()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def make_durable(plan: Plan, job: Job, units: Sequence[Unit]) -> None:
    """Wait until the disk (or the server behind it) has every shard that ``units`` lie in."""
    for shard in sorted({byte_range(plan, u)[0][0] for u in units}):
        fs.fsync(job.folder / plan.layout.shards[shard].file)


def check_inputs_unchanged(plan: Plan) -> None:
    """Refuse to call anything done that was read from a file which has changed since it was opened.

    Raises:
        CheckpointError: it names the file.
    """
    changed = [p for m in plan.graph.files for p in plan.inputs[m].changed()]
    if changed:
        raise CheckpointError(
            "an input changed during the run",
            where=changed[0],
            why="its size, time or inode is not what it was at the start",
            fix="run again with --restart",
        )
