"""Commands that look at models, methods and recipes' form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergekit_lr.cli.app import AllowPickle, Device, Json, command, print_json, show
from mergekit_lr.errors import UsageError, VerificationError


@command
def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a model.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Check that a model folder or a bundle is whole. Reads every weight, and compares with its own digests."""
    import mergekit_lr

    report = mergekit_lr.verify(out)
    if as_json:
        print_json(report.to_dict())
    else:
        show(report.summary_lines())
    if report.problems:
        raise VerificationError("verification failed", where=str(out), why=f"{len(report.problems)} found")


@command
def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder, file, Hub id, or a bundle.", show_default=False)
    ],
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Say what a model or a bundle holds. Reads headers only."""
    import mergekit_lr

    found = mergekit_lr.inspect(model, allow_pickle=allow_pickle)
    if as_json:
        print_json(found.to_dict())
    else:
        show(found.summary_lines())


@command
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One method.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the merge methods, or describe one with its parameters."""
    from mergekit_lr.cli.text import method_lines, table_lines
    from mergekit_lr.recipe.catalogue import methods as describe

    found = describe(name)
    if as_json:
        print_json(found)
    else:
        print("\n".join(method_lines(found) if isinstance(found, dict) else table_lines(found)))


@command
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from mergekit_lr.recipe.json_schema import schema as build

    print_json(build())


@command
def doctor(
    strict: Annotated[bool, typer.Option("--strict", help="Fail (exit code 6) if there is any problem.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a run would find here: versions, device, memory, CPUs, plug-ins, disk space. Imports every plug-in."""
    import mergekit_lr

    found = mergekit_lr.doctor()
    if as_json:
        print_json(found.to_dict())
    else:
        show(found.summary_lines())
    if strict and found.problems:
        raise VerificationError("this installation has problems", where="doctor", why=f"{len(found.problems)} found")


@command
def eval(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a model.", show_default=False)],
    more: Annotated[list[Path] | None, typer.Argument(metavar="FILE", hidden=True)] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE...", help="Text to measure on; several may follow.", show_default=False),
    ] = None,
    device: Device = "auto",
    context: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens seen at once. [default: the model's, at most 1024]")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens measured of each text. [default: all]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a model's held-out loss on text files."""
    import mergekit_lr
    from mergekit_lr.cli.text import loss_lines
    from mergekit_lr.engine.plan import choose_device

    if not text:
        raise UsageError("there is no text to measure on", fix="add --text FILE")
    result = mergekit_lr.evaluate(
        model, [*text, *(more or [])], device=choose_device(device), context=context, max_tokens=max_tokens
    )
    if as_json:
        print_json(result)
    else:
        print("\n".join(loss_lines(result)))
