"""Commands about curvature, and scales that are fitted on text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergekit_lr.cli.app import Device, Json, MaxMemory, Quiet, RecipePath, command, print_json, say, show


@command
def curvature(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Training checkpoint, optimizer.pt, or second moments in safetensors; with --text a model.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write, .safetensors.", show_default=False)],
    more: Annotated[list[Path] | None, typer.Argument(metavar="FILE", hidden=True)] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The trained model. [default: CHECKPOINT's folder]", show_default=False),
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json", help="Parameter names in the optimizer's order, a JSON list.", show_default=False
        ),
    ] = None,
    form: Annotated[
        str, typer.Option(metavar="full|rank1", help="Whole, or row and column sums of matrices.")
    ] = "full",
    dtype: Annotated[str, typer.Option(metavar="float32|bfloat16", help="Of whole entries.")] = "float32",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE...", help="Estimate from this text instead; several may follow.", show_default=False
        ),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences of text, spread over the texts.")] = 256,
    sequence_length: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of a sequence.")] = 256,
    labels: Annotated[
        str, typer.Option(metavar="sampled|text", help="Labels drawn from the model, or the text's own next tokens.")
    ] = "sampled",
    seed: Annotated[int, typer.Option(metavar="N", help="Decides which labels are drawn.")] = 0,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model's curvature: second moments of its optimizer, or Fisher from text."""
    from mergekit_lr.curvatures.api import curvature as write

    result = write(
        checkpoint,
        out,
        model=model,
        names=names,
        form=form,  # type: ignore[arg-type]  # checked there
        dtype=dtype,  # type: ignore[arg-type]
        text=[*(text or []), *(more or [])] or None,
        samples=samples,
        sequence_length=sequence_length,
        labels=labels,  # type: ignore[arg-type]
        seed=seed,
        device=device,
        max_memory=max_memory,
        overwrite=overwrite,
    )
    if not quiet:
        for line in result.warnings:
            say(f"warning: {line}")
    if as_json:
        print_json(result.to_dict())
    else:
        print(result.out)


@command
def curvature_report(
    recipe: RecipePath,
    plots: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Draw PNG files into this folder (needs matplotlib).", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how the curvatures of a recipe's models overlap and what each model gives."""
    from mergekit_lr.curvatures.report import curvature_report as report

    found = report(recipe)
    if plots is not None:
        from mergekit_lr.curvatures.plots import draw

        for path in draw(found, plots):
            say(f"wrote {path}")
    if as_json:
        print_json(found.to_dict())
    else:
        show(found.lines())


@command
def fit_scales(
    recipe: RecipePath,
    more: Annotated[list[Path] | None, typer.Argument(metavar="FILE", hidden=True)] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE...", help="Text to fit on, one file for each domain; several may follow.", show_default=False
        ),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences of text, spread over the texts.")] = 128,
    sequence_length: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of a sequence.")] = 256,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Steps of Adam; the best is kept.")] = 24,
    rate: Annotated[float, typer.Option(metavar="X", help="Adam's step size.")] = 0.1,
    start: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Every scale to begin with. [default: 1 / number of models]", show_default=False
        ),
    ] = None,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of scales.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit the scales of a row_scales RECIPE on text and write the files it names."""
    from mergekit_lr.fitting import fit_scales as fit

    result = fit(
        recipe,
        [*(text or []), *(more or [])],
        samples=samples,
        sequence_length=sequence_length,
        steps=steps,
        rate=rate,
        start=start,
        device=device,
        max_memory=max_memory,
        overwrite=overwrite,
        tell=None if quiet else lambda done, total, what: say(f"{done}/{total} {what}"),
    )
    if as_json:
        print_json(result.to_dict())
    else:
        print("\n".join(map(str, result.files)))
