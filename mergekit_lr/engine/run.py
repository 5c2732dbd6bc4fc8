"""Runs a plan from start to commit."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.push import REPORT, Repository, parse_target
from mergekit_lr.checkpoint.retry import offline as offline_mode
from mergekit_lr.checkpoint.store import ShardStore
from mergekit_lr.engine.artifacts import compute_artifacts
from mergekit_lr.engine.beside import texts_of
from mergekit_lr.engine.job import Job
from mergekit_lr.engine.manifest import make_report, small_files
from mergekit_lr.engine.plan import DEFAULT_SHARD, Plan, Settings, planned
from mergekit_lr.engine.portion import check_inputs_unchanged, drain, job_of, one_thread_each, read_back
from mergekit_lr.engine.prepare import preparation_of, run_preparation
from mergekit_lr.engine.progress import Progress
from mergekit_lr.engine.streaming import Streaming
from mergekit_lr.engine.target import check_place, places_of
from mergekit_lr.engine.together import refuse_together
from mergekit_lr.engine.units import pending
from mergekit_lr.engine.workspace import PREPARED, Workspace, digest_of
from mergekit_lr.errors import ResourceError, UsageError, VerificationError
from mergekit_lr.recipe import Recipe, load_recipe
from mergekit_lr.sizes import parse_size

INPUTS = "inputs"
"""Folder of the workspace for shards that were fetched."""

if TYPE_CHECKING:
    from mergekit_lr.cluster.crew import Crew

STAGES = "stages"
"""Folder in the workspace that holds the stages which had to be written."""


@dataclass(frozen=True)
class MergeResult:
    """``out``: the finished folder. ``report``: what ``merge_report.json`` in it says.

    ``waiting_for``: parts that are not done yet; ``out`` is not there then, and ``report`` is empty.
    ``pushed``: repository and commit on the Hub, ``org/name@commit``, where the output was pushed. With a disk budget
    the output is there only, and there is no folder ``out``.
    """

    out: Path
    report: dict[str, Any]
    waiting_for: tuple[int, ...] = ()
    pushed: str | None = None


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
    part: str | None = None,
    stage: str | None = None,
    workers: int | None = None,
    ray: str | None = None,
    offline: bool = False,
    verify_inputs: bool = False,
    disk_budget: str | int | None = None,
    push: str | None = None,
    copy_code: bool = False,
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
        part: ``"I/N"``: do only the I-th of N parts, counted from 1, on storage that all of them share. They may run
            anywhere, at any time and in any order; the one that finds all others done writes the output.
        stage: make this one of a file's named recipes instead of its output.
        workers: use so many worker processes of Ray on this machine, or at most so many tasks at a time of ``ray``.
        ray: address of a Ray cluster whose nodes do the work, such as ``"auto"`` or ``"host:6379"``. All must see
            inputs and output under the same paths. ``max_memory`` is then what each task may hold.
        offline: ask nothing of the Hub; use what is in its cache.
        verify_inputs: compare what was downloaded from the Hub with the digests that it states.
        disk_budget: most bytes of weights on disk at once, such as ``"50GB"``: shards of Hub models are fetched when
            they are needed and released when they are not; with ``push``, finished output files as well.
        push: a Hub repository ``org/name`` that gets the output: files as they are finished, one commit at the end.
            It is created private if there is none.
        copy_code: carry the Python files of the model over that the output is laid out as, and keep what its config
            says of them. They are copied as bytes, never run; whoever loads the output with ``trust_remote_code`` does.
        progress: called from this thread a few times a second.

    Raises:
        MergekitLrError: one of the family in `mergekit_lr.errors`; nothing is left at ``out`` then.
    """
    recipe = load_recipe(recipe, stage=stage)
    how: dict[str, Any] = {"device": device, "max_memory": max_memory, "shard_size": shard_size}
    how |= {"allow_pickle": allow_pickle, "verify": verify_inputs, "copy_code": copy_code}
    streams = disk_budget is not None or push is not None
    refuse_together(part=part, workers=workers, ray=ray, threads=threads, streams=streams)
    check_place(Path(out))
    with offline_mode(offline):
        if part is not None:
            from mergekit_lr.engine.parts import merge_part

            how["threads"] = threads
            return merge_part(recipe, Path(out), part, how, resume=resume, overwrite=overwrite, progress=progress)
        space = Workspace(Path(out))
        if ray is None and workers is None:
            how["threads"] = threads
            streaming = _streaming(space, disk_budget, push, verify_inputs, offline)
            return _merge(recipe, space, how, resume, overwrite, progress, streaming=streaming)
        from mergekit_lr.cluster.crew import crew_of

        with crew_of(ray, workers, offline=offline) as crew:
            how["device"] = crew.device if device == "auto" else device
            return _merge(recipe, space, how, resume, overwrite, progress, crew=crew)


