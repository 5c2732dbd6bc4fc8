"""The command line. Results go to standard output, messages and progress to standard error.

Nothing heavy is imported before a command needs it: ``--help`` and ``check`` never import torch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from traceback import print_exception
from types import TracebackType
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from typer.main import get_command

from mergekit_lr.errors import MergekitLrError, UsageError, VerificationError

DEBUG = "MERGEKIT_LR_DEBUG"
INTERRUPTED = 130
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

app = typer.Typer(
    name="mergekit-lr",
    help="Merge models from a YAML recipe: exact methods, bounded memory, resumable.",
    epilog=(
        "Exit codes: 0 ok, 1 a bug, 2 usage, 3 recipe, 4 input model, 5 resources (resumable), "
        "6 verification failed, 130 interrupted (resumable)."
    ),
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)

P = ParamSpec("P")
R = TypeVar("R")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe.", show_default=False)]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where to compute.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Most memory for tensors, such as 8GiB. [default: half of what is free]"),
]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="Worker threads. [default: the machine's cores]")]
ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Most bytes in one output file, such as 5GB.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read .bin and .pt weights too, in a confined process.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no warnings on standard error.")]


def say(message: str) -> None:
    """A message for a person."""
    print(message, file=sys.stderr, flush=True)


def print_json(data: Any) -> None:
    """The one JSON value that a command prints."""
    print(json.dumps(data, indent=1, ensure_ascii=False))


def command(body: Callable[P, R]) -> Callable[P, R]:
    """Register a command whose errors become messages and exit codes."""

    @wraps(body)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            result = body(*args, **kwargs)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            # The reader has what it wanted. Nothing may be left to flush when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit from None
        except MergekitLrError as e:
            if os.environ.get(DEBUG):
                print_exception(e)
            for line in getattr(e, "problems", None) or (str(e),):
                say(f"error: {line}")
            raise typer.Exit(e.exit_code) from None
        except MemoryError:
            say("error: the machine has no memory left; set --max-memory lower and run the same command again")
            raise typer.Exit(5) from None
        except KeyboardInterrupt:
            out = kwargs.get("out")
            kept = f"; what is done is kept in {out}.partial, run the same command again to go on" if out else ""
            say(f"interrupted{kept}")
            raise typer.Exit(INTERRUPTED) from None

    app.command(body.__name__.replace("_", "-"), context_settings=CONTEXT)(run)
    return run


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        from mergekit_lr import __version__

        print(f"mergekit-lr {__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help=f"Show tracebacks; so does {DEBUG}=1.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"


@command
def merge(
    recipe: RecipePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
    device: Device = "auto",
    max_memory: MaxMemory = None,
    threads: Threads = None,
    shard_size: ShardSize = "5GB",
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on with unfinished work, or discard it.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, in the moment the new one is complete.")
    ] = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge the models of RECIPE into the folder OUT."""
    import mergekit_lr
    from mergekit_lr.progress import show_progress
    from mergekit_lr.recipe import load_recipe

    loaded = load_recipe(recipe)
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
            progress=progress,
        )
    if not quiet:
        for line in result.report.get("warnings", []):
            if line not in loaded.warnings:
                say(f"warning: {line}")
    if as_json:
        print_json({"out": str(result.out), **result.report})
    else:
        print(result.out)


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
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on with unfinished work, or discard it.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, in the moment the new one is complete.")
    ] = False,
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
    if as_json:
        print_json({"out": str(result.out), **result.report})
    else:
        print(result.out)


@command
def plan(
    recipe: RecipePath,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    threads: Threads = None,
    shard_size: ShardSize = "5GB",
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Say what a merge would read, write and hold in memory. Reads no weights."""
    import mergekit_lr

    result = mergekit_lr.plan(
        recipe,
        device=device,
        max_memory=max_memory,
        threads=threads,
        shard_size=shard_size,
        allow_pickle=allow_pickle,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        print("\n".join(result.summary_lines()))


@command
def check(recipe: RecipePath, as_json: Json = False) -> None:
    """Check RECIPE alone: every mistake, with line and column. Opens no model."""
    from mergekit_lr.recipe import load_recipe

    loaded = load_recipe(recipe)
    if as_json:
        print_json({"recipe": loaded.canonical(), "digest": loaded.digest(), "warnings": list(loaded.warnings)})
        return
    for line in loaded.warnings:
        say(f"warning: {line}")
    count = len(loaded.input_models())
    print(f"{recipe}: ok, {loaded.merge_method} of {count} model{'s' if count != 1 else ''}")


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
        print("\n".join(report.summary_lines()))
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
        print("\n".join(found.summary_lines()))


@command
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One method.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the merge methods, or describe one with its parameters."""
    from mergekit_lr.cli_text import method_lines, table_lines
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
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on with unfinished work, or discard it.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, in the moment the new one is complete.")
    ] = False,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write what a fine-tune changed as a PEFT LoRA adapter of its base."""
    import mergekit_lr
    from mergekit_lr.cli_text import extraction_lines
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
    if as_json:
        print_json({"out": str(result.out), **result.report})
    else:
        print(result.out)


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
    from mergekit_lr.cli_text import loss_lines
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
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on with unfinished work, or discard it.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, in the moment the new one is complete.")
    ] = False,
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


from mergekit_lr import cli_curvature as _curvature  # noqa: E402, F401 (registers its commands with `command`)


def report_bug(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """What is printed for an exception that nobody foresaw; the interpreter then exits with 1."""
    if os.environ.get(DEBUG):
        sys.__excepthook__(kind, error, traceback)
        return
    text = " ".join(str(error).split())[:500]
    say(f"error: unexpected {kind.__name__}: {text}; this is a bug, {DEBUG}=1 shows where")


def main() -> None:
    """The entry point of the command ``mergekit-lr``."""
    sys.excepthook = report_bug
    get_command(app)(prog_name="mergekit-lr")
