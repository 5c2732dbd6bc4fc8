"""The model that the output's tokenizer comes from, where it is not merged itself: its small files are enough."""

from __future__ import annotations

from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.open import local, open_model
from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.checkpoint.small_files import inside, read_json


def open_source(reference: ModelReference) -> Checkpoint:
    """A model by its headers, or a folder with nothing but a tokenizer.

    Raises:
        CheckpointError: there is no such model.
    """
    folder = local(reference.model)
    if folder.is_dir() and reference.adapter is None and not any(folder.glob("*.safetensors")):
        path = folder / "config.json"
        config = read_json(inside(folder, "config.json")) if path.is_file() else None
        return Checkpoint(str(reference), folder, config if isinstance(config, dict) else None, {}, {}, ())
    return open_model(reference, headers_only=True)
