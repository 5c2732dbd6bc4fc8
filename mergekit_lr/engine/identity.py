"""What decides an output's bytes, as several machines can compare it."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from mergekit_lr.checkpoint.model import HUB, Checkpoint, Stamp
from mergekit_lr.engine.beside import code_beside, files_beside
from mergekit_lr.engine.plan import Settings
from mergekit_lr.recipe import Recipe

PROBES, PROBE = 4, 16 << 10  # places in an input file, and bytes at each, that tell it from another of the same shape


def identity(recipe: Recipe, inputs: Mapping[str, Checkpoint], settings: Settings) -> dict[str, Any]:
    """What decides the output's bytes, from what any machine can see before anything is prepared.

    No times: machines may see different ones, or have their own copies of the inputs.
    """
    from mergekit_lr import __version__

    source = inspect.getsource(type(recipe.method))
    return {
        "mergekit_lr": __version__,
        "torch": version("torch"),
        "recipe": recipe.digest(),
        "method": hashlib.sha256(source.encode()).hexdigest(),
        "inputs": {m: content_of(c) for m, c in inputs.items()},
        "files": files_beside(recipe, inputs, times=False),
        "device": settings.device.partition(":")[0],
        "shard_size": settings.shard_size,
        **({"code": code_beside(recipe, inputs)} if settings.copy_code else {}),
    }


def content_of(checkpoint: Checkpoint) -> list[list[Any]]:
    """Names, sizes and header digests of an input's files, and a digest of some of their bytes.

    Of a stage that is computed while it is read: those of its inputs.
    """
    inner = list(checkpoint.beneath)
    if checkpoint.stage is not None and not checkpoint.stamps:
        inner += checkpoint.stage.inputs.values()
    found = [[Path(s.path).name, s.size, s.header, _probed(s)] for s in checkpoint.stamps]
    found += [file for under in inner for file in content_of(under)]
    if checkpoint.stage is None:  # what is no file, such as which token has which row
        found += [[*entry, ""] for entry in checkpoint.identity() if entry[2] == 0]
    return [file for i, file in enumerate(found) if file not in found[:i]]


def _probed(stamp: Stamp) -> str:
    """Some bytes of a file that is here; one that is on the Hub only is told by its header."""
    if stamp.path.startswith(HUB):
        return ""
    digest = xxhash.xxh3_128()
    with Path(stamp.path).open("rb") as f:
        for i in range(1, PROBES + 1):
            f.seek(max(0, stamp.size * i // PROBES - PROBE))
            digest.update(f.read(PROBE))
    return digest.hexdigest()
