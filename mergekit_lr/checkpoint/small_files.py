"""Small files of a model folder: found by plain names, followed nowhere, of a bounded size."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.header import unique_keys
from mergekit_lr.errors import CheckpointError

MAX_JSON = 64 << 20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def inside(folder: Path, name: str) -> Path:
    """A file of a model folder by its plain name.

    A link may lead elsewhere inside the folder or, from a snapshot in a download cache, to the blobs beside
    it.

    Raises:
        CheckpointError: the name is not plain, or the link leaves the folder.
    """
    if name != Path(name).name or name in ("", ".", ".."):
        raise CheckpointError(f"{name[:80]!r} is not a plain file name", where=str(folder))
    path = folder / name
    if path.is_symlink():
        try:
            target, root = path.resolve(), folder.resolve()
        except (OSError, RuntimeError) as e:  # RuntimeError: how Python 3.11 says that links form a circle
            raise CheckpointError(f"{name!r} is a link to nowhere", where=str(folder), why=str(e)) from e
        cached = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
        if not cached and root not in target.parents:
            raise CheckpointError(
                f"{name!r} is a link that leaves the model folder",
                where=str(folder),
                why=f"it leads to {target}",
                fix="copy the file into the folder",
            )
    return path


def read_plain(folder: Path, name: str, *, most: int) -> bytes:
    """The bytes of a small file of a model folder.

    Raises:
        CheckpointError: it is a link out of the folder, no plain file, larger than ``most``, or cannot be read.
    """
    return _read(inside(folder, name), most)


def read_json(path: Path, *, most: int = MAX_JSON) -> Any:
    """A JSON file of an input model; CheckpointError if it is not one, or says a thing twice."""
    raw = _read(path, most)
    try:
        text = raw.decode("utf-8")
        content = json.loads(text, object_pairs_hook=unique_keys)
        if _SURROGATE.search(text):  # half of a pair is no text, and could be written to no file
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except (ValueError, RecursionError) as e:
        raise CheckpointError("not valid JSON", where=str(path), why=str(e)) from e


def read_config(path: Path) -> dict[str, Any]:
    """A model's config.json: an object whose ``model_type``, where there is one, is a text.

    Raises:
        CheckpointError: it is not.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError("config.json does not hold an object", where=str(path))
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        kind = part.get("model_type")
        if kind is not None and not isinstance(kind, str):
            raise CheckpointError(
                f"model_type is {str(kind)[:60]}, not a text", where=str(path), fix="mend config.json"
            )
    return config


def _read(path: Path, most: int) -> bytes:
    try:
        fs.reading("read", path)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError("not a regular file", where=str(path), fix="copy the file into the folder")
        if status.st_size > most:
            why = f"over {most} bytes"
            raise CheckpointError(
                "the file is too large to be read", where=str(path), why=why, fix="is it the right one?"
            )
        with path.open("rb") as f:
            return f.read(most)
    except OSError as e:
        raise CheckpointError("cannot read the file", where=str(path), why=e.strerror or str(e)) from e
