"""What to say of a tensor that one model has and another lacks."""

from __future__ import annotations

from mergekit_lr.arch.modules import WHOLE, modules_of
from mergekit_lr.arch.naming import TEXT, nearest_names
from mergekit_lr.checkpoint.model import Checkpoint


def parts_of(model: Checkpoint, reference: Checkpoint) -> list[str]:
    """The parts of ``reference`` that ``model`` has too; a plain language model is a text decoder."""
    theirs = set(modules_of(model.tensors, model.config).values())
    if theirs == {WHOLE}:
        theirs = {WHOLE, TEXT}
    return [p for p in dict.fromkeys(modules_of(reference.tensors, reference.config).values()) if p in theirs]


def missing_part(name: str, model: Checkpoint, reference: Checkpoint) -> str | None:
    """The part that a tensor of the reference belongs to, where the model has nothing of that part at all."""
    part = modules_of(reference.tensors, reference.config).get(name)
    shared = parts_of(model, reference)
    return part if part is not None and shared and part not in shared else None


def nearest_in(name: str, model: Checkpoint) -> str:
    """What a model has instead of a tensor, in words; empty where nothing is near."""
    experts = next((n for n in model.tensors if ".experts." in n), None)
    if ".experts." in name and experts is not None and _numbered(experts) != _numbered(name):
        return f"which keeps experts as {experts!r}: save both models in one layout"
    near = nearest_names(name, model.tensors, 1)
    return f"where the nearest is {near[0]!r}" if near else ""


def _numbered(name: str) -> bool:
    """Whether each expert has tensors of its own."""
    return name.partition(".experts.")[2].partition(".")[0].isdigit()
