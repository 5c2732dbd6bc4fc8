"""The command that gives a model another model's tokenizer."""

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

WHERE = "no|embed|lm_head|yes"


@command
def transplant(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model: folder or Hub id.", show_default=False)],
    donor: Annotated[str, typer.Argument(metavar="DONOR", help="Whose tokenizer it gets.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    k: Annotated[int, typer.Option("--k", "-k", metavar="N", min=1, help="Most shared tokens in a combination.")] = 64,
    approximation_method: Annotated[
        str,
        typer.Option(
            metavar="omp|common_interpolation|subword|mean|zero|randn", help="How rows of new tokens are made."
        ),
    ] = "omp",
    cosine_similarity: Annotated[
        bool, typer.Option("--cosine-similarity", help="common_interpolation: nearest by cosine.")
    ] = False,
    weight_scheme: Annotated[
        str,
        typer.Option(
            metavar="distance_proportional|barycentric|least_squares",
            help="common_interpolation: weights of the nearest.",
        ),
    ] = "distance_proportional",
    subword_method: Annotated[
        str, typer.Option(metavar="mean|sum|weighted_mean|first_last", help="subword: how pieces are joined.")
    ] = "mean",
    prefix_match: Annotated[
        str, typer.Option(metavar=WHERE, help="Where a token may get the row of one that it begins with.")
    ] = "no",
    byte_match: Annotated[
        str, typer.Option(metavar=WHERE, help="Where a letter and the byte of it are the same token.")
    ] = "no",
    dtype: Annotated[
        str | None, typer.Option(metavar="float32|bfloat16|float16", help="What to write. [default: as stored]")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Decides what randn draws.")] = 0,
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
    """Give MODEL the tokenizer of DONOR, without training."""
    import mergekit_lr
    from mergekit_lr.progress import show_progress

    with show_progress(quiet) as progress:
        result = mergekit_lr.transplant(
            model,
            donor,
            out,
            k=k,
            approximation_method=approximation_method,
            cosine_similarity=cosine_similarity,
            weight_scheme=weight_scheme,
            subword_method=subword_method,
            prefix_match=prefix_match,
            byte_match=byte_match,
            dtype=dtype,
            seed=seed,
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
        for line in result.report["warnings"]:
            say(f"warning: {line}")
        found = result.report["details"]
        say(f"{found['matched']:,} of {found['tokens']:,} tokens are known, {found['approximated']:,} rows were made")
    print_result(result.out, result.report, as_json)
