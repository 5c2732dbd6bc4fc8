"""Extracts a LoRA adapter from a full fine-tune: the nearest low-rank change of every matrix, the rest as it is.

Each matrix's pair is a file of its own in ``OUT.partial/parts`` when it is done, so a run that was killed goes on with
the next matrix; the adapter is put together from them at the end and has its name by one rename.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.dtypes import ITEM_BYTES, OVERFLOWS_AT, torch_dtype
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.open import open_model
from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.checkpoint.writer import write_safetensors
from mergekit_lr.engine.memory import available_cpus, default_limit
from mergekit_lr.engine.plan import choose_device
from mergekit_lr.engine.portion import one_thread_each
from mergekit_lr.engine.progress import Progress, ProgressEvent
from mergekit_lr.engine.target import check_place, places_of
from mergekit_lr.engine.workspace import Workspace
from mergekit_lr.errors import CheckpointError, NonFiniteError, ResourceError, UsageError, join_problems
from mergekit_lr.lowrank.adapters import read_whole
from mergekit_lr.lowrank.extraction import REPORT, Extraction, assemble, differs
from mergekit_lr.lowrank.preparing import run_all
from mergekit_lr.lowrank.sorting import LORA, Embeddings, sort_tensors, stored_transposed
from mergekit_lr.sizes import parse_size

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Extracted:
    """``out``: the adapter's folder. ``report``: what ``merge_report.json`` in it says."""

    out: Path
    report: dict[str, Any]


def extract_lora(
    model: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    embeddings: Embeddings = "save",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str = "float32",
    device: str = "auto",
    max_memory: str | int | None = None,
    threads: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Extracted:
    """Write the fine-tune ``model`` of ``base`` as a PEFT LoRA adapter to the folder ``out``.

    Every changed matrix W gets the pair nearest to ``W - base`` (Frobenius norm, certified to 1e-3 of the optimum),
    with ``lora_alpha`` equal to the rank, so its scale is 1. Changed norms go to ``modules_to_save``, changed biases
    are stored as PEFT does with ``bias: all``. What cannot be in an adapter and differs from the base is an error.

    Args:
        rank: the rank of every pair, lowered to a matrix's smaller side.
        energy: instead the smallest rank that keeps this share of ``||W - base||_F^2``; ``rank`` is then the most.
        embeddings: token embeddings and output heads are saved whole (``save``), get a pair (``lora``), or are left
            out (``drop``).
        include: regular expressions; only matrices in whose name one is found get a pair, the others are dropped.
        exclude: regular expressions of tensors that are dropped whatever they are.
        dtype: of the pairs. Tensors saved whole keep the dtype they have.
        device, max_memory, threads, resume, overwrite, allow_pickle, progress: as in `mergekit_lr.merge`. A matrix
            must fit the budget whole.

    Raises:
        UsageError: neither rank nor energy, or one that makes no sense.
        CheckpointError: the models do not fit each other, or a changed tensor has no place in an adapter.
    """
    from mergekit_lr.lowrank.ranks import RankRule

    _check_arguments(rank, energy, embeddings, dtype)
    check_place(Path(out))
    where = choose_device(device)
    with _opened(base, allow_pickle) as old, _opened(model, allow_pickle) as new:
        rules = sort_tensors(new, old, embeddings=embeddings, include=include, exclude=exclude)
        work = Extraction(new, old, RankRule(rank, energy), rules.rules, DTYPES[dtype], where, rules.warnings)
        space = Workspace(Path(out), _fingerprint(work, embeddings, include, exclude))
        if resume and space.committed():
            return Extracted(space.out, json.loads((space.out / REPORT).read_bytes()))
        space.check_target(overwrite=overwrite, inputs=places_of((new, old)))
        workers = _workers(work, max_memory, threads)
        space.claim(resume=resume, overwrite=overwrite)
        try:
            fs.make_folder(space.root / "parts")
            with one_thread_each():
                _refuse_changed(work, rules.impossible)
                parts = _decompose_all(work, space.root / "parts", workers, progress)
            report = assemble(work, space, parts, overwrite=overwrite)
        finally:
            space.release()
    return Extracted(space.out, report)


def _check_arguments(rank: int | None, energy: float | None, embeddings: str, dtype: str) -> None:
    if rank is None and energy is None:
        raise UsageError("no rank", where="extract-lora", fix="give --rank N, --energy SHARE, or both")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise UsageError(f"rank is {rank!r}", where="extract-lora", fix="give a whole number from 1 on")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy is {energy!r}", where="extract-lora", fix="give a share above 0 and up to 1")
    if embeddings not in ("save", "lora", "drop"):
        raise UsageError(f"embeddings is {embeddings!r}", where="extract-lora", fix="give save, lora or drop")
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}", where="extract-lora", fix=f"give {', '.join(DTYPES)}")


