"""The public ``plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_lr.engine.plan import DEFAULT_SHARD, Plan, planned
from mergekit_lr.recipe import Recipe


def plan(
    recipe: Recipe | str | Path | dict[str, Any],
    *,
    device: str = "auto",
    max_memory: str | int | None = None,
    threads: int | None = None,
    shard_size: str | int = DEFAULT_SHARD,
    allow_pickle: bool = False,
) -> Plan:
    """What a merge would read, write and hold in memory, from headers alone. Arguments as in `merge`."""
    with planned(
        recipe,
        device=device,
        max_memory=max_memory,
        threads=threads,
        shard_size=shard_size,
        allow_pickle=allow_pickle,
        headers_only=True,
    ) as laid_out:
        return laid_out
