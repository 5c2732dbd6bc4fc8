"""Commands that carry out a recipe, or look at one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_lr.cli.app import (
    AllowPickle,
    Device,
    Json,
    MaxMemory,
    Offline,
    Overwrite,
    Quiet,
    RecipePath,
    Resume,
    ShardSize,
    StageName,
    Threads,
    command,
    print_json,
    print_result,
    say,
    show,
)

if TYPE_CHECKING:
    from mergekit_lr.recipe import Recipe


@command
def merge(
    recipe: RecipePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    device: Device = "auto",
    max_memory: MaxMemory = None,
    threads: Threads = None,
    shard_size: ShardSize = "5GB",
    resume: Resume = True,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    stage: StageName = None,
    part: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Do one of N parts, on storage that all share; the last one writes OUT."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Use N worker processes of Ray, or at most N tasks of --ray.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Use a Ray cluster: auto, or HOST:PORT of its head.")
    ] = None,
    offline: Offline = False,
    verify_inputs: Annotated[
        bool, typer.Option("--verify-inputs", help="Compare downloads with the digests that the Hub states.")
    ] = False,
    disk_budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Most disk for weights, such as 50GB: Hub shards come and go."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="Push the output to this repository on the Hub, private if it is new."),
    ] = None,
    copy_code: Annotated[
        bool, typer.Option("--copy-code", help="Carry the model's Python files over too. They are not run.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge the models of RECIPE into the folder OUT."""
    import mergekit_lr
    from mergekit_lr.progress import show_progress
    from mergekit_lr.recipe import load_recipe

    loaded = load_recipe(recipe, stage=stage)
    if not quiet:
        for line in loaded.warnings:
            say(f"warning: {line}")
    with show_progress(quiet) as progress:
        result = mergekit_lr.merge(
            loaded,
            out,
            device=device,
            max_memory=max_memory,
            threads=threads,
            shard_size=shard_size,
            resume=resume,
            overwrite=overwrite,
            allow_pickle=allow_pickle,
            part=part,
            workers=workers,
            ray=ray,
            offline=offline,
            verify_inputs=verify_inputs,
            disk_budget=disk_budget,
            push=push,
            copy_code=copy_code,
            progress=progress,
        )
    if not quiet:
        for line in result.report.get("warnings", []):
            if line not in loaded.warnings:
                say(f"warning: {line}")
    pushed = {} if result.pushed is None else {"pushed": result.pushed}
    if result.waiting_for:
        if as_json:
            print_json({"out": str(result.out), "part": part, "waiting_for": list(result.waiting_for)})
        elif not quiet:
            say(f"part {part} is done; not done yet: {', '.join(map(str, result.waiting_for))}")
    elif as_json:
        print_json({"out": str(result.out), **pushed, **result.report})
    else:
        if result.pushed is None or disk_budget is None:
            print(result.out)
        if result.pushed is not None:
            print(result.pushed)


@command
def recover(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle.", show_default=False)],
    task: Annotated[str, typer.Argument(metavar="TASK", help="Name of one of its tasks.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The base model, if the bundle does not hold it and it was moved."),
    ] = None,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    threads: Threads = None,
    shard_size: ShardSize = "5GB",
    resume: Resume = True,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one task of BUNDLE as a model into the folder OUT."""
    import mergekit_lr
    from mergekit_lr.progress import show_progress

    with show_progress(quiet) as progress:
        result = mergekit_lr.recover(
            bundle,
            task,
            out,
            base=base,
            device=device,
            max_memory=max_memory,
            threads=threads,
            shard_size=shard_size,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    if not quiet:
        for line in result.report.get("warnings", []):
            say(f"warning: {line}")
    print_result(result.out, result.report, as_json)


@command
def plan(
    recipe: RecipePath,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    threads: Threads = None,
    shard_size: ShardSize = "5GB",
    allow_pickle: AllowPickle = False,
    stage: StageName = None,
    bandwidth: Annotated[
        str | None, typer.Option(metavar="RATE", help="Bytes a second of the storage, such as 2GB/s, for the time.")
    ] = None,
    graph: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw the graph, summarised by layer.", show_default=False)
    ] = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Say what a merge would read, write and hold in memory. Reads no weights."""
    import mergekit_lr

    result = mergekit_lr.plan(
        recipe,
        stage=stage,
        device=device,
        max_memory=max_memory,
        threads=threads,
        shard_size=shard_size,
        allow_pickle=allow_pickle,
        bandwidth=bandwidth,
        graph=graph,
        offline=offline,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        show(result.summary_lines())


@command
def check(recipe: RecipePath, stage: StageName = None, as_json: Json = False) -> None:
    """Check RECIPE alone: every mistake, with line and column. Opens no model."""
    from mergekit_lr.recipe import load_recipe

    loaded = load_recipe(recipe, stage=stage)
    if as_json:
        print_json({"recipe": loaded.canonical(), "digest": loaded.digest(), "warnings": list(loaded.warnings)})
        return
    for line in loaded.warnings:
        say(f"warning: {line}")
    print(f"{recipe}: ok, {_in_words(loaded)}")
    for name, made in loaded.stages:
        print(f"  after the stage {name}: {_in_words(made)}")


@command
def import_(recipe: RecipePath, stage: StageName = None, as_json: Json = False) -> None:
    """Show what a mergekit recipe means here: every default written out, every difference in meaning."""
    from mergekit_lr.recipe import load_recipe
    from mergekit_lr.recipe.differences import differences, normalised

    loaded = load_recipe(recipe, stage=stage)
    found = differences(loaded)
    if as_json:
        told = [{"about": d.about, "there": d.there, "here": d.here} for d in found]
        print_json({"recipe": loaded.canonical(), "differences": told, "warnings": list(loaded.warnings)})
        return
    for line in loaded.warnings:
        say(f"warning: {line}")
    print(normalised(loaded), end="")


def _in_words(recipe: Recipe) -> str:
    count = len(recipe.input_models())
    return f"{recipe.merge_method} of {count} model{'s' if count != 1 else ''}"
