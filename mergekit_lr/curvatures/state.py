"""Optimizer states as plain data: pickles are read in a confined process, and only what is wanted leaves it.

Run as a module it is that process: ``python -m mergekit_lr.curvatures.state KIND SOURCE TARGET`` writes a safetensors
file whose tensors are called by their path in the state (``state/0/exp_avg_sq``), with every plain value in its
metadata as JSON. KIND is ``torch`` (a file of torch.save), ``dcp`` (a torch.distributed.checkpoint folder) or
``deepspeed`` (the ``zero`` folder of a universal checkpoint). The fences are those of `mergekit_lr.checkpoint.pickle`;
a ``.metadata`` of torch.distributed.checkpoint is read by an unpickler that knows inert stand-ins only.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.model import Checkpoint, open_file
from mergekit_lr.checkpoint.pickle import (
    REFUSALS,
    check_archive,
    check_tensors,
    confine,
    convert,
    refused,
    write_plain,
)
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

PARTS = (
    *("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"),  # Adam; Adafactor in transformers
    *("variance", "row_var", "col_var"),  # Adafactor in torch
    *("state2", "qmap2", "absmax2", "max2"),  # bitsandbytes
)
"""Last names of the tensors that are kept: second moments in whatever form."""

MAX_PLAIN = 64 << 20
MAX_DEPTH = 8


@dataclass
class State:
    """A converted optimizer state: tensors by path, plain values by path. Close it: the copy is temporary."""

    tensors: Checkpoint
    plain: dict[str, Any]
    temporary: Path

    def close(self) -> None:
        self.tensors.close()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def __enter__(self) -> State:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_state(kind: str, source: Path) -> State:
    """Convert an optimizer state and open the copy.

    Raises:
        CheckpointError: it is refused, damaged, or of another kind.
        ResourceError: there is no room for the copy.
    """
    files = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
    if kind == "torch":
        check_archive(source)
    temporary = Path(tempfile.mkdtemp(prefix="mergekit_lr-"))
    target = temporary / "state.safetensors"
    try:
        # The folder is named first, its files only for their size.
        convert([source, *files] if source.is_dir() else files, target, "mergekit_lr.curvatures.state", kind)
        plain = json.loads(read_header(target).metadata["plain"])
        return State(open_file(target, str(source)), plain, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def flatten(value: object, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """``(path, leaf)`` of nested mappings and lists; a tensor of one element is its number."""
    if depth > MAX_DEPTH:
        raise CheckpointError("it is nested too deeply for an optimizer state")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str | int):
                raise CheckpointError(f"it has a key of type {type(key).__name__}")
            yield from flatten(inner, f"{path}/{key}" if path else str(key), depth + 1)
    elif isinstance(value, list | tuple) and any(isinstance(v, dict | torch.Tensor) for v in value):
        for i, inner in enumerate(value):
            yield from flatten(inner, f"{path}/{i}" if path else str(i), depth + 1)
    elif isinstance(value, torch.Tensor) and value.ndim == 0:
        yield path, value.item()
    else:
        yield path, value


def split(state: object) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The second moments of a state, and its plain values."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for path, leaf in flatten(state):
        if isinstance(leaf, torch.Tensor):
            if path.rpartition("/")[2] in PARTS:
                tensors[path] = leaf
        elif leaf is None or isinstance(leaf, bool | int | float | str):
            plain[path] = leaf
        elif isinstance(leaf, list | tuple) and all(isinstance(v, bool | int | float | str) for v in leaf):
            plain[path] = list(leaf)
    return tensors, plain


def _torch(source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    confine(source.stat().st_size)
    return split(torch.load(source, map_location="cpu", weights_only=True, mmap=True))


def _deepspeed(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """``zero/NAME/exp_avg_sq.pt`` and ``step.pt``: a tensor each, or a mapping with it under ``param``."""
    confine(sum(p.stat().st_size for p in folder.rglob("*.pt")))
    state: dict[str, Any] = {}
    for path in sorted(folder.rglob("exp_avg_sq.pt")):
        name = ".".join(path.parent.relative_to(folder).parts)
        state[name] = {"exp_avg_sq": _bare(path)}
        step = path.with_name("step.pt")
        if step.exists():
            state[name]["step"] = _bare(step)
    return split({"state": state})


def _bare(path: Path) -> Any:
    if path.is_symlink():
        raise CheckpointError(f"{path.name} of {path.parent.name} is a link")
    check_archive(path)
    value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return value["param"] if isinstance(value, dict) and "param" in value else value


def converted(kind: str, source: Path, target: Path) -> None:
    """Write the second moments and plain values of ``source`` to ``target``; confines this process first.

    Raises:
        CheckpointError: the state is refused. A damaged pickle raises whatever it makes a loader raise.
    """
    if kind == "dcp":
        from mergekit_lr.curvatures.distributed import convert_folder

        return convert_folder(source, target)
    tensors, plain = (_torch if kind == "torch" else _deepspeed)(source)
    size = source.stat().st_size if kind == "torch" else sum(p.stat().st_size for p in source.rglob("*.pt"))
    check_tensors(tensors, 2 * size)
    text = json.dumps(plain)
    if len(text) > MAX_PLAIN:
        raise CheckpointError("it holds more plain values than an optimizer state does")
    return write_plain(tensors, target, {"plain": text})


def _main(kind: str, source: Path, target: Path) -> int:
    torch.set_num_threads(1)
    torch.zeros(1).clone()
    try:
        converted(kind, source, target)
    except (CheckpointError, pickle.UnpicklingError, *REFUSALS) as e:
        return refused(e)
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