def _merge(
    recipe: Recipe | str | Path | dict[str, Any],
    space: Workspace,
    how: dict[str, Any],
    resume: bool,
    overwrite: bool,
    progress: Progress | None,
    *,
    crew: Crew | None = None,
    streaming: Streaming | None = None,
) -> MergeResult:
    """Plan and run; ``how`` are the arguments of `planned`."""

    def prepare(recipe: Recipe, inputs: dict[str, Checkpoint], settings: Settings) -> Path:
        space.preparation = preparation_of(recipe, inputs, settings)
        if resume and space.committed(prepared=True):
            raise _Done
        space.reserve(resume=resume, overwrite=overwrite)
        if crew is not None:
            crew.begin(recipe, how, space)
        with one_thread_each():
            return run_preparation(recipe, inputs, settings, space, progress, crew)

    def write(name: str, stage: Recipe) -> tuple[Path, str]:
        if streaming is not None and streaming.budget is not None:
            raise UsageError(
                f"the stage {name!r} has to be written whole",
                why="there is a disk budget, and its output is as large as a model",
                fix="merge that stage by itself first, or leave out --disk-budget",
            )
        if not space.held:  # an output beside unfinished work may be this run's own, as `run` finds out
            space.reserve(resume=resume, overwrite=overwrite or space.root.exists())
        return write_stage(space, name, stage, how, progress)

    here: dict[str, Any] = {"write": write} if crew is None else {"threads": 1, "elsewhere": True}
    if streaming is not None and streaming.budget is not None:
        here["store"] = streaming.store
    try:
        with planned(recipe, **how, **here, prepare=prepare) as plan:
            return run(
                plan,
                space.out,
                resume=resume,
                overwrite=overwrite,
                progress=progress,
                space=space,
                streaming=streaming,
                crew=crew,
                how=how,
            )
    except _Done:
        return _again(space.out, streaming.target if streaming is not None else None)
    finally:
        space.release()


def _streaming(
    space: Workspace, disk_budget: str | int | None, push: str | None, verify: bool, offline: bool
) -> Streaming | None:
    """How inputs and output come and go, where they do."""
    if disk_budget is None and push is None:
        return None
    if push is not None and offline:
        raise UsageError("an output cannot be pushed offline", fix="leave out --offline or --push")
    budget = None if disk_budget is None else parse_size(disk_budget)
    target = None if push is None else Repository(parse_target(push))
    return Streaming(ShardStore(space.root / INPUTS, budget, compare=verify), budget, target)


def run(
    plan: Plan,
    out: Path,
    *,
    resume: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    space: Workspace | None = None,
    streaming: Streaming | None = None,
    crew: Crew | None = None,
    how: dict[str, Any] | None = None,
) -> MergeResult:
    """Carry out a plan; see `merge`. ``space`` is held already where something was prepared in it.

    ``crew``: who does it, if not this process; ``how``: what they are told beside the recipe.
    """
    began = time.monotonic()
    space = space or Workspace(out)
    space.fingerprint = plan.fingerprint()
    target = None if streaming is None else streaming.target
    if resume and space.committed():
        return _again(out, target)
    space.check_target(overwrite=overwrite, inputs=read_from(plan))
    if crew is not None:
        if not space.held:
            space.reserve(resume=resume, overwrite=overwrite)
        crew.begin(plan.recipe, how or {}, space)
    space.claim(resume=resume, overwrite=overwrite)
    try:
        published = target is not None and target.claim(overwrite=overwrite, fingerprint=space.digest)
        if published and streaming is not None and not streaming.releases:
            streaming.target = None
        job = job_of(plan, space.model, space.journal())
        try:
            if streaming is None:
                space.prepare(plan.layout)
                read_back(plan, job, plan.units)
                if crew is not None:
                    crew.work(plan, job, progress)
                else:
                    with one_thread_each():
                        compute_artifacts(plan, job)
                        drain(plan, job, plan.units, progress)
                check_all_done(plan, job)
            elif not (published and streaming.releases):
                streaming.begin(plan, space, job)
                read_back(plan, job, streaming.on_disk(plan, job))
                with one_thread_each():
                    compute_artifacts(plan, job, fork=False)
                    streaming.drain(plan, space, job, progress)
                check_all_done(plan, job)
        finally:
            job.close()
        check_inputs_unchanged(plan)
        if target is not None and streaming is not None and streaming.releases:
            return _finish_on_hub(plan, space, job, streaming, target, began, published)
        check_shards(plan, space.model)
        report = make_report(plan, job, space.digest, time.monotonic() - began)
        if space.preparation:
            report["run"][PREPARED] = digest_of(space.preparation)
        small = small_files(plan, report)
        commit = ""
        if target is not None and streaming is not None:
            commit = target.revision() if published else streaming.publish(plan, space.model, small)
        space.commit(small, plan.layout, overwrite=overwrite)
    finally:
        space.release()
    return MergeResult(out, report, pushed=None if target is None else f"{target.place.path}@{commit}")


