"""What a task does on its node: it plans the merge again from the recipe, and does the units that it is told.

Between driver and workers go an `Order` (what the run was asked for), numbers of units, records for the journal, and
partial statistics. No open files, no closures: every process that works opens the inputs itself and makes sure that
it sees what the driver sees.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.retry import offline as offline_mode
from mergekit_lr.engine.artifacts import look_at, operations_of
from mergekit_lr.engine.execute import Worker
from mergekit_lr.engine.identity import content_of
from mergekit_lr.engine.job import Job
from mergekit_lr.engine.journal import Journal
from mergekit_lr.engine.plan import Plan, Settings, planned
from mergekit_lr.engine.portion import check_inputs_unchanged, drain, job_of, make_durable, one_thread_each
from mergekit_lr.engine.prepare import prepare_in
from mergekit_lr.engine.processes import portable
from mergekit_lr.engine.units import Unit
from mergekit_lr.errors import CheckpointError, ResourceError, UsageError
from mergekit_lr.lazy import torch
from mergekit_lr.recipe import Recipe

PROBE = "probe"
"""The file that the driver writes into the workspace and every worker must find, with the run's token in it."""


@dataclass(frozen=True)
class Order:
    """A run as its driver describes it to workers.

    ``recipe``: its canonical form. ``root``: the workspace; ``prepared``: what the method prepared there. ``folder``:
    the driver's working folder, from which relative paths in the recipe count. ``digest``: that of the driver's plan,
    None before there is one.
    """

    token: str
    recipe: dict[str, Any]
    settings: dict[str, Any]
    root: str
    folder: str
    versions: dict[str, str]
    offline: bool = False
    prepared: str | None = None
    digest: str | None = None
    artifacts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a task gives back. ``error``: what went wrong, in a form that travels."""

    value: Any = None
    warnings: tuple[str, ...] = ()
    error: BaseException | None = None


def versions() -> dict[str, str]:
    """What must be equal on all nodes, because bytes may depend on it."""
    from mergekit_lr import __version__

    return {"mergekit_lr": __version__, "torch": version("torch"), "machine": platform.machine()}


def plan_digest(plan: Plan) -> str:
    """sha256 of what two machines must agree on: what is computed, where it goes, from which inputs."""
    inputs = {m: content_of(plan.inputs[m]) for m in plan.graph.files}
    shards = [[s.file, s.size] for s in plan.layout.shards]
    return hashlib.sha256(json.dumps([plan.graph.digest, shards, inputs], sort_keys=True).encode()).hexdigest()


def look_around(order: Order) -> Answer:
    """Whether this node can take part: the same versions, the same storage."""
    try:
        _check_node(order)
    except Exception as e:
        return Answer(error=portable(e))
    return Answer(socket.gethostname())


def _check_node(order: Order) -> None:
    here, node = versions(), f"node {socket.gethostname()}"
    for name, wanted in order.versions.items():
        if here[name] != wanted:
            raise UsageError(
                f"nodes differ in {name}",
                where=node,
                why=f"{here[name]} there, {wanted} where the run was started",
                fix="install the same versions on every node, or leave that node out",
            )
    try:
        found = (Path(order.root) / PROBE).read_text()
    except OSError as e:
        found = e.strerror or str(e)
    if found != order.token:
        raise ResourceError(
            "the output's folder is not shared with this node",
            where=f"{node}, {order.root}",
            why=f"the probe file written by the driver is not there: {found[:80]}",
            fix="write to storage that every node has under the same path",
        )


class Session:
    """One run in one worker process: its plan, kept for the tasks that follow."""

    def __init__(self, order: Order) -> None:
        _check_node(order)
        if Path.cwd() != Path(order.folder):
            os.chdir(order.folder)
        self.order = order
        self._stack = ExitStack()
        prepared = Path(order.prepared or "")
        found = None if order.prepared is None else lambda *_: prepared
        self._stack.enter_context(offline_mode(order.offline))
        opened = planned(order.recipe, **order.settings, threads=1, prepare=found)
        self.plan: Plan = self._stack.enter_context(opened)
        if plan_digest(self.plan) != order.digest:
            self.close()
            raise CheckpointError(
                "a node plans another merge than the driver",
                where=f"node {socket.gethostname()}",
                why="its inputs differ in size or header, or it has other plug-ins",
                fix="let every node see the same inputs under the same paths",
            )

    def job(self) -> Job:
        job = job_of(self.plan, Path(self.order.root) / "model", Notebook(Path(os.devnull)))
        job.artifacts = self.order.artifacts
        return job

    def close(self) -> None:
        self._stack.close()


class Notebook(Journal):
    """A journal that is sent to the driver instead of written: one process writes the file."""

    def _read(self) -> dict[str, dict[str, Any]]:
        return {}

    def record(self, record: dict[str, Any]) -> None:
        with self._lock:
            self.done[record["unit"]] = record


_sessions: dict[str, Session] = {}


def session_for(order: Order) -> Session:
    """This process's session for a run; that of an earlier run is closed."""
    found = _sessions.get(order.token)
    if found is None:
        while _sessions:
            _sessions.popitem()[1].close()
        found = _sessions[order.token] = Session(order)
    found.order = order  # with statistics that the first ones could not have
    return found


def do_units(order: Order, units: Sequence[tuple[int, int, int]]) -> Answer:
    """Do units, wait until the storage has them, and give back their records."""
    try:
        session = session_for(order)
        job = session.job()
        wanted = [Unit(*u) for u in units]
        try:
            with one_thread_each():
                drain(session.plan, job, wanted, None)
            make_durable(session.plan, job, wanted)
        finally:
            job.close()
        check_inputs_unchanged(session.plan)
        return Answer(list(job.journal.done.values()), tuple(job.warnings))
    except Exception as e:
        return Answer(error=portable(e))


def look_at_operations(order: Order, artifact: int, wanted: Any, start: int, stop: int) -> Answer:
    """A pass's partial results of some of the operations that an artifact is about."""
    try:
        session = session_for(order)
        job = session.job()
        with one_thread_each(), torch.inference_mode():
            worker = Worker(job)
            operations = operations_of(session.plan, artifact)[start:stop]
            return Answer([look_at(worker, o, wanted) for o in operations], tuple(job.warnings))
    except Exception as e:
        return Answer(error=portable(e))


def prepare(order: Order) -> Answer:
    """Let the method prepare, in the folder that the order names; goes on where an interrupted one was."""
    assert order.prepared is not None
    folder = Path(order.prepared)

    def here(recipe: Recipe, inputs: dict[str, Checkpoint], settings: Settings) -> Path:
        prepare_in(folder, recipe, inputs, settings, None)
        return folder

    try:
        _check_node(order)
        os.chdir(order.folder)
        with offline_mode(order.offline), one_thread_each(), planned(order.recipe, **order.settings, prepare=here):
            return Answer()
    except Exception as e:
        return Answer(error=portable(e))
