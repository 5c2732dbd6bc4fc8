"""``bundle.json``: what a bundle holds, and how each task's tensors come from what is stored.

The format is described in docs/formats.md. Nothing here opens a shard or imports torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint.dtypes import ITEM_BYTES
from mergekit_lr.checkpoint.layout import Shard
from mergekit_lr.checkpoint.model import SHARD_NAME
from mergekit_lr.checkpoint.small_files import inside, read_json
from mergekit_lr.errors import CheckpointError

FILE = "bundle.json"
SHARED = "shared"
"""Subfolder with what every task's model has beside weights: config, tokenizer."""
FORMAT = "mergekit_lr bundle"
VERSION = 1
BASE = "base:"
"""A part that begins with this is a tensor of the base model, which the bundle does not hold."""
MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Task:
    """One packed model: its name, the reference it was packed from, and plain data about it."""

    name: str
    model: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One tensor of the recovered models, for the tasks that have it in this form.

    ``code`` names the function that gives it (`mergekit_lr.bundle.codes`); its inputs are the stored tensors
    ``shared`` and then ``own[task]``, in that order; ``call`` and ``numbers[task]`` are plain data that it gets
    beside them. Tasks that are not in ``own`` do not have this tensor, or have it by another entry.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    code: str
    shared: tuple[str, ...]
    own: Mapping[str, tuple[str, ...]]
    call: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def of(self, task: str) -> Recovered:
        """The tensor as one task has it."""
        parts = (*self.shared, *self.own[task])
        return Recovered(
            self.name, self.dtype, self.shape, self.code, parts, {**self.call, **self.numbers.get(task, {})}
        )

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), "code": self.code}
        found |= {"shared": list(self.shared), "own": {t: list(parts) for t, parts in self.own.items()}}
        if self.call:
            found["call"] = dict(self.call)
        if self.numbers:
            found["numbers"] = {t: dict(n) for t, n in self.numbers.items()}
        return found


