"""A task given back as a PEFT adapter, where the bundle says how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lr.bundle.manifest import Recovered
from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.dtypes import torch_dtype
from mergekit_lr.checkpoint.writer import Entry, FileWriter
from mergekit_lr.errors import UsageError
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from mergekit_lr.bundle.open import Bundle

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def write_adapter(bundle: Bundle, task: str, out: Path, *, overwrite: bool = False) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` of one task; see `Bundle.adapter`.

    All of it happens in ``out.partial``, which becomes ``out`` by one rename; a rerun after a kill begins anew.

    Raises:
        UsageError: the bundle has no such task, it is not low-rank, or ``out`` exists.
    """
    wanted = bundle.adapter_tensors(task)
    if not wanted or bundle.manifest.adapters is None:
        raise UsageError(
            f"task {task!r} cannot be given as an adapter",
            where=str(bundle.folder),
            why=f"{bundle.manifest.method} stores no low-rank factors of it",
            fix="recover it as a model",
        )
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise UsageError("the output exists already", where=str(out), fix="choose another name")
    partial = out.with_name(out.name + ".partial")
    fs.remove_tree(partial)
    fs.make_folder(partial)
    entries = [Entry(w.name, w.dtype, w.shape) for w in wanted.values()]
    with FileWriter(partial / WEIGHTS, entries) as writer, torch.inference_mode():
        for w in wanted.values():
            writer.write(w.name, _decoded(bundle, w))
    config = json.dumps(dict(bundle.manifest.adapters.config[task]), indent=2, ensure_ascii=False) + "\n"
    fs.write_file(partial / CONFIG, config.encode())
    fs.fsync(partial)
    if out.exists() or out.is_symlink():
        fs.remove_tree(out)
    fs.rename(partial, out)
    return out


def _decoded(bundle: Bundle, wanted: Recovered) -> torch.Tensor:
    out = torch.empty(wanted.shape, dtype=torch_dtype(wanted.dtype))
    bundle.decode(wanted, out)
    return out
