"""A task given back as a PEFT adapter, where the bundle says how."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lr.bundle.manifest import FILE as BUNDLE
from mergekit_lr.bundle.manifest import Recovered
from mergekit_lr.checkpoint.dtypes import torch_dtype
from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.layout import lay_out_file
from mergekit_lr.checkpoint.writer import Entry, FileWriter
from mergekit_lr.engine.workspace import Workspace
from mergekit_lr.errors import CheckpointError, UsageError
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from mergekit_lr.bundle.open import Bundle

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
RUN = "run_digest"


def write_adapter(bundle: Bundle, task: str, out: Path, *, overwrite: bool = False) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` of one task; see `Bundle.adapter`.

    All of it happens in ``out.partial``, whose ``model`` becomes ``out`` by one rename; a rerun after a kill begins
    anew.

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
    packed = hashlib.sha256((bundle.folder / BUNDLE).read_bytes()).hexdigest()
    space = Workspace(out, {"command": "adapter", "bundle": packed, "task": task})
    if _made_by(space) and space.tidied_up():
        return out
    space.check_target(overwrite=overwrite, inputs=[bundle.folder])
    space.claim(resume=False, overwrite=overwrite)
    try:
        entries = [Entry(w.name, w.dtype, w.shape) for w in wanted.values()]
        with FileWriter(space.model / WEIGHTS, entries, {RUN: space.digest}) as writer, torch.inference_mode():
            for w in wanted.values():
                writer.write(w.name, _decoded(bundle, w))
        config = json.dumps(dict(bundle.manifest.adapters.config[task]), indent=2, ensure_ascii=False) + "\n"
        space.commit({CONFIG: config.encode()}, lay_out_file(WEIGHTS, entries, {}), overwrite=overwrite)
    finally:
        space.release()
    return out


def _made_by(space: Workspace) -> bool:
    """Whether the adapter that is there is what this call would write."""
    try:
        return read_header(space.out / WEIGHTS).metadata.get(RUN) == space.digest
    except CheckpointError:
        return False


def _decoded(bundle: Bundle, wanted: Recovered) -> torch.Tensor:
    out = torch.empty(wanted.shape, dtype=torch_dtype(wanted.dtype))
    bundle.decode(wanted, out)
    return out
