"""How a recipe names a model: a folder, a file or a Hub id, with a revision and a LoRA adapter if wanted."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from mergekit_lr.errors import RecipeError

SYNTAX = "PATH_OR_HUB_ID[@REVISION][+ADAPTER[@REVISION]]"
MAX_LENGTH = 4096

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


@dataclass(frozen=True, order=True)
class Place:
    """One location: a local path or a Hub id, and the revision wanted of it (None for the default)."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    @property
    def is_hub_id(self) -> bool:
        """It is written like a Hub id. A local path of the same spelling, where there is one, comes first."""
        return _HUB_ID.fullmatch(self.path) is not None


@dataclass(frozen=True, order=True)
class ModelReference:
    """A model as recipes write it: ``path``, ``org/name@revision``, ``model+adapter``, ``a.safetensors``.

    Two references are the same model exactly if they are written the same, as in mergekit; ``str`` gives back
    what was written. Whether the model exists is not asked here.
    """

    model: Place
    adapter: Place | None = None

    def __str__(self) -> str:
        return str(self.model) if self.adapter is None else f"{self.model}+{self.adapter}"

    @property
    def path(self) -> str:
        """Path or Hub id of the model without its adapter."""
        return self.model.path

    @property
    def revision(self) -> str | None:
        """Revision of the model, for a Hub id."""
        return self.model.revision

    @classmethod
    def parse(cls, text: str, exists: Callable[[str], bool] = os.path.exists) -> ModelReference:
        """Read ``PATH_OR_HUB_ID[@REVISION][+ADAPTER[@REVISION]]``.

        A part that names an existing local path is that path, even with ``@`` or ``+`` in its name;
        ``exists`` decides.

        Raises:
            RecipeError: a part is empty, there are too many parts, or the text holds control characters.
        """
        if not text.strip():
            raise _wrong(text, "is empty")
        if len(text) > MAX_LENGTH:
            raise _wrong(text, f"is longer than {MAX_LENGTH} characters")
        if any(ord(c) < 32 or ord(c) == 127 for c in text):
            raise _wrong(text, "holds a control character")
        text = text.strip()
        if exists(text):
            return cls(Place(text))
        model, plus, adapter = text.rpartition("+")
        if not plus:
            return cls(_place(text, text, exists))
        if "+" in model and not exists(model):
            raise _wrong(text, "has more than one adapter")
        return cls(_place(model, text, exists), _place(adapter, text, exists))


def _place(text: str, whole: str, exists: Callable[[str], bool]) -> Place:
    if exists(text):
        return Place(text)
    path, at, revision = text.partition("@")
    if not path or (at and not revision) or "@" in revision:
        raise _wrong(whole, f"has the part {text!r}, which is not PATH[@REVISION]")
    return Place(path, revision or None)


def _wrong(text: str, why: str) -> RecipeError:
    shown = text if len(text) <= 60 else text[:57] + "..."
    return RecipeError(f"the model reference {shown!r} {why}", fix=f"write it as {SYNTAX}")
