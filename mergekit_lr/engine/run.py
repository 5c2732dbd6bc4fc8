"""Runs a plan from start to commit."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint.dtypes import ITEM_BYTES
from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.engine import processes
from mergekit_lr.engine.artifacts import compute_artifacts
from mergekit_lr.engine.digest import CHUNK, ChunkDigests
from mergekit_lr.engine.execute import work
from mergekit_lr.engine.job import Job
from mergekit_lr.engine.manifest import make_report, small_files
from mergekit_lr.engine.memory import keep_freed_memory
from mergekit_lr.engine.plan import DEFAULT_SHARD, Plan, Settings, bytes_of, planned
from mergekit_lr.engine.prepare import run_preparation
from mergekit_lr.engine.processes import TICK
from mergekit_lr.engine.progress import Progress, ProgressEvent
from mergekit_lr.engine.units import Unit, pending
from mergekit_lr.engine.workspace import Workspace
from mergekit_lr.errors import CheckpointError, VerificationError
from mergekit_lr.lazy import torch
from mergekit_lr.recipe import Recipe


@dataclass(frozen=True)
class MergeResult:
    """``out``: the finished folder. ``report``: what ``merge_report.json`` in it says."""

    out: Path
    report: dict[str, Any]


def merge(
    recipe: Recipe | str | Path | dict[str, Any],
    out: str | Path,
    *,
    device: str = "auto",
    max_memory: str | int | None = None,
    threads: int | None = None,
    shard_size: str | int = DEFAULT_SHARD,
    resume: bool = True,
    overwrite: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Carry out a recipe and write the merged model to the folder ``out``.

    The same recipe, inputs and kind of device give the same bytes, whatever the threads, the memory budget and
    interruptions. Work happens in ``out.partial``; the same call resumes it after a kill.

    Args:
        recipe: path of a YAML file, YAML text, a mapping, or a loaded recipe.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        max_memory: bytes of tensors held at once, such as ``"8GiB"``; by default half of what is free.
        shard_size: most bytes of data in one output file, such as ``"5GB"``.
        resume: go on with matching unfinished work; False discards it.
        overwrite: replace ``out`` if it exists, in the moment the new one is complete.
        allow_pickle: read ``.bin`` weights too, in a confined child process.
        progress: called from this thread a few times a second.

    Raises:
        MergekitLrError: one of the family in `mergekit_lr.errors`; nothing is left at ``out`` then.
    """
    target = Path(out)
    space = Workspace(target)

    def prepare(recipe: Recipe, inputs: dict[str, Checkpoint], settings: Settings) -> Path:
        space.reserve(resume=resume, overwrite=overwrite)
        with one_thread_each():
            return run_preparation(recipe, inputs, settings, space, progress)

    try:
        with planned(
            recipe,
            device=device,
            max_memory=max_memory,
            threads=threads,
            shard_size=shard_size,
            allow_pickle=allow_pickle,
            prepare=prepare,
        ) as plan:
            return run(plan, target, resume=resume, overwrite=overwrite, progress=progress, space=space)
    finally:
        space.release()


def run(
    plan: Plan,
    out: Path,
    *,
    resume: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    space: Workspace | None = None,
) -> MergeResult:
    """Carry out a plan; see `merge`. ``space`` is held already where something was prepared in it."""
    began = time.monotonic()
    space = space or Workspace(out)
    space.fingerprint = plan.fingerprint()
    if resume and space.committed():
        return MergeResult(out, json.loads((out / "merge_report.json").read_bytes()))
    used = [c.folder or Path(c.stamps[0].path) for c in plan.inputs.values()]
    space.check_target(overwrite=overwrite, inputs=used)
    space.claim(resume=resume)
    try:
        space.prepare(plan.layout)
        job = _job(plan, space)
        try:
            _trust_but_verify(plan, job)
            with one_thread_each():
                compute_artifacts(plan, job)
                _drain(plan, job, progress)
        finally:
            job.close()
        _check_inputs_unchanged(plan)
        _check_shards(plan, space)
        report = make_report(plan, job, space.digest, time.monotonic() - began)
        space.commit(small_files(plan, report), plan.layout, overwrite=overwrite)
    finally:
        space.release()
    return MergeResult(out, report)


def _job(plan: Plan, space: Workspace) -> Job:
    return Job(
        graph=plan.graph,
        inputs=plan.inputs,
        layout=plan.layout,
        folder=space.model,
        journal=space.journal(),
        device=plan.device,
        piece=plan.budget.piece,
        read=plan.budget.read,
        nonfinite=plan.recipe.nonfinite,
    )


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


def _trust_but_verify(plan: Plan, job: Job) -> None:
    """Read back what an earlier run says it finished, and do again what does not match.

    The journal may have outrun the data: after a power loss its line can be there and the tensor's pages not.
    """
    for unit in plan.units:
        record = job.journal.done.get(unit.key(plan.graph))
        if record is not None and _written(plan, job, unit) != record["chunks"]:
            job.journal.forget(unit.key(plan.graph))


def _written(plan: Plan, job: Job, unit: Unit) -> list[str]:
    sink = plan.graph.sinks[unit.sink]
    place = plan.layout.places[sink.name]
    item = ITEM_BYTES[sink.dtype]
    digests = ChunkDigests()
    with (job.folder / plan.layout.shards[place.shard].file).open("rb") as f:
        f.seek(place.offset + unit.start * item)
        left = (unit.stop - unit.start) * item
        while left > 0:
            data = f.read(min(left, CHUNK))
            digests.update(memoryview(data))
            left -= len(data)
    return digests.finish()


def _drain(plan: Plan, job: Job, progress: Progress | None) -> None:
    """Let the workers do every unit that is not done yet."""
    todo = pending(plan.units, plan.graph, job.journal.done)
    total = bytes_of(plan)

    def tick(done: int) -> None:
        if progress is not None:
            progress(ProgressEvent(done, total, "merging"))

    workers = min(plan.budget.threads, max(len(todo), 1))
    if processes.worth_it(job, workers, total):
        processes.drain(job, todo, workers, tick)
    else:
        threads_drain(job, deque(todo), workers, tick)
    tick(total)


def threads_drain(job: Job, todo: deque[Unit], workers: int, tick: Callable[[int], None]) -> None:
    """Do all of ``todo`` with threads of this process; see `processes.drain`."""
    # Events, not Thread.join: an interrupted join marks a running thread as ended on CPython 3.11, and the
    # workspace must not be released while anyone still writes to it.
    failures: list[BaseException] = []
    finished = [threading.Event() for _ in range(workers)]
    for event in finished:
        threading.Thread(target=work, args=(job, todo, failures, event), daemon=True).start()
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
    if failures:
        raise failures[0]


def _check_inputs_unchanged(plan: Plan) -> None:
    changed = [p for m in plan.graph.files for p in plan.inputs[m].changed()]
    if changed:
        raise CheckpointError(
            "an input changed during the run",
            where=changed[0],
            why="its size, time or inode is not what it was at the start",
            fix="run again with --restart",
        )


def _check_shards(plan: Plan, space: Workspace) -> None:
    """Read our own headers back with the strict reader before anything can load them."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for shard in plan.layout.shards:
        header = read_header(space.model / shard.file)
        found.update({t.name: (t.dtype, t.shape) for t in header.tensors.values()})
    wanted = {s.name: (s.dtype, s.shape) for s in plan.graph.sinks}
    if found != wanted:
        raise VerificationError(
            "the shards do not hold what was planned", where=str(space.model), fix="run again with --restart"
        )
