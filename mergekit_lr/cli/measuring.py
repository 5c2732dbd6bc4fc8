"""Commands that run a model on text, to learn what a merge needs or how good one is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergekit_lr.cli.app import (
    Device,
    Json,
    MaxMemory,
    Overwrite,
    Quiet,
    RecipePath,
    Resume,
    command,
    print_json,
    say,
)
from mergekit_lr.errors import UsageError


@command
def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a model.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write, .safetensors.", show_default=False)],
    more: Annotated[list[str] | None, typer.Argument(metavar="FILE", hidden=True)] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE...",
            help="Text to run, or a Hub dataset ORG/NAME[:CONFIG[:SPLIT]]; several may follow.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Windows of text, spread over the texts.")] = 128,
    sequence_length: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of a window.")] = 512,
    grams: Annotated[
        list[str] | None,
        typer.Option(
            metavar="linear|input|hidden",
            help="Form Grams too: the inputs of every Linear, of each mixture, of each expert's down projection. "
            "May be repeated.",
            show_default=False,
        ),
    ] = None,
    similarity_tokens: Annotated[
        int, typer.Option(metavar="N", min=0, help="Tokens that all experts are run on, to compare them.")
    ] = 4096,
    dtype: Annotated[
        str,
        typer.Option(metavar="auto|float32|bfloat16|float16", help="What is computed in; auto is float32 on a CPU."),
    ] = "auto",
    device: Device = "auto",
    max_memory: MaxMemory = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Decides which windows and tokens are taken.")] = 0,
    resume: Resume = True,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write what a model's experts and layers do on text."""
    import mergekit_lr
    from mergekit_lr.progress import show_progress

    if not text:
        raise UsageError("there is no text to calibrate on", fix="add --text FILE")
    with show_progress(quiet) as progress:
        result = mergekit_lr.calibrate(
            model,
            out,
            [*text, *(more or [])],
            samples=samples,
            sequence_length=sequence_length,
            grams=grams or (),
            similarity_tokens=similarity_tokens,
            dtype=dtype,
            device=device,
            max_memory=max_memory,
            seed=seed,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print_json(result)
    else:
        print(result["out"])


@command
def barrier(
    recipe: RecipePath,
    more: Annotated[list[Path] | None, typer.Argument(metavar="FILE", hidden=True)] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE...", help="Text to measure on; several may follow.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="inputs and labels (.safetensors), for a model without config.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw curves and layers.")] = None,
    points: Annotated[int, typer.Option(metavar="N", min=3, help="Places between the two models.")] = 11,
    activation: Annotated[
        str, typer.Option(metavar="NAME", help="Of a model without config: relu, gelu, ...")
    ] = "relu",
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens measured of each text. [default: all]")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the loss between the two models of a weight_matching RECIPE, as they are and aligned."""
    import mergekit_lr
    from mergekit_lr.engine.plan import choose_device
    from mergekit_lr.matching.barrier import write_plot

    result = mergekit_lr.barrier(
        recipe,
        text=[*(text or []), *(more or [])],
        data=data,
        points=points,
        activation=activation,
        max_tokens=max_tokens,
        device=choose_device(device),
        tell=None if quiet else lambda done, total, what: say(f"{done + 1}/{total} {what}"),
    )
    if plot is not None:
        write_plot(result, plot)
    if as_json:
        print_json(result)
    else:
        for i, t in enumerate(result["t"]):
            print(f"t {t:.2f}   as they are {result['naive'][i]:.4f}   matched {result['matched'][i]:.4f}")
        print(f"barrier: as they are {result['barrier_naive']:.4f}, matched {result['barrier_matched']:.4f}")
