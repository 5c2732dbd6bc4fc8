"""The command line. Results go to standard output, messages and progress to standard error.

Nothing heavy is imported before a command needs it: ``--help`` and ``check`` never import torch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from traceback import print_exception
from types import TracebackType
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from typer.main import get_command

from mergekit_lr.errors import MergekitLrError, printable

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
Resume = Annotated[bool, typer.Option("--resume/--restart", help="Go on with unfinished work, or discard it.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT, in the moment the new one is complete.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read .bin and .pt weights too, in a confined process.")
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Ask nothing of the Hub: use its cache, as HF_HUB_OFFLINE=1 does.")
]
StageName = Annotated[
    str | None,
    typer.Option("--stage", metavar="NAME", help="Make this recipe of a file of several, not the file's output."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no warnings on standard error.")]


def say(message: str) -> None:
    """A message for a person. Names of strangers in it cannot move the cursor or add lines."""
    print(printable(message), file=sys.stderr, flush=True)


def show(lines: Iterable[str]) -> None:
    """The result of a command, for people."""
    for line in lines:
        print(printable(line))


def print_json(data: Any) -> None:
    """The one JSON value that a command prints."""
    print(json.dumps(data, indent=1, ensure_ascii=False))


def print_result(out: Path, report: dict[str, Any], as_json: bool) -> None:
    """What a command that writes a folder prints: where it is, or everything that is known of it."""
    if as_json:
        print_json({"out": str(out), **report})
    else:
        print(out)


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

    app.command(body.__name__.rstrip("_").replace("_", "-"), context_settings=CONTEXT)(run)
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
