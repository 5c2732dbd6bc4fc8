"""Runs a plan from start to commit."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.retry import offline as offline_mode
from mergekit_lr.engine.artifacts import compute_artifacts
from mergekit_lr.engine.manifest import make_report, small_files
from mergekit_lr.engine.plan import DEFAULT_SHARD, Plan, Settings, planned
from mergekit_lr.engine.portion import check_inputs_unchanged, drain, job_of, one_thread_each, read_back
from mergekit_lr.engine.prepare import run_preparation
from mergekit_lr.engine.progress import Progress
from mergekit_lr.engine.workspace import Workspace
from mergekit_lr.errors import VerificationError
from mergekit_lr.recipe import Recipe

STAGES = "stages"
"""Folder in the workspace that holds the stages which had to be written."""


@dataclass(frozen=True)
class MergeResult:
    """``out``: the finished folder. ``report``: what ``merge_report.json`` in it says.

    ``waiting_for``: parts that are not done yet; ``out`` is not there then, and ``report`` is empty.
    """

    out: Path
    report: dict[str, Any]
    waiting_for: tuple[int, ...] = ()


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
    offline: bool = False,
    verify_inputs: bool = False,
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
        offline: ask nothing of the Hub; use what is in its cache.
        verify_inputs: compare what was downloaded from the Hub with the digests that it states.
        progress: called from this thread a few times a second.

    Raises:
        MergekitLrError: one of the family in `mergekit_lr.errors`; nothing is left at ``out`` then.
    """
    if part is not None:
        from mergekit_lr.engine.parts import merge_part

        settings = {"device": device, "max_memory": max_memory, "threads": threads, "shard_size": shard_size}
        settings |= {"allow_pickle": allow_pickle, "verify": verify_inputs}
        with offline_mode(offline):
            return merge_part(recipe, Path(out), part, settings, resume=resume, overwrite=overwrite, progress=progress)
    target = Path(out)
    space = Workspace(target)

    def prepare(recipe: Recipe, inputs: dict[str, Checkpoint], settings: Settings) -> Path:
        space.reserve(resume=resume, overwrite=overwrite)
        with one_thread_each():
            return run_preparation(recipe, inputs, settings, space, progress)

    def write(name: str, stage: Recipe) -> tuple[Path, str]:
        if not space.held:
            space.reserve(resume=resume, overwrite=overwrite)
        return write_stage(space, name, stage, options, progress)

    options: dict[str, Any] = {
        "device": device,
        "max_memory": max_memory,
        "threads": threads,
        "shard_size": shard_size,
        "allow_pickle": allow_pickle,
        "verify": verify_inputs,
    }
    try:
        with offline_mode(offline), planned(recipe, **options, prepare=prepare, write=write) as plan:
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
    used = [place for c in plan.inputs.values() for place in c.places()]
    space.check_target(overwrite=overwrite, inputs=used)
    space.claim(resume=resume)
    try:
        space.prepare(plan.layout)
        job = job_of(plan, space.model, space.journal())
        try:
            read_back(plan, job, plan.units)
            with one_thread_each():
                compute_artifacts(plan, job)
                drain(plan, job, plan.units, progress)
        finally:
            job.close()
        check_inputs_unchanged(plan)
        check_shards(plan, space.model)
        report = make_report(plan, job, space.digest, time.monotonic() - began)
        space.commit(small_files(plan, report), plan.layout, overwrite=overwrite)
    finally:
        space.release()
    return MergeResult(out, report)


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


def check_shards(plan: Plan, folder: Path) -> None:
    """Read our own headers back with the strict reader before anything can load them."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for shard in plan.layout.shards:
        header = read_header(folder / shard.file)
        found.update({t.name: (t.dtype, t.shape) for t in header.tensors.values()})
    wanted = {s.name: (s.dtype, s.shape) for s in plan.graph.sinks}
    if found != wanted:
        raise VerificationError(
            "the shards do not hold what was planned", where=str(folder), fix="run again with --restart"
        )
