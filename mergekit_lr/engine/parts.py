"""``--part I/N``: one of several processes, on any machines that share a folder, that write one output together.

Each part is the same run as a whole one up to the plan, then does its own share of the units (`shares.cut`), makes it
durable and says so. Whoever finds every part done writes the small files and renames. A part that died is run again;
one that is done already, or whose output is complete, has nothing left to do.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.engine.artifacts import compute_artifacts
from mergekit_lr.engine.beside import texts_of
from mergekit_lr.engine.identity import identity
from mergekit_lr.engine.job import Job
from mergekit_lr.engine.manifest import make_report, small_files
from mergekit_lr.engine.plain import NotPlain, from_text, to_text
from mergekit_lr.engine.plan import Plan, Settings, planned
from mergekit_lr.engine.portion import (
    check_inputs_unchanged,
    drain,
    job_of,
    make_durable,
    one_thread_each,
    read_back,
)
from mergekit_lr.engine.prepare import FOLDER, prepare_in
from mergekit_lr.engine.progress import Progress
from mergekit_lr.engine.run import MergeResult, check_shards
from mergekit_lr.engine.shared_space import Finished, SharedSpace
from mergekit_lr.engine.shares import cut, touching
from mergekit_lr.engine.target import places_of
from mergekit_lr.engine.units import Unit, pending
from mergekit_lr.errors import MergekitLrError, UsageError
from mergekit_lr.recipe import Recipe

MOST = 100_000  # parts
STATISTICS = "statistics"


def parse_part(text: str) -> tuple[int, int]:
    """``"2/4"`` as (2, 4).

    Raises:
        UsageError: it is not I/N with 1 <= I <= N.
    """
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if found is None or not int(found[1]) <= int(found[2]) <= MOST:
        raise UsageError(f"the part {text!r} is not one", fix="write I/N, such as 1/4 for the first of four")
    return int(found[1]), int(found[2])


def merge_part(
    recipe: Recipe | str | Path | dict[str, Any],
    out: Path,
    part: str,
    settings: Mapping[str, Any],
    *,
    resume: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Do one part of `mergekit_lr.merge`; ``settings`` are those that decide how."""
    number, count = parse_part(part)
    if not resume:
        raise UsageError(
            "one part cannot discard the others' work", fix=f"remove {out}.partial, then run every part once"
        )
    space = SharedSpace(out, number=number, count=count)

    def prepare(recipe: Recipe, inputs: dict[str, Checkpoint], settings: Settings) -> Path:
        _join(space, recipe, inputs, settings, overwrite)
        with one_thread_each():
            return space.once(FOLDER, lambda folder: prepare_in(folder, recipe, inputs, settings, progress))

    try:
        with planned(recipe, **settings, prepare=prepare) as plan:
            if not space.fingerprint:
                own = plan.outline.extra if plan.outline else {}
                inputs = {m: c for m, c in plan.inputs.items() if m not in own}
                _join(space, plan.recipe, inputs, plan.settings, overwrite)
            waiting_for = _run(plan, space, overwrite, progress)
    except Finished:
        waiting_for = ()
    except (MergekitLrError, OSError):
        # Whatever went wrong, nothing did if the others finished the output meanwhile and tidied up.
        if not space.fingerprint or not space.finished():
            raise
        waiting_for = ()
    if waiting_for:
        return MergeResult(out, {}, waiting_for)
    space.tidy()
    return MergeResult(out, json.loads((out / "merge_report.json").read_bytes()))


def _join(
    space: SharedSpace, recipe: Recipe, inputs: Mapping[str, Checkpoint], settings: Settings, overwrite: bool
) -> None:
    space.fingerprint = {**identity(recipe, inputs, settings), "parts": space.count}
    if space.finished():
        raise Finished
    space.check_target(overwrite=overwrite, inputs=[*places_of(inputs.values()), *texts_of(recipe)])
    space.join()


def _run(plan: Plan, space: SharedSpace, overwrite: bool, progress: Progress | None) -> tuple[int, ...]:
    """Do this part if it is not done, and the commit if all are; returns the parts that are not done."""
    began = time.monotonic()
    shares = cut(plan, space.count)
    job = None
    if not space.is_done(space.number):
        if space.count > len(space.missing()) and not space.model.exists():
            space.await_output()
        space.once("model", lambda folder: space.lay_down(folder, plan.layout))
        job = job_of(plan, space.model, space.journal())
        _do(plan, job, space, shares[space.number - 1], progress)
        check_inputs_unchanged(plan)
        keys = [u.key(plan.graph) for u in shares[space.number - 1]]
        space.mark_done([job.journal.done[k] for k in keys], job.warnings)
    missing = space.missing()
    if not missing:
        _commit(plan, space, shares, overwrite, began)
    return missing


def _do(plan: Plan, job: Job, space: SharedSpace, units: Sequence[Unit], progress: Progress | None) -> None:
    """Do what is left of ``units``, and wait until it is durable."""
    try:
        read_back(plan, job, units)
        if pending(units, plan.graph, job.journal.done):
            with one_thread_each():
                _statistics(plan, job, space)
                drain(plan, job, units, progress)
        make_durable(plan, job, units)
    finally:
        job.close()


def _statistics(plan: Plan, job: Job, space: SharedSpace) -> None:
    """What methods must know of the whole model: computed by one part, read by the others."""
    if not plan.graph.artifacts or job.artifacts:
        return

    def make(folder: Path) -> None:
        compute_artifacts(plan, job)
        try:
            text = to_text(job.artifacts)
        except NotPlain:
            text = ""  # the others compute it themselves
        fs.write_file(folder / "values.json", text.encode())

    values = (space.once(STATISTICS, make) / "values.json").read_text()
    if not job.artifacts and values:
        job.artifacts.update(from_text(values))
    elif not job.artifacts:
        compute_artifacts(plan, job)


def _commit(plan: Plan, space: SharedSpace, shares: Sequence[Sequence[Unit]], overwrite: bool, began: float) -> None:
    """Check what several machines had a hand in, and rename."""
    job = job_of(plan, space.model, space.journal())
    job.journal.done, job.warnings = space.records()
    _do(plan, job, space, touching(plan, shares), None)
    check_inputs_unchanged(plan)
    check_shards(plan, space.model)
    report = make_report(plan, job, space.digest, time.monotonic() - began)
    report["run"]["parts"] = space.count
    space.commit_parts(small_files(plan, report), overwrite=overwrite)
