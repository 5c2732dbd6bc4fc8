"""The public ``recover``: a task of a bundle as a model folder, by the engine."""

from __future__ import annotations

from pathlib import Path

from mergekit_lr.engine.plan import DEFAULT_SHARD
from mergekit_lr.engine.progress import Progress
from mergekit_lr.engine.run import MergeResult, merge


def recover(
    bundle: str | Path,
    task: str,
    out: str | Path,
    *,
    base: str | Path | None = None,
    device: str = "auto",
    max_memory: str | int | None = None,
    threads: int | None = None,
    shard_size: str | int = DEFAULT_SHARD,
    resume: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Write one task of a bundle to the model folder ``out``.

    The same bundle and task give the same bytes, whatever the threads, the memory budget and interruptions.

    Args:
        base: where the base model is, for a bundle that does not hold it; by default where it was at packing.
        other arguments: as in `merge`.

    Raises:
        CheckpointError: not a bundle, or a part of it is missing, altered or of a newer version.
        UsageError: there is no such task; the nearest names are shown.
    """
    recipe = {
        "merge_method": "recover",
        "models": [{"model": str(bundle)}],
        "parameters": {"task": task} | ({} if base is None else {"base": str(base)}),
    }
    return merge(
        recipe,
        out,
        device=device,
        max_memory=max_memory,
        threads=threads,
        shard_size=shard_size,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )
