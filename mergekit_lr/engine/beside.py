"""What of a run's inputs is not weights and decides its output all the same: configs, tokenizers, texts, statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.lora import AdaptedCheckpoint
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.small_files import read_plain
from mergekit_lr.engine.code_files import code_of
from mergekit_lr.engine.side_files import LARGEST_FILE, OTHER_FILES, TOKENIZER_FILES
from mergekit_lr.errors import CheckpointError
from mergekit_lr.recipe import Recipe

BESIDE = ("config.json", "adapter_config.json", *OTHER_FILES, *TOKENIZER_FILES)
_STEP = 1 << 20


def files_beside(recipe: Recipe, inputs: Mapping[str, Checkpoint], *, times: bool = True) -> dict[str, str]:
    """Digests of every such file, by model and name; a run is gone on with only while they are the same.

    ``times``: let those of large files count, which are not read whole.
    """
    found: dict[str, str] = {}
    for model, checkpoint in inputs.items():
        adapter = checkpoint.adapter_folder if isinstance(checkpoint, AdaptedCheckpoint) else None
        for folder in (checkpoint.folder, adapter):
            if folder is None:
                continue
            for name in BESIDE:
                digest = _side_file(folder, name)
                if digest:
                    found[f"{model}/{name}"] = digest
    for text in texts_of(recipe):
        found[str(text)] = _content(text)
    for weights in _measured(recipe):
        found[str(weights)] = _header(weights, times)
    return found


def code_beside(recipe: Recipe, inputs: Mapping[str, Checkpoint]) -> dict[str, str]:
    """Digests of the Python files that ``copy_code`` carries over, by model and name, before there is a plan."""
    found: dict[str, str] = {}
    for source in (recipe.config_source, recipe.tokenizer_source):
        checkpoint = inputs.get(str(source))
        if checkpoint is not None:
            found |= {f"{source}/{c.name}": c.sha256 for c in code_of(checkpoint, checkpoint)}
    return found


def texts_of(recipe: Recipe) -> list[Path]:
    """The files of text that a recipe names."""
    return [] if recipe.calibration is None else [Path(t) for t in recipe.calibration.text]


def _measured(recipe: Recipe) -> Iterable[Path]:
    """Files of numbers that a recipe names and that are not opened as models."""
    named = [recipe.permutations, recipe.calibration.statistics if recipe.calibration else None]
    return [Path(n) for n in named if n and n.endswith(".safetensors")]


def _side_file(folder: Path, name: str) -> str:
    """sha256 of a small file of a model; nothing where it is missing, or such that it is never used (`read_plain`)."""
    path = folder / name
    if not path.exists() and not path.is_symlink():
        return ""
    try:
        return hashlib.sha256(read_plain(folder, name, most=LARGEST_FILE)).hexdigest()
    except CheckpointError as e:
        if isinstance(e.__cause__, OSError):
            raise  # the disk, not the file
        return ""


def _content(path: Path) -> str:
    """sha256 of a text; nothing where it is missing (whoever needs it says so)."""
    h = hashlib.sha256()
    try:
        fs.reading("read", path)
        with path.open("rb") as f:
            while data := f.read(_STEP):
                h.update(data)
    except FileNotFoundError:
        return ""
    except OSError as e:
        raise CheckpointError("cannot read the file", where=str(path), why=e.strerror or str(e)) from e
    return h.hexdigest()


def _header(path: Path, times: bool) -> str:
    """What tells one file of tensors from another without reading them."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size} {read_header(path).digest}" + (f" {status.st_mtime_ns}" if times else "")
