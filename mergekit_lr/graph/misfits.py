"""What to say of a tensor that one model has and another lacks."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_lr.arch.modules import WHOLE, modules_of
from mergekit_lr.arch.naming import TEXT, nearest_names
from mergekit_lr.checkpoint.model import Checkpoint


class Parts:
    """The parts of the reference, and which of them each model lacks altogether. Names are read once for each model."""

    def __init__(self, reference: Checkpoint) -> None:
        self._of: Mapping[str, str] = modules_of(reference.tensors, reference.config)
        self._shared: dict[str, list[str]] = {}

    def shared(self, model: Checkpoint) -> list[str]:
        """The parts that ``model`` has too; a plain language model is a text decoder."""
        if model.reference not in self._shared:
            theirs = set(modules_of(model.tensors, model.config).values())
            if theirs == {WHOLE}:
                theirs = {WHOLE, TEXT}
            self._shared[model.reference] = [p for p in dict.fromkeys(self._of.values()) if p in theirs]
        return self._shared[model.reference]

    def missing(self, name: str, model: Checkpoint) -> str | None:
        """The part that a tensor of the reference belongs to, where the model has nothing of that part at all."""
        part, shared = self._of.get(name), self.shared(model)
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
