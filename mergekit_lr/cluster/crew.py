"""The driver's side: connects to Ray, hands out groups of units as tasks, and takes their records home.

The driver alone writes the journal and holds the workspace's lock, so a driver that dies is a run that is resumed, and
a second driver is refused. A node that dies costs the tasks that it had in work; Ray runs them again elsewhere.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint import fs
from mergekit_lr.cluster import worker
from mergekit_lr.cluster.worker import PROBE, Answer, Order, plan_digest, versions
from mergekit_lr.engine.artifacts import compute_artifacts, operations_of
from mergekit_lr.engine.job import Job
from mergekit_lr.engine.plan import Plan
from mergekit_lr.engine.portion import read_back, total_bytes
from mergekit_lr.engine.progress import Progress, ProgressEvent
from mergekit_lr.engine.shares import groups_of, touching
from mergekit_lr.engine.units import Unit, pending
from mergekit_lr.engine.workspace import Workspace
from mergekit_lr.errors import ResourceError, UsageError
from mergekit_lr.recipe import Recipe

TICK = 0.2  # seconds between looks at the tasks
RETRIES = 10  # times that a task is run again because its node or process died
AHEAD = 4  # tasks in Ray's hands for each CPU
LEAST, MOST = 64 << 20, 4 << 30  # bytes that a task reads and writes, where units let it
PROCESS = 512 << 20  # what a worker holds beside tensors: the interpreter and torch
OBJECTS = 80 << 20  # bytes of the object store of a cluster that we start: it carries records only


@dataclass
class Crew:
    """A cluster that a run may use. ``limit``: most tasks at a time, None for as many as there are CPUs.

    ``offline``: workers ask nothing of the Hub either.
    """

    ray: Any
    limit: int | None = None
    offline: bool = False
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    order: Order | None = None

    @property
    def device(self) -> str:
        """What ``auto`` is: a GPU where the cluster has any."""
        return "cuda" if self.ray.cluster_resources().get("GPU", 0) else "cpu"

    def begin(self, recipe: Recipe, settings: dict[str, Any], space: Workspace) -> None:
        """Make sure that every node can take part, before any work in the workspace, which is held.

        Raises:
            UsageError: nodes have different versions; ResourceError: the workspace is not on shared storage.
        """
        if self.order is not None:
            return
        fs.write_file(space.root / PROBE, self.token.encode())
        self.order = Order(
            token=self.token,
            recipe=recipe.canonical(),
            settings=settings,
            root=str(space.root.absolute()),
            folder=str(Path.cwd()),
            versions=versions(),
            offline=self.offline,
        )
        try:
            self._look_around()
        except BaseException:
            fs.remove_file(space.root / PROBE)
            space.release()
            raise

    def _look_around(self) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode

        nodes = [n["NodeID"] for n in self.ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
        tasks = [
            self._task(worker.look_around, num_cpus=0, scheduling_strategy=OnNode(n, soft=False)).remote(self.order)
            for n in nodes
        ]
        answered = 0
        for task in tasks:
            with suppress(self.ray.exceptions.TaskUnschedulableError):  # the node died since it was listed
                self._answer(task)
                answered += 1
        if not answered:
            raise ResourceError("the cluster has no node with a CPU", where="Ray", fix="add nodes, then run again")

    def prepare(self, folder: Path) -> Path:
        """Let the method prepare in ``folder``, on the node with most CPUs."""
        assert self.order is not None
        cpus = max(int(n["Resources"].get("CPU", 0)) for n in self.ray.nodes() if n["Alive"])
        order = replace(self.order, prepared=str(folder.absolute()), settings={**self.order.settings, "threads": cpus})
        gpus = {"num_gpus": 1} if order.settings["device"] != "cpu" else {}
        self._answer(self._task(worker.prepare, num_cpus=cpus, **gpus).remote(order))
        return folder

    def work(self, plan: Plan, job: Job, progress: Progress | None) -> None:
        """Do what a plan says."""
        if plan.graph.artifacts:
            self.statistics(plan, job)
        self.drain(plan, job, progress)

    def statistics(self, plan: Plan, job: Job) -> None:
        """Model-wide statistics, a task for each few tensors."""
        order = self._ordered(plan, job)

        def gather(number: int, wanted: Any) -> Iterator[Any]:
            count = len(operations_of(plan, number))
            step = max(1, count // (AHEAD * self._slots()))
            ranges = [(a, min(count, a + step)) for a in range(0, count, step)]
            task, shared = self._task(worker.look_at_operations, **self._needs(plan)), self.ray.put(wanted)
            found: dict[int, Any] = {}
            starts = [lambda a=a, b=b: task.remote(order, number, shared, a, b) for a, b in ranges]
            for i, answer in self._each(starts, lambda: None):
                found[i] = self._taken(answer, job)
            for i in range(len(ranges)):
                yield from found.pop(i)

        compute_artifacts(plan, job, gather)

    def drain(self, plan: Plan, job: Job, progress: Progress | None) -> None:
        """Do every unit that is not done yet, and note it in the journal."""
        order = self._ordered(plan, job)
        task = self._task(worker.do_units, **self._needs(plan))
        total = total_bytes(plan, plan.units)

        def tick() -> None:
            if progress is not None:
                progress(ProgressEvent(job.done_bytes, total, "merging"))

        shares = groups_of(plan, AHEAD * self._slots(), LEAST, MOST)
        job.advance(total_bytes(plan, [u for u in plan.units if u.key(plan.graph) in job.journal.done]))
        for _ in range(RETRIES):
            left = dict.fromkeys(pending(plan.units, plan.graph, job.journal.done))
            groups = [todo for share in shares if (todo := [u for u in share if u in left])]
            if not groups:
                break
            starts = [lambda g=g: task.remote(order, [(u.sink, u.start, u.stop) for u in g]) for g in groups]
            for i, answer in self._each(starts, tick):
                self._note(plan, job, groups[i], self._taken(answer, job))
                tick()
            # What several machines had a hand in; see docs/scaling.md.
            read_back(plan, job, touching(plan, shares))
        else:
            raise ResourceError(
                "what tasks have written does not stay as they wrote it",
                where=str(job.folder),
                why=f"digests still differ after {RETRIES} attempts",
                fix="check the storage; the same command goes on from here",
            )
        tick()

    def _note(self, plan: Plan, job: Job, group: Sequence[Unit], records: Sequence[dict[str, Any]]) -> None:
        for record in records:
            job.journal.record(record)
        job.advance(total_bytes(plan, group))

    def _ordered(self, plan: Plan, job: Job) -> Any:
        """The order, with what is known now, in the object store."""
        assert self.order is not None
        prepared = None if plan.prepared is None else str(plan.prepared.absolute())
        self.order = replace(self.order, digest=plan_digest(plan), prepared=prepared, artifacts=dict(job.artifacts))
        return self.ray.put(self.order)

    def _needs(self, plan: Plan) -> dict[str, Any]:
        """Resources of a task: one CPU, one GPU where the plan is for one, and the memory that one worker holds.

        Raises:
            ResourceError: no node has that.
        """
        memory = plan.budget.peak // plan.budget.threads + PROCESS
        needs = {"num_cpus": 1, "memory": memory, "num_gpus": 0 if plan.device == "cpu" else 1}
        wanted = {"CPU": 1, "memory": memory, **({"GPU": 1} if needs["num_gpus"] else {})}
        nodes = [n["Resources"] for n in self.ray.nodes() if n["Alive"]]
        if not any(all(n.get(k, 0) >= v for k, v in wanted.items()) for n in nodes):
            raise ResourceError(
                "no node of the cluster can run a task of this merge",
                where="Ray",
                why=f"a task needs {memory / 2**20:.0f} MiB, a CPU{' and a GPU' if needs['num_gpus'] else ''}",
                fix="allow less with --max-memory (it counts for each task), or add such a node",
            )
        return needs

    def _slots(self) -> int:
        cpus = int(self.ray.cluster_resources().get("CPU", 1)) or 1
        return cpus if self.limit is None else min(self.limit, cpus)

    def _task(self, function: Callable[..., Answer], **options: Any) -> Any:
        return self.ray.remote(function).options(max_retries=RETRIES, **options)

    def _each(self, starts: Iterable[Callable[[], Any]], tick: Callable[[], None]) -> Iterator[tuple[int, Answer]]:
        """Start tasks, some ahead of those that run; their numbers and answers as they come."""
        waiting = list(enumerate(starts))[::-1]
        running: dict[Any, int] = {}
        most, asked = 0, -1.0
        try:
            while waiting or running:
                if time.monotonic() - asked > 1:  # nodes come and go
                    most, asked = self.limit or AHEAD * self._slots(), time.monotonic()
                while waiting and len(running) < most:
                    i, start = waiting.pop()
                    running[start()] = i
                ready, _ = self.ray.wait(list(running), num_returns=1, timeout=TICK)
                more, _ = self.ray.wait(list(running), num_returns=len(running), timeout=0)
                for ref in dict.fromkeys([*ready, *more]):
                    yield running.pop(ref), self._answer(ref)
                tick()
        finally:
            for ref in running:
                with suppress(Exception):
                    self.ray.cancel(ref, force=False)

    def _answer(self, ref: Any) -> Answer:
        """What a task gave back; its error is raised here."""
        try:
            answer: Answer = self.ray.get(ref)
        except self.ray.exceptions.TaskUnschedulableError:
            raise
        except self.ray.exceptions.RayError as e:
            raise ResourceError(
                "a task could not be run",
                where="Ray",
                why=" ".join(str(e).split())[:300],
                fix="see to the cluster (is mergekit-lr installed on every node?) and run the same command again",
            ) from e
        if answer.error is not None:
            raise answer.error
        return answer

    def _taken(self, answer: Answer, job: Job) -> Any:
        for text in answer.warnings:
            job.warn(text)
        return answer.value


@contextmanager
def crew_of(address: str | None, workers: int | None, *, offline: bool = False) -> Iterator[Crew]:
    """A crew on the cluster at ``address``, or on one of ``workers`` processes that is started here.

    Raises:
        UsageError: Ray is not installed; ResourceError: there is no cluster there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None:
        # Ray moves "127.0.0.1" to an outer address, but for this switch, which it reads when it is imported.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ImportError:
        raise UsageError("Ray is not installed", fix="pip install 'mergekit-lr[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address, workers)
    try:
        if ours and address is None:
            _refuse_open_ports(ray)
        yield Crew(ray, workers if address is not None else None, offline)
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: Any, address: str | None, workers: int | None) -> None:
    local = {"num_cpus": workers, "object_store_memory": OBJECTS, "include_dashboard": False}
    try:
        ray.init(
            address=address or "local",
            configure_logging=True,
            logging_level=logging.ERROR,
            log_to_driver=False,
            **(local if address is None else {}),
        )
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise ResourceError(
            "cannot reach the cluster",
            where=f"Ray at {address or 'this machine'}",
            why=" ".join(str(e).split())[:300],
            fix="start it with `ray start --head`, or check the address",
        ) from e


def _refuse_open_ports(ray: Any) -> None:
    """Whoever reaches Ray's ports can run code: what is started here must be for this machine only."""
    found = {n["NodeManagerAddress"] for n in ray.nodes()}
    if found != {"127.0.0.1"}:
        raise UsageError(
            "Ray would listen beyond this machine",
            where=", ".join(sorted(found)),
            why="it was imported before, and decides that when it is imported",
            fix="start the cluster yourself with `ray start --head --node-ip-address 127.0.0.1` and give --ray auto",
        )
