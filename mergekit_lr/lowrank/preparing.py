"""What `reversible` finds out before it can lay out its bundle: pairs of full fine-tunes, what differs, spectra.

Everything is kept in files that are complete when they have their name: ``pairs/NNNNNN.safetensors`` for each matrix
that a full fine-tune may have changed, ``differs.json``, ``spectra.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.dtypes import ITEM_BYTES
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.writer import write_safetensors
from mergekit_lr.engine.portion import one_thread_each
from mergekit_lr.errors import ResourceError
from mergekit_lr.lowrank.adapters import read_whole
from mergekit_lr.lowrank.extraction import same_tensor

if TYPE_CHECKING:
    from mergekit_lr.linalg.lowrank import Pair
    from mergekit_lr.lowrank.ranks import RankRule
    from mergekit_lr.rewrite import Preparation

PAIRS, DIFFERS, SPECTRA = "pairs", "differs.json", "spectra.json"


@dataclass(frozen=True)
class FullTask:
    """A full fine-tune: its name, its model, the matrices that become pairs, and every other tensor of it."""

    name: str
    checkpoint: Checkpoint
    matrices: tuple[str, ...]
    others: tuple[str, ...]


def pair_name(task: str, weight: str, side: str) -> str:
    """The tensor of ``pairs/`` that holds a factor: ``side`` is a or b."""
    return f"{task}/{weight}/{side}"


def prepare_pairs(
    work: Preparation, base: Checkpoint, tasks: Sequence[FullTask], rule: RankRule, turned: Callable[[str], bool]
) -> None:
    """Decompose every matrix of every full fine-tune, and note which tensors differ from the base at all."""
    from mergekit_lr.lowrank.decompose import working_bytes

    weights = [n for n in base.tensors if any(n in t.matrices for t in tasks)]
    if not tasks:
        return
    folder = work.folder / PAIRS
    fs.make_folder(folder)
    paths = {n: folder / f"{i:06d}.safetensors" for i, n in enumerate(weights)}
    todo = [n for n in weights if not paths[n].exists()]
    shapes = {n: (base.tensors[n].shape, ITEM_BYTES[base.tensors[n].dtype]) for n in todo}
    needs = {n: working_bytes(s[0], s[1], item) for n, (s, item) in shapes.items()}
    workers = _workers(work, needs)

    def one(weight: str) -> None:
        found = {}
        for task in tasks:
            if weight in task.matrices and not same_tensor(task.checkpoint, base, weight):
                b, a = _pair(work, base, task, weight, rule)
                b, a = (a.T, b.T) if turned(weight) else (b, a)
                found[pair_name(task.name, weight, "b")] = b.cpu().contiguous()
                found[pair_name(task.name, weight, "a")] = a.cpu().contiguous()
        write_safetensors(paths[weight], found)

    with one_thread_each():
        run_all(one, todo, workers, lambda done: work.tell(done, len(todo), "decomposing"))
    if not (work.folder / DIFFERS).exists():
        found = {
            t.name: [n for n in t.others if n not in base.tensors or not same_tensor(t.checkpoint, base, n)]
            for t in tasks
        }
        write_json(work.folder / DIFFERS, found)


def _pair(work: Preparation, base: Checkpoint, task: FullTask, weight: str, rule: RankRule) -> Pair:
    from mergekit_lr.lowrank.decompose import decompose

    new, old = (read_whole(c, weight).to(work.device) for c in (task.checkpoint, base))
    return decompose(new, old, rule, weight, work.recipe.seed).pair


def _workers(work: Preparation, needs: Mapping[str, int]) -> int:
    if not needs:
        return 1
    heaviest = max(needs, key=lambda n: needs[n])
    if needs[heaviest] > work.limit:
        raise ResourceError(
            f"{heaviest!r} must be held whole",
            where="memory budget",
            why=f"{needs[heaviest] / 2**20:.0f} MiB are needed and {work.limit / 2**20:.0f} MiB allowed",
            fix=f"allow at least --max-memory {-(-needs[heaviest] // 2**20)}MiB",
        )
    return max(1, min(work.threads if work.device == "cpu" else 1, work.limit // needs[heaviest]))


def run_all(do: Callable[[str], None], todo: Sequence[str], workers: int, tell: Callable[[int], None]) -> None:
    """``do`` every name in so many threads; the first failure cancels what has not begun."""
    if workers == 1:
        for done, name in enumerate(todo, 1):
            do(name)
            tell(done)
        return
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(do, n) for n in todo]
        try:
            for done, future in enumerate(futures, 1):
                future.result()
                tell(done)
        finally:
            for future in futures:
                future.cancel()


def prepare_spectra(work: Preparation, weights: Iterable[str], spectra_of: Callable[[str], dict[str, Any]]) -> None:
    """Keep what packing each weight would leave, for a choice of p by budget or by error."""
    path = work.folder / SPECTRA
    if path.exists():
        return
    with one_thread_each():
        write_json(path, {weight: spectra_of(weight) for weight in weights})


def write_json(path: Path, content: Any) -> None:
    """Write a file that is complete when it has its name."""
    partial = path.with_name(path.name + ".partial")
    fs.write_file(partial, json.dumps(content).encode())
    fs.rename(partial, path)