@dataclass(frozen=True)
class Recovered:
    """One tensor of one task's model: what it is, and the stored ``parts`` and plain data that it comes from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    code: str
    parts: tuple[str, ...]
    call: Mapping[str, Any] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Adapters:
    """How a task is given back as a PEFT adapter: its tensors, and ``adapter_config.json`` of each task."""

    entries: tuple[Entry, ...]
    config: Mapping[str, Mapping[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return {
            "tensors": [e.to_dict() for e in self.entries],
            "config": {t: dict(c) for t, c in self.config.items()},
        }


@dataclass(frozen=True)
class Manifest:
    """Everything in ``bundle.json`` but the digests of what is stored, which are known when it is.

    ``base``: ``{"model", "files"}`` of the model that deltas were taken from, ``files`` as `Checkpoint.identity`
    gives them without times. ``storage``: the table of bits and bytes. ``files`` and ``digests``: of the shards and
    of every stored tensor; empty until the bundle is written.
    """

    method: str
    tasks: tuple[Task, ...]
    parameters: Mapping[str, Any]
    base: Mapping[str, Any]
    entries: tuple[Entry, ...]
    adapters: Adapters | None = None
    storage: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Mapping[str, Any], ...] = ()
    digest_algorithm: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)

    def complete(self, shards: Sequence[Shard], digests: Mapping[str, str], algorithm: str) -> Manifest:
        """With what is known when everything is stored. ``shards`` as they were laid out."""
        files = tuple(
            {"file": s.file, "bytes": s.size, "header_sha256": hashlib.sha256(s.header[8:]).hexdigest()} for s in shards
        )
        return replace(self, files=files, digests=digests, digest_algorithm=algorithm)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in the order in which the file has it."""
        from mergekit_lr import __version__

        found: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "mergekit_lr": __version__,
            "method": self.method,
            "tasks": [{"name": t.name, "model": t.model, **t.facts} for t in self.tasks],
            "parameters": dict(self.parameters),
            "base": dict(self.base),
            "storage": dict(self.storage),
            "tensors": [e.to_dict() for e in self.entries],
        }
        if self.adapters is not None:
            found["adapters"] = self.adapters.to_dict()
        found["files"] = [dict(f) for f in self.files]
        found["digest_algorithm"] = self.digest_algorithm
        found["digests"] = dict(self.digests)
        return found

    def to_bytes(self) -> bytes:
        return (json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``bundle.json``.

    Raises:
        CheckpointError: it is missing, damaged, of a newer version, or says things that do not fit each other.
    """
    path = inside(folder, FILE)
    if not path.exists():
        raise CheckpointError(
            "not a bundle", where=str(folder), why=f"there is no {FILE}", fix="give a folder that a packing merge wrote"
        )
    content = read_json(path, most=MAX_BYTES)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _damaged(path, f"its format is not {FORMAT!r}")
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise _damaged(path, f"its version is {str(version)[:40]}")
    if version > VERSION:
        raise CheckpointError(
            f"the bundle has format version {version}",
            where=str(path),
            why=f"this mergekit_lr ({_own_version()}) reads up to {VERSION}; it was written by "
            f"{str(content.get('mergekit_lr'))[:40]}",
            fix="update mergekit_lr",
        )
    try:
        return _manifest(content)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise _damaged(path, f"{type(e).__name__}: {str(e)[:200]}") from e


def _own_version() -> str:
    from mergekit_lr import __version__

    return __version__


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError("not a sound bundle.json", where=str(path), why=why, fix="pack or copy the bundle again")


def _manifest(content: Mapping[str, Any]) -> Manifest:
    tasks = []
    for t in content["tasks"]:
        facts = {k: v for k, v in t.items() if k not in ("name", "model")}
        tasks.append(Task(_text(t["name"]), _text(t["model"]), facts))
    names = [t.name for t in tasks]
    if not tasks or len(set(names)) != len(names):
        raise ValueError("tasks must have names, each its own")
    adapters = content.get("adapters")
    return Manifest(
        method=_text(content["method"]),
        tasks=tuple(tasks),
        parameters=dict(content["parameters"]),
        base=dict(content["base"]),
        entries=_entries(content["tensors"], set(names)),
        adapters=None if adapters is None else _adapters(adapters, set(names)),
        storage=_storage(content.get("storage", {})),
        files=tuple(_file(f) for f in content["files"]),
        digest_algorithm=_text(content["digest_algorithm"]),
        digests={_text(n): _text(d) for n, d in content["digests"].items()},
    )


def _adapters(content: Mapping[str, Any], tasks: set[str]) -> Adapters:
    return Adapters(_entries(content["tensors"], tasks), {t: dict(c) for t, c in content["config"].items()})


def _entries(content: Any, tasks: set[str]) -> tuple[Entry, ...]:
    entries = tuple(_entry(e) for e in content)
    seen: set[tuple[str, str]] = set()
    for entry in entries:
        unknown = sorted(set(entry.own) - tasks)
        if unknown:
            raise ValueError(f"tensor {entry.name!r} is of a task {unknown[0]!r} that is not listed")
        for task in entry.own:
            if (task, entry.name) in seen:
                raise ValueError(f"tensor {entry.name!r} is there twice for task {task!r}")
            seen.add((task, entry.name))
    return entries


def _entry(content: Mapping[str, Any]) -> Entry:
    dtype = _text(content["dtype"])
    shape = tuple(content["shape"])
    if dtype not in ITEM_BYTES or not all(type(d) is int and 0 <= d < 1 << 48 for d in shape):
        raise ValueError(f"tensor {content['name']!r} has dtype {dtype!r} and shape {shape}")
    return Entry(
        name=_text(content["name"]),
        dtype=dtype,
        shape=shape,
        code=_text(content["code"]),
        shared=tuple(_text(p) for p in content["shared"]),
        own={_text(t): tuple(_text(p) for p in parts) for t, parts in content["own"].items()},
        call=dict(content.get("call", {})),
        numbers={_text(t): dict(n) for t, n in content.get("numbers", {}).items()},
    )


def _storage(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table of sizes: numbers only, because it is shown."""
    numbers = [*content.get("bytes", {}).values(), content.get("unpacked_bytes", 0), content.get("ratio", 0.0)]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        raise TypeError("storage holds something that is no number")
    return dict(content)


def _file(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """One shard: its plain name, its size in bytes, and the digest of its header."""
    _text(content["header_sha256"])
    if not SHARD_NAME.fullmatch(_text(content["file"])) or type(content["bytes"]) is not int:
        raise ValueError(f"{content['file'][:80]!r} is not the plain file name of a shard with its size")
    return dict(content)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is not a text")
    return value
