"""What packing methods share when they lay out a bundle: task names, what is stored verbatim, the table of sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lr.bundle.manifest import Entry
from mergekit_lr.checkpoint.layout import nbytes_of
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import RecipeError
from mergekit_lr.graph.nodes import Sink, Source
from mergekit_lr.recipe import ModelEntry

_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")


def task_names(entries: Sequence[ModelEntry]) -> list[str]:
    """What each model is called in the bundle: its ``name``, or the last part of its path (of its adapter's).

    Raises:
        RecipeError: two models would have one name.
    """
    names: list[str] = []
    for entry in entries:
        place = entry.reference.adapter or entry.reference.model
        short = _UNFIT.sub("-", Path(place.path).name.removesuffix(".safetensors")).strip("-.")[:64]
        name = entry.name or short or "task"
        if name in names:
            raise RecipeError(
                f"two models would be called {name!r} in the bundle",
                where="models",
                fix="give each a `name:` of its own",
            )
        names.append(name)
    return names


def identity(checkpoint: Checkpoint) -> list[list[Any]]:
    """``[file, bytes, sha256 of the header]`` of a model's files: what tells one revision from another."""
    return [[name, size, header] for name, size, _, header in checkpoint.identity()]


def verbatim(task: str, model: int, checkpoint: Checkpoint, name: str, why: str) -> tuple[Sink, Entry]:
    """A tensor that is stored as it is for one task."""
    info = checkpoint.tensors[name]
    stored = f"own/{task}/{name}"
    sink = Sink(stored, info.dtype, info.shape, Source(model, name), f"stored verbatim: {why}")
    return sink, Entry(name, info.dtype, info.shape, "copy", (), {task: (stored,)})


def storage_table(sinks: Iterable[Sink], models: Sequence[Checkpoint]) -> dict[str, Any]:
    """Bytes and bits of each kind of stored tensor (the first part of its name), beside the models unpacked.

    ``ratio``: stored bytes over those of the packed models; headers and small files are not counted.
    """
    kinds: dict[str, int] = {}
    for sink in sinks:
        kind = sink.name.partition("/")[0]
        kinds[kind] = kinds.get(kind, 0) + nbytes_of(sink)
    total = sum(kinds.values())
    unpacked = sum(t.nbytes for m in models for t in m.tensors.values())
    return {
        "bytes": {**kinds, "total": total},
        "bits": {**{k: 8 * n for k, n in kinds.items()}, "total": 8 * total},
        "unpacked_bytes": unpacked,
        "ratio": round(total / unpacked, 6) if unpacked else 0.0,
    }


def storage_lines(storage: Mapping[str, Any]) -> list[str]:
    """The table for people: one kind a line, in bytes and in bits."""
    rows = [f"  {kind:<10} {n:>18,} bytes {8 * n:>20,} bits" for kind, n in storage.get("bytes", {}).items()]
    return [
        *rows,
        f"  {'unpacked':<10} {storage.get('unpacked_bytes', 0):>18,} bytes, ratio {storage.get('ratio', 0):.4f}",
    ]
