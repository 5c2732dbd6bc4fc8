"""The public ``plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.retry import offline as offline_mode
from mergekit_lr.engine.describe import picture
from mergekit_lr.engine.plan import DEFAULT_SHARD, Plan, planned
from mergekit_lr.recipe import Recipe, load_recipe
from mergekit_lr.sizes import parse_bandwidth


def plan(
    recipe: Recipe | str | Path | dict[str, Any],
    *,
    device: str = "auto",
    max_memory: str | int | None = None,
    threads: int | None = None,
    shard_size: str | int = DEFAULT_SHARD,
    allow_pickle: bool = False,
    stage: str | None = None,
    bandwidth: str | int | float | None = None,
    graph: str | Path | None = None,
    offline: bool = False,
) -> Plan:
    """What a merge would read, write and hold in memory, from headers alone. Arguments as in `merge`.

    Args:
        bandwidth: bytes a second of the storage, such as ``"2GB/s"``: the plan then says how long its bytes take.
        graph: an SVG file to draw the graph in, summarised by layer.
        offline: ask nothing of the Hub; use what is in its cache.
    """
    rate = None if bandwidth is None else parse_bandwidth(bandwidth)
    with (
        offline_mode(offline),
        planned(
            load_recipe(recipe, stage=stage),
            device=device,
            max_memory=max_memory,
            threads=threads,
            shard_size=shard_size,
            allow_pickle=allow_pickle,
            headers_only=True,
        ) as laid_out,
    ):
        laid_out.bandwidth = rate
        if graph is not None:
            fs.write_file(Path(graph), picture(laid_out).encode())
        return laid_out
