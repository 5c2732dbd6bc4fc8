"""The command line as users and scripts rely on it. A change here is a change for them: say so in the changelog."""

from __future__ import annotations

import inspect

import pytest
from typer.main import get_command

import mergekit_lr
from mergekit_lr.cli import app

SURFACE = {
    "": ["--debug", "--version"],
    "merge": [
        *("RECIPE", "OUT", "--device", "--max-memory", "--threads", "--shard-size", "--resume/--restart"),
        *("--overwrite", "--allow-pickle", "--stage", "--part", "--workers", "--ray", "--offline"),
        *("--verify-inputs", "--disk-budget", "--push", "--copy-code", "--json", "--quiet -q"),
    ],
    "recover": [
        *("BUNDLE", "TASK", "OUT", "--base", "--device", "--max-memory", "--threads", "--shard-size"),
        *("--resume/--restart", "--overwrite", "--json", "--quiet -q"),
    ],
    "moe": [
        *("CONFIG", "OUT", "--device", "--max-memory", "--threads", "--shard-size", "--resume/--restart"),
        *("--overwrite", "--allow-pickle", "--json", "--quiet -q"),
    ],
    "plan": [
        *("RECIPE", "--device", "--max-memory", "--threads", "--shard-size", "--allow-pickle", "--stage"),
        *("--bandwidth", "--graph", "--offline", "--json"),
    ],
    "check": ["RECIPE", "--stage", "--json"],
    "import": ["RECIPE", "--stage", "--json"],
    "verify": ["OUT", "--json"],
    "inspect": ["MODEL", "--allow-pickle", "--json"],
    "methods": ["NAME", "--json"],
    "doctor": ["--strict", "--json"],
    "schema": [],
    "calibrate": [
        *("MODEL", "OUT", "FILE", "--text", "--samples", "--sequence-length", "--grams", "--similarity-tokens"),
        *("--dtype", "--device", "--max-memory", "--seed", "--resume/--restart", "--overwrite", "--json", "--quiet -q"),
    ],
    "barrier": [
        *("RECIPE", "FILE", "--text", "--data", "--plot", "--points", "--activation", "--max-tokens", "--device"),
        *("--json", "--quiet -q"),
    ],
    "curvature": [
        *("CHECKPOINT", "OUT", "FILE", "--model", "--names", "--form", "--dtype", "--text", "--samples"),
        *("--sequence-length", "--labels", "--seed", "--device", "--max-memory", "--overwrite", "--json", "--quiet -q"),
    ],
    "curvature-report": ["RECIPE", "--plots", "--json"],
    "fit-scales": [
        *("RECIPE", "FILE", "--text", "--samples", "--sequence-length", "--steps", "--rate", "--start"),
        *("--device", "--max-memory", "--overwrite", "--json", "--quiet -q"),
    ],
    "extract-lora": [
        *("MODEL", "BASE", "OUT", "--rank", "--energy", "--embeddings", "--include", "--exclude", "--dtype"),
        *("--device", "--max-memory", "--threads", "--resume/--restart", "--overwrite", "--allow-pickle"),
        *("--json", "--quiet -q"),
    ],
    "transplant": [
        *("MODEL", "DONOR", "OUT", "--k -k", "--approximation-method", "--cosine-similarity", "--weight-scheme"),
        *("--subword-method", "--prefix-match", "--byte-match", "--dtype", "--seed", "--device", "--max-memory"),
        *("--threads", "--shard-size", "--resume/--restart", "--overwrite", "--allow-pickle", "--json", "--quiet -q"),
    ],
    "eval": ["MODEL", "FILE", "--text", "--device", "--context", "--max-tokens", "--json"],
}


def names(command: object) -> list[str]:
    found = []
    for p in command.params:  # type: ignore[attr-defined]
        if p.param_type_name == "argument":
            found.append(str(p.metavar))
        else:
            found.append("/".join(filter(None, (" ".join(p.opts), " ".join(p.secondary_opts)))))
    return found


def test_commands_and_options_are_frozen() -> None:
    group = get_command(app)
    found = {"": names(group)} | {n: names(c) for n, c in group.commands.items()}  # type: ignore[attr-defined]
    assert found == SURFACE


FUNCTIONS = ["merge", "recover", "plan", "calibrate", "curvature", "extract-lora", "transplant"]
"""Commands whose function takes the same options."""


@pytest.mark.parametrize("command", FUNCTIONS)
def test_the_function_of_a_command_takes_its_options(command: str) -> None:
    """``--max-memory`` is ``max_memory=``. ``--json``, ``--quiet`` are about printing, ``--stage`` is the recipe's."""
    function = getattr(mergekit_lr, command.replace("-", "_"))
    options = {n.split("/")[0].split()[0].lstrip("-").lower().replace("-", "_") for n in SURFACE[command]}
    assert set(inspect.signature(function).parameters) - {"progress"} == options - {"json", "quiet", "file"}


def test_defaults_are_those_of_the_functions() -> None:
    group = get_command(app)
    for command in FUNCTIONS:
        signature = inspect.signature(getattr(mergekit_lr, command.replace("-", "_")))
        for p in group.commands[command].params:  # type: ignore[attr-defined]
            if p.param_type_name == "option" and p.name in signature.parameters:
                default = signature.parameters[p.name].default
                required = default is inspect.Parameter.empty  # the command says itself what is missing
                same = default == p.default or (p.name == "shard_size" and str(p.default) == "5GB")
                same = same or (default == () and p.default is None)  # may be given many times
                assert same or required, (command, p.name, p.default, default)
