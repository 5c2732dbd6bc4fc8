"""The command that makes a mixture of experts of dense models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergekit_lr.cli.app import (
    AllowPickle,
    Device,
    Json,
    MaxMemory,
    Overwrite,
    Quiet,
    Resume,
    ShardSize,
    Threads,
    command,
    print_result,
    say,
)


@command
def moe(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A mergekit-moe file.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    device: Device = "auto",
    max_memory: MaxMemory = None,
    threads: Threads = None,
    shard_size: ShardSize = "5GB",
    resume: Resume = True,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a mixture of experts of dense models, as CONFIG says, in the folder OUT."""
    import mergekit_lr
    from mergekit_lr.progress import show_progress
    from mergekit_lr.recipe.moe_file import load_moe

    loaded = load_moe(config)
    if not quiet:
        for line in loaded.warnings:
            say(f"warning: {line}")
    with show_progress(quiet) as progress:
        result = mergekit_lr.moe(
            loaded,
            out,
            device=device,
            max_memory=max_memory,
            threads=threads,
            shard_size=shard_size,
            resume=resume,
            overwrite=overwrite,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    if not quiet:
        for line in result.report.get("warnings", []):
            if line not in loaded.warnings:
                say(f"warning: {line}")
    print_result(result.out, result.report, as_json)
