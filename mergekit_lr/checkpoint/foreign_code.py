"""What in a model folder would make another library read elsewhere, fetch, or run code. Nothing here runs any.

We never load code ourselves, but transformers is let loose on folders to evaluate them, and outputs are loaded by
others. ``auto_map`` and ``custom_pipelines`` name Python classes, in the folder or in any repository. A name of a
repository under ``attn_implementation`` makes transformers download compiled kernels and load them, without asking.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint.model import read_weight_map
from mergekit_lr.checkpoint.small_files import inside, read_json
from mergekit_lr.errors import CheckpointError

CLASSES = ("auto_map", "custom_pipelines")
"""Keys that name Python classes to import."""

_KERNELS = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_BUILT_IN = re.compile(r"[a-z][a-z0-9_]*")
MAX_DEPTH = 64
SMALL = (".json", ".model", ".txt", ".jinja", ".tiktoken")
MOST = 1 << 28
"""Most bytes of a file with such a suffix: loaders read them whole."""


def references(content: Any, path: str = "", depth: int = 0, modules: Container[str] = ()) -> Iterator[str]:
    """Where in a parsed JSON file code is named: ``auto_map``, ``text_config.attn_implementation``, ...

    ``modules``: Python modules beside the file; a class of one of them does not count, and what names several classes
    is looked at class by class (``auto_map.AutoModel``).
    """
    if depth > MAX_DEPTH:  # no loader looks for any of it so far down
        return
    if isinstance(content, Mapping):
        for key, value in content.items():
            here = f"{path}.{key}" if path else str(key)
            if _kept(str(key), value, modules) is not None:
                yield from (f"{here}.{name}" for name, one in value.items() if not _is_of(one, modules))
            elif _names_code(str(key), value):
                yield here
            else:
                yield from references(value, here, depth + 1, modules)
    elif isinstance(content, list):
        for i, value in enumerate(content):
            yield from references(value, f"{path}.{i}" if path else str(i), depth + 1, modules)


def without_code(content: dict[str, Any], modules: Container[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """A copy of a parsed JSON file in which nothing names code but that of ``modules``, and where something did."""
    found = list(references(content, modules=modules))
    return (_cleaned(content, modules) if found else content), found


def _cleaned(content: Any, modules: Container[str]) -> Any:
    if isinstance(content, list):
        return [_cleaned(v, modules) for v in content]
    if not isinstance(content, Mapping):
        return content
    cleaned = {}
    for key, value in content.items():
        kept = _kept(str(key), value, modules)
        if kept is not None:
            cleaned[key] = kept
        elif not _names_code(str(key), value):
            cleaned[key] = _cleaned(value, modules)
    return cleaned


def _kept(key: str, value: Any, modules: Container[str]) -> dict[str, Any] | None:
    """Of an entry that names classes: those of ``modules``; None where there are none, or it is no such entry."""
    if key not in CLASSES or not isinstance(value, Mapping):
        return None
    return {name: one for name, one in value.items() if _is_of(one, modules)} or None


def _is_of(named: Any, modules: Container[str]) -> bool:
    """Whether every class that is named is one of ``modules``: ``module.Class``, alone, or in a list beside null.

    ``org/name--module.Class`` is another repository's. Of a pipeline, ``impl`` is the class.
    """
    if isinstance(named, Mapping):
        named = named.get("impl")
    classes = [c for c in named if c is not None] if isinstance(named, list) else [named]
    parts = [c.split(".") if isinstance(c, str) else [] for c in classes]
    return bool(parts) and all(len(p) == 2 and p[0] in modules and p[1].isidentifier() for p in parts)


def _names_code(key: str, value: Any) -> bool:
    if key in CLASSES:
        return bool(value)
    if not _KERNELS.fullmatch(key):
        return False
    named = value.values() if isinstance(value, Mapping) else [value]
    return any(isinstance(v, str) and not _BUILT_IN.fullmatch(v) for v in named)


def check_loadable(folder: Path) -> None:
    """Refuse a folder that leads a loader of another library elsewhere: call it before ``from_pretrained``.

    Raises:
        CheckpointError: something in it is a link out of it, a pipe or a device; a tokenizer is too large; its index
            names a path; or its config names kernels of a repository. (``auto_map`` alone is harmless where remote
            code is not trusted.)
    """
    for path in sorted(folder.iterdir()):
        if not inside(folder, path.name).exists():  # a link to nothing
            continue
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise CheckpointError(
                f"{path.name!r} is not a regular file", where=str(folder), fix="remove it from the folder"
            )
        if path.suffix in SMALL and status.st_size > MOST:
            raise CheckpointError(f"{path.name!r} is too large", where=str(folder), why=f"over {MOST} bytes")
    for name, suffix in (("model.safetensors.index.json", "safetensors"), ("pytorch_model.bin.index.json", "bin")):
        if (folder / name).exists():
            read_weight_map(folder / name, suffix)
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    refuse_kernels(config, str(folder))


def refuse_kernels(config: Any, where: str) -> None:
    """Raise a CheckpointError if a config names kernels of a repository."""
    named = [r for r in references(config) if r.rpartition(".")[2] not in CLASSES]
    if named:
        raise CheckpointError(
            f"config.json names code of a repository under {named[0]!r}",
            where=where,
            why="transformers would download and load it",
            fix="remove that entry from config.json",
        )
