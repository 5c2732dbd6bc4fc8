"""The command that makes an adapter of a fine-tune."""

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
    Threads,
    command,
    print_result,
    say,
)


@command
def extract_lora(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The fine-tune: folder, file or Hub id.")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that it was trained from.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    rank: Annotated[int | None, typer.Option(metavar="N", min=1, help="Rank of every pair, or the most.")] = None,
    energy: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Smallest ranks that keep this share, such as 0.9.")
    ] = None,
    embeddings: Annotated[
        str, typer.Option(metavar="save|lora|drop", help="What becomes of token embeddings and output heads.")
    ] = "save",
    include: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Only matrices whose name matches get a pair.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Leave tensors out whose name matches.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="float32|bfloat16|float16", help="What pairs are stored in.")
    ] = "float32",
    device: Device = "auto",
    max_memory: MaxMemory = None,
    threads: Threads = None,
    resume: Resume = True,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write what a fine-tune changed as a PEFT LoRA adapter of its base."""
    import mergekit_lr
    from mergekit_lr.cli.text import extraction_lines
    from mergekit_lr.progress import show_progress

    with show_progress(quiet) as progress:
        result = mergekit_lr.extract_lora(
            model,
            base,
            out,
            rank=rank,
            energy=energy,
            embeddings=embeddings,  # type: ignore[arg-type]  # checked there
            include=include or (),
            exclude=exclude or (),
            dtype=dtype,
            device=device,
            max_memory=max_memory,
            threads=threads,
            resume=resume,
            overwrite=overwrite,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    if not quiet:
        for line in result.report["warnings"]:
            say(f"warning: {line}")
        for line in extraction_lines(result.report):
            say(line)
    print_result(result.out, result.report, as_json)