def _again(out: Path, target: Repository | None) -> MergeResult:
    """The result of a run that was committed, and killed before it could say so."""
    pushed = None if target is None else f"{target.place.path}@{target.revision()}"
    return MergeResult(out, json.loads((out / REPORT).read_bytes()), pushed=pushed)


def _finish_on_hub(
    plan: Plan, space: Workspace, job: Job, streaming: Streaming, target: Repository, began: float, published: bool
) -> MergeResult:
    """Commit an output of which nothing stays here, and tidy up."""
    if published:
        report, commit = target.report(), target.revision()
    else:
        report = make_report(plan, job, space.digest, time.monotonic() - began)
        commit = streaming.publish(plan, space.model, small_files(plan, report))
    space.abandon()
    return MergeResult(space.out, report, pushed=f"{target.place.path}@{commit}")


def write_stage(
    outer: Workspace, name: str, recipe: Recipe, options: dict[str, Any], progress: Progress | None
) -> tuple[Path, str]:
    """Make a stage's model in the workspace of the run that needs it, unless it is there already.

    Returns:
        its folder, and the digest of the fingerprint of the run that made it. Another recipe or other inputs give
        another fingerprint, and the stage is then made again.
    """
    folder = outer.root / STAGES
    fs.make_folder(folder)
    out = folder / name.replace("/", "--")
    space = Workspace(out)

    def prepare(recipe: Recipe, inputs: dict[str, Checkpoint], settings: Settings) -> Path:
        space.preparation = preparation_of(recipe, inputs, settings)
        space.reserve(resume=True)
        with one_thread_each():
            return run_preparation(recipe, inputs, settings, space, progress)

    def write(inner: str, stage: Recipe) -> tuple[Path, str]:
        return write_stage(outer, inner, stage, options, progress)

    try:
        with planned(recipe, **options, prepare=prepare, write=write) as plan:
            space.fingerprint = plan.fingerprint()
            if not space.holds(plan.layout):
                run(plan, out, resume=space.unfinished(), overwrite=True, progress=progress, space=space)
            return out, space.digest
    finally:
        space.release()


class _Done(Exception):
    """There is nothing left to do."""


def read_from(plan: Plan) -> list[Path]:
    """Where the inputs are: models, files beside them and texts, but not what this run prepared itself."""
    places = places_of(plan.inputs.values())
    own = plan.prepared.resolve() if plan.prepared is not None else None
    return [p for p in (*places, *texts_of(plan.recipe)) if own is None or not p.resolve().is_relative_to(own)]


def check_all_done(plan: Plan, job: Job) -> None:
    """Every unit must be in the journal before anything is called done."""
    if pending(plan.units, plan.graph, job.journal.done):
        raise ResourceError(
            "the journal does not say what was done",
            where=str(job.journal.path),
            why="lines of it were lost after they were written",
            fix="run the same command again: it resumes",
        )


def check_shards(plan: Plan, folder: Path) -> None:
    """Read our own headers back with the strict reader before anything can load them."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for shard in plan.layout.shards:
        if not (folder / shard.file).exists():
            raise ResourceError(
                "a shard is gone",
                where=str(folder / shard.file),
                why="another run, or somebody, removed it while it was written",
                fix="run the same command again",
            )
        header = read_header(folder / shard.file)
        found.update({t.name: (t.dtype, t.shape) for t in header.tensors.values()})
    wanted = {s.name: (s.dtype, s.shape) for s in plan.graph.sinks}
    if found != wanted:
        raise VerificationError(
            "the shards do not hold what was planned", where=str(folder), fix="run again with --restart"
        )
