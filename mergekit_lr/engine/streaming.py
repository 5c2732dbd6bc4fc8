"""A run whose inputs come from the Hub shard by shard, or whose output goes there file by file.

Units are done in batches that need few input shards (`batches`). Before a batch its shards are fetched; while it
computes, what the next one needs is fetched ahead and output files that have become complete are uploaded, if the disk
budget has room for both. What no later batch needs is released at once. Batches never change bytes: units are
independent of one another and of their order.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.push import Repository, Uploaded
from mergekit_lr.checkpoint.store import ShardStore
from mergekit_lr.engine.batches import Needs, divide, in_file_order, make_batches
from mergekit_lr.engine.job import Job
from mergekit_lr.engine.plan import Plan
from mergekit_lr.engine.portion import drain
from mergekit_lr.engine.progress import Progress, ProgressEvent
from mergekit_lr.engine.units import Unit, pending
from mergekit_lr.engine.workspace import Workspace
from mergekit_lr.errors import ResourceError, VerificationError
from mergekit_lr.sizes import format_size

UPLOADED = "uploaded:"
"""How the journal's key of an uploaded output file begins; those of units end in ``@`` and a number."""


class _Stop(Exception):
    """The run has failed: leave off what was done beside it."""


@dataclass
class Streaming:
    """Where inputs are kept while they are needed, where the output goes, and how much disk both may take together.

    ``releases``: finished output files leave the disk once they are uploaded, so that nothing is at ``OUT`` in the end.
    """

    store: ShardStore
    budget: int | None = None
    target: Repository | None = None
    uploaded: dict[str, Uploaded] = field(default_factory=dict)

    @property
    def releases(self) -> bool:
        return self.target is not None and self.budget is not None

    def begin(self, plan: Plan, space: Workspace, job: Job) -> None:
        """Divide the budget, find what an earlier run left, and believe of it what is still there.

        Raises:
            ResourceError: the budget or the disk is too small.
        """
        sizes = {p: self.store.size(p) for p in self.store.files}
        self.needs = Needs(plan, sizes)
        self.room = divide(plan, self.needs, sizes, self.budget, releases=self.releases)
        self.store.room = self.room.inputs
        self.store.find()
        self._by_shard: dict[int, list[Unit]] = {}
        for unit in plan.units:
            self._by_shard.setdefault(shard_of(plan, unit), []).append(unit)
        self._recall(plan, job)
        if self.releases:
            _check_disk(space, min(self.budget or 0, self.room.outputs + sum(sizes.values())))
        else:
            space.prepare(plan.layout)

    def _recall(self, plan: Plan, job: Job) -> None:
        """Uploads that the journal tells of and the Hub still has; what is nowhere any more is done again."""
        told = {}
        for shard in plan.layout.shards:
            record = job.journal.done.get(UPLOADED + shard.file)
            if record is not None and record["size"] == shard.size:
                told[shard.file] = Uploaded(shard.file, record["sha256"], record["size"])
        there = self.target.has(told.values()) if self.target is not None else set()
        local = {s.file for s in plan.layout.shards if (job.folder / s.file).is_file()}
        if self.releases:
            for name in there & local:
                fs.remove_file(job.folder / name)
            local |= there
        else:
            there &= local
        self.uploaded = {name: told[name] for name in there}
        for number, units in self._by_shard.items():
            if plan.layout.shards[number].file not in local:
                for unit in units:
                    job.journal.forget(unit.key(plan.graph))

    def on_disk(self, plan: Plan, job: Job) -> list[Unit]:
        """Units whose output files are here: what can be, and must be, read back."""
        files = [s.file for s in plan.layout.shards]
        return [u for n, units in self._by_shard.items() if (job.folder / files[n]).is_file() for u in units]

    def drain(self, plan: Plan, space: Workspace, job: Job, progress: Progress | None) -> None:
        """Do every unit that is not done yet, fetching, uploading and releasing on the way."""
        todo = in_file_order(plan, pending(plan.units, plan.graph, job.journal.done))
        sizes = {p: self.store.size(p) for p in self.store.files}
        batches = make_batches(todo, self.needs, sizes, self.room.inputs, by_shard=self.target is not None)
        self.store.lazy = False
        tell = _Progress(progress)
        waiting = self._complete(plan, job, self._by_shard)
        for i, batch in enumerate(batches):
            if self.releases:
                space.prepare(plan.layout, batch.shards)
            self.store.settle(batch.needs, [b.needs for b in batches[i + 1 :]], tell.fetching)
            ahead = batches[i + 1].needs if i + 1 < len(batches) and self.room.background else frozenset()
            beside = _Beside([partial(self._upload, plan, job, waiting), partial(self._ahead, ahead)])
            job.done_bytes = 0
            try:
                drain(plan, job, batch.units, beside.at_first(tell.merging))
            except BaseException:
                beside.stop()
                raise
            beside.join()
            job.close()
            waiting = self._complete(plan, job, batch.shards)
            if not self.room.background:
                self._upload(plan, job, waiting, lambda: None)
                waiting = []
        self._upload(plan, job, waiting, lambda: None)
        self.store.settle(())

    def _ahead(self, wanted: frozenset[Path], check: Callable[[], None]) -> None:
        self.store.fetch_ahead(wanted, lambda _: check())

    def _complete(self, plan: Plan, job: Job, shards: Iterable[int]) -> list[int]:
        """Those of ``shards`` of which every unit is done, and that were not uploaded."""
        if self.target is None:
            return []
        done, files = job.journal.done, plan.layout.shards
        return [
            n
            for n in sorted(shards)
            if files[n].file not in self.uploaded and all(u.key(plan.graph) in done for u in self._by_shard[n])
        ]

    def _upload(self, plan: Plan, job: Job, shards: Sequence[int], check: Callable[[], None]) -> None:
        for number in shards:
            check()
            assert self.target is not None
            path = job.folder / plan.layout.shards[number].file
            check_shard(plan, job.folder, number, self._by_shard[number])
            done = self.target.upload(path)
            if done is None:
                continue
            job.journal.record({"unit": UPLOADED + done.file, **done.record()})
            self.uploaded[done.file] = done
            if self.releases:
                fs.remove_file(path)

    def publish(self, plan: Plan, folder: Path, small: dict[str, bytes]) -> str:
        """Make the whole output visible on the Hub; the commit."""
        assert self.target is not None
        left = {s.file: folder / s.file for s in plan.layout.shards if s.file not in self.uploaded}
        message = f"{plan.recipe.merge_method} of {len(plan.graph.models)} models, by mergekit_lr"
        return self.target.commit(self.uploaded.values(), {**small, **left}, message)


