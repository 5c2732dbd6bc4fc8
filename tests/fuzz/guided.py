"""Coverage-guided fuzzing with atheris: ``python tests/fuzz/guided.py TARGET [libFuzzer options] [CORPUS]``.

Targets: ``header`` (differential against the reference parser), ``recipe``, ``index``. It stops at the first input that
raises anything but an error of ours, that is accepted against the reference parser, or that takes over five seconds.
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mergekit_lr.checkpoint", "mergekit_lr.recipe", "json"]):
    from mergekit_lr.checkpoint.header import parse_header
    from mergekit_lr.checkpoint.model import read_weight_map
    from mergekit_lr.errors import CheckpointError, RecipeError
    from mergekit_lr.recipe import load_recipe

import safetensors

HERE = Path("fuzzed.safetensors")
ROOM = Path(tempfile.mkdtemp(prefix="fuzz-"))
SEEDS = {
    "header": [
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,0],"data_offsets":[0,0]}}',
    ],
    "recipe": [
        b"merge_method: ties\nbase_model: b\nmodels:\n  - model: a\n    parameters: {weight: 0.5, density: [0, 1]}\n",
        b"merge_method: slerp\nmodels: [{model: a}, {model: &x b}]\nparameters: {t: [{filter: q, value: 1}, 0.5]}\n",
    ],
    "index": [b'{"metadata":{},"weight_map":{"a":"model-1.safetensors"}}'],
}


def header(data: bytes) -> None:
    """The bytes are a header; as much data follows as its last offset says, up to 4 KiB."""
    raw = data[:4096]
    for size in (0, 4, 8):
        try:
            found = parse_header(raw, 8 + len(raw) + size, HERE)
        except CheckpointError:
            continue
        file = struct.pack("<Q", len(raw)) + raw + bytes(size)
        theirs = dict(safetensors.deserialize(file))  # raises where we accepted what it rejects
        assert set(theirs) == set(found.tensors)


def recipe(data: bytes) -> None:
    path = ROOM / "r.yml"
    path.write_bytes(data)
    try:
        load_recipe(path)
    except RecipeError as e:
        assert all(line.isprintable() for line in e.problems)


def index(data: bytes) -> None:
    path = ROOM / "model.safetensors.index.json"
    path.write_bytes(data)
    try:
        shards = read_weight_map(path)
    except CheckpointError as e:
        assert str(e).isprintable()
        return
    assert all(os.path.basename(s) == s and s.endswith(".safetensors") for s in shards)  # noqa: PTH119


TARGETS: dict[str, Callable[[bytes], None]] = {"header": header, "recipe": recipe, "index": index}


def main(arguments: list[str]) -> None:
    target = arguments[1]
    corpus = ROOM / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(SEEDS[target]):
        (corpus / str(number)).write_bytes(seed)
        TARGETS[target](seed)  # the first recipe imports its method, and torch
    options = ["-timeout=5", "-rss_limit_mb=2048", "-max_len=4096", *arguments[2:], str(corpus)]
    atheris.Setup([arguments[0], *options], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
