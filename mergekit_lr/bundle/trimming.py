"""TIES' thresholds over whole task vectors, found before anything is packed.

The looks are those of `mergekit_lr.sparsify.LargestMagnitude` with ``threshold_scope: model``: two of all tensors that
compete, seldom three.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.bundle.grid import Open
from mergekit_lr.bundle.masking import TRIM, Share, Trimming
from mergekit_lr.bundle.memory import FilePart
from mergekit_lr.checkpoint import fs
from mergekit_lr.lazy import torch
from mergekit_lr.method import GRID, Call, Pass, Piece
from mergekit_lr.pieces import drive, sample_spans
from mergekit_lr.rewrite import Preparation
from mergekit_lr.selection import KEEP_ALL, KEEP_NOTHING, Cut, ModelCut

if TYPE_CHECKING:
    from torch import Tensor

FOUND = "thresholds.json"
PIECE = 4 * GRID


def find_cuts(work: Preparation, tensors: Sequence[Open], tasks: Sequence[str]) -> None:
    """For each of ``tasks`` the cut over all of ``tensors``, into ``thresholds.json``."""
    if (work.folder / FOUND).exists():
        return
    calls = [_call(tensor, tasks) for tensor in tensors]
    jobs = list(zip(tensors, calls, strict=True))

    def look(asked: Pass[Any, Any]) -> Any:
        total = None
        with ThreadPoolExecutor(work.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            partials = pool.map(lambda job: _look_at(asked, job[0], job[1], tasks), jobs)
            for number, partial in enumerate(partials):
                total = partial if total is None else asked.fold(total, partial)
                work.tell(number + 1, len(jobs), "finding thresholds")
        return asked.finish(total)

    cuts = drive(TRIM.model_statistics(calls), look)
    found = {t: asdict(cut) | {"before": sorted(cut.before)} for t, cut in zip(tasks, cuts, strict=True)}
    partial = work.folder / (FOUND + ".partial")
    fs.write_file(partial, json.dumps(found, indent=1).encode())
    fs.rename(partial, work.folder / FOUND)


def found_cuts(prepared: Path | None) -> dict[str, ModelCut]:
    """What `find_cuts` found: task -> cut; nothing before."""
    if prepared is None or not (prepared / FOUND).exists():
        return {}
    content = json.loads((prepared / FOUND).read_bytes())
    return {t: ModelCut(**c | {"before": frozenset(c["before"])}) for t, c in content.items()}


def cuts_of(name: str, density: float, tasks: Sequence[str], found: Mapping[str, ModelCut]) -> tuple[Cut, ...]:
    """The cut of one tensor for each of ``tasks``. A tensor that is kept whole, or not at all, does not compete."""
    if not 0 < density < 1:
        return (KEEP_ALL if density >= 1 else KEEP_NOTHING,) * len(tasks)
    return tuple(found[t].for_tensor(name) for t in tasks)


def _call(tensor: Open, tasks: Sequence[str]) -> Call:
    """All tasks, so that every tensor has the same streams; one without this tensor keeps all of nothing."""
    job = tensor.packing
    shares = tuple(Share(density=job.density if t in tensor.tasks else 1.0) for t in tasks)
    return Call(name=job.name, shape=job.shape, merge=Trimming(threshold_scope="model"), models=shares, has_base=True)


def _look_at(asked: Pass[Any, Any], tensor: Open, call: Call, tasks: Sequence[str]) -> Any:
    total = None
    for start, stop in _runs(tensor, asked.sample):
        base, *own = (FilePart(c, call.name).take(start, stop).to(torch.float32) for c in tensor.checkpoints)
        deltas = {t: x.sub_(base) for t, x in zip(tensor.tasks, own, strict=True)}
        nothing: Tensor = base[:0]
        total = asked.fold(total, asked.map(call, Piece([deltas.get(t, nothing) for t in tasks], None, start)))
    return total


def _runs(tensor: Open, sample: int | None) -> Iterator[tuple[int, int]]:
    job = tensor.packing
    if sample:
        yield from ((s.start, s.stop) for s in sample_spans(job.shape, sample))
        return
    for start in range(0, job.numel, PIECE) or [0]:
        yield start, min(job.numel, start + PIECE)