def _opened(reference: str | Path, allow_pickle: bool) -> Checkpoint:
    return open_model(ModelReference.parse(str(reference)), allow_pickle=allow_pickle)


def _fingerprint(work: Extraction, embeddings: str, include: Sequence[str], exclude: Sequence[str]) -> dict[str, Any]:
    from mergekit_lr import __version__

    return {
        "version": __version__,
        "command": "extract-lora",
        "model": work.model.identity(),
        "base": work.base.identity(),
        "rank": [work.rule.rank, work.rule.energy],
        "sorting": [embeddings, list(include), list(exclude)],
        "dtype": work.dtype,
        "device": work.device.partition(":")[0],
    }


def _workers(work: Extraction, max_memory: str | int | None, threads: int | None) -> int:
    from mergekit_lr.lowrank.decompose import working_bytes

    limit = parse_size(max_memory) if isinstance(max_memory, str) else max_memory or default_limit()
    sizes = {n: (work.model.tensors[n].shape, ITEM_BYTES[work.model.tensors[n].dtype]) for n in work.names(LORA)}
    needs = {n: working_bytes(s[0], s[1], item) for n, (s, item) in sizes.items()}
    if not needs:
        return 1
    heaviest = max(needs, key=lambda n: needs[n])
    if needs[heaviest] > limit:
        raise ResourceError(
            f"{heaviest!r} must be held whole",
            where="memory budget",
            why=f"{needs[heaviest] / 2**20:.0f} MiB are needed and {limit / 2**20:.0f} MiB allowed",
            fix=f"allow at least --max-memory {-(-needs[heaviest] // 2**20)}MiB",
        )
    wanted = 1 if work.device != "cpu" else threads or available_cpus()
    return max(1, min(wanted, limit // needs[heaviest]))


def _refuse_changed(work: Extraction, impossible: Mapping[str, str]) -> None:
    problems = [
        f"{work.model.reference}: {n!r} differs from the base and cannot be in an adapter ({why}); "
        "leave it out with --exclude, or merge the full model"
        for n, why in impossible.items()
        if differs(work, n)
    ]
    if problems:
        raise join_problems(CheckpointError, problems)


def _decompose_all(work: Extraction, folder: Path, workers: int, progress: Progress | None) -> dict[str, Path]:
    """The finished part of every changed matrix, in the model's order; unchanged ones are marked by an empty part."""
    names = work.names(LORA)
    parts = {n: folder / f"{i:06d}.safetensors" for i, n in enumerate(names)}
    todo = [n for n in names if not parts[n].exists()]
    total = sum(work.model.tensors[n].nbytes for n in names)
    before = total - sum(work.model.tensors[n].nbytes for n in todo)

    def tell(done: int) -> None:
        if progress is not None:
            size = sum(work.model.tensors[n].nbytes for n in todo[:done])
            progress(ProgressEvent(before + size, total, "extracting"))

    run_all(lambda n: _one(work, n, parts[n]), todo, workers, tell)
    return parts


def _one(work: Extraction, name: str, path: Path) -> None:
    from mergekit_lr.lowrank.decompose import decompose

    if not differs(work, name):
        write_safetensors(path, {}, {"report": "{}"})
        return
    new, old = (read_whole(c, name).to(work.device) for c in (work.model, work.base))
    found = decompose(new, old, work.rule, name)
    left, right = found.pair
    a, b = (left.T, right.T) if stored_transposed(name, work.base) else (right, left)
    facts = {"rank": found.rank, "residual": found.residual, "norm": found.norm}
    tensors = {"a": _cast(a, work.dtype, name), "b": _cast(b, work.dtype, name)}
    write_safetensors(path, tensors, {"report": json.dumps(facts)})


def _cast(tensor: Any, dtype: str, name: str) -> Any:
    if tensor.numel() and not float(tensor.abs().max()) < OVERFLOWS_AT[dtype]:
        raise NonFiniteError(f"a factor of {name!r} does not fit {dtype}", fix="choose another --dtype")
    return tensor.to(torch_dtype(dtype)).cpu().contiguous()