def shard_of(plan: Plan, unit: Unit) -> int:
    """The output file that a unit writes to."""
    return plan.layout.places[plan.graph.sinks[unit.sink].name].shard


def check_shard(plan: Plan, folder: Path, number: int, units: Sequence[Unit]) -> None:
    """Read our own header of one output file back with the strict reader; ``units`` are all that write to it.

    Raises:
        VerificationError: it does not hold what was planned.
    """
    path = folder / plan.layout.shards[number].file
    found = {t.name: (t.dtype, t.shape) for t in read_header(path).tensors.values()}
    sinks = [plan.graph.sinks[n] for n in {u.sink for u in units}]
    if found != {s.name: (s.dtype, s.shape) for s in sinks}:
        raise VerificationError(
            "a shard does not hold what was planned", where=str(path), fix="run again with --restart"
        )


def _check_disk(space: Workspace, needed: int) -> None:
    """Refuse early what the disk under the workspace cannot hold, whatever the budget says."""
    held = sum(p.stat().st_blocks * 512 for p in space.root.rglob("*.safetensors*"))
    free = shutil.disk_usage(space.root).free
    if needed - held > free:
        raise ResourceError(
            f"the run needs {format_size(needed)} of disk",
            where=str(space.root),
            why=f"{format_size(free)} are free",
            fix="free some space, or give less as --disk-budget, and run the same command again",
        )


class _Beside:
    """Work that goes on in a thread while a batch computes. It begins only after the workers were forked."""

    def __init__(self, tasks: Sequence[Callable[[Callable[[], None]], None]]) -> None:
        self._tasks = tasks
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def at_first(self, progress: Progress) -> Progress:
        """``progress`` that also begins the work when it is called first."""

        def tick(event: ProgressEvent) -> None:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
            progress(event)

        return tick

    def _work(self) -> None:
        try:
            for task in self._tasks:
                task(self._check)
        except _Stop:
            return
        except BaseException as e:  # raised by whoever waits
            self._failure = e

    def _check(self) -> None:
        if self._stopped.is_set():
            raise _Stop

    def stop(self) -> None:
        """Leave off as soon as possible."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=30)

    def join(self) -> None:
        """Wait until all is done.

        Raises:
            what the work raised.
        """
        if self._thread is None:
            self._work()
        else:
            try:
                self._thread.join()
            except BaseException:
                self.stop()
                raise
        if self._failure is not None:
            raise self._failure


class _Progress:
    """Events of batches as those of one run."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._fetched = 0

    def merging(self, event: ProgressEvent) -> None:
        if self._progress is not None:
            self._progress(event)

    def fetching(self, nbytes: int) -> None:
        self._fetched += nbytes
        if self._progress is not None:
            self._progress(ProgressEvent(self._fetched, self._fetched, "fetching"))
