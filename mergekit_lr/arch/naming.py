"""One tensor under the names that different releases and wrappers give it.

A language model alone, the same model inside a model that also sees pictures, and the same again after transformers
renamed its modules keep their tensors under different prefixes. Each name is read as (part, name within the part); two
names are the same tensor if they read alike and each model has only one such.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher

TEXT, VISION, AUDIO, PROJECTOR = "text_decoder", "vision_tower", "audio_tower", "multi_modal_projector"
ENCODER, DECODER, SHARED = "encoder", "decoder", "shared"

_WRAPPERS = ("model.", "transformer.", "")

#: prefixes of each part, the longest of those that could apply first
PREFIXES: tuple[tuple[str, str], ...] = (
    *((PROJECTOR, f"{p}visual.{m}") for p in _WRAPPERS for m in ("merger.", "deepstack_merger_list.")),
    *(
        (PROJECTOR, f"{p}{m}.")
        for p in _WRAPPERS
        for m in ("multi_modal_projector", "mm_projector", "connector", "embed_vision", "embed_audio", "mlp1")
    ),
    *(
        (VISION, f"{p}{m}.")
        for p in _WRAPPERS
        for m in ("vision_tower.vision_model", "vision_tower.vision_tower", "vision_tower", "vision_encoder")
    ),
    *((VISION, f"{p}{m}.") for p in _WRAPPERS for m in ("vision_model", "visual", "vision")),
    *((AUDIO, f"{p}{m}.") for p in _WRAPPERS for m in ("audio_tower", "audio_encoder", "audio_model")),
    *(
        (TEXT, p)
        for p in (
            *("model.language_model.model.", "language_model.model.", "model.language_model.", "language_model."),
            *("model.text_model.model.", "model.text_model.", "text_model.", "model."),
            *("transformer.", "gpt_neox.", "backbone."),
            *("bert.", "roberta.", "distilbert.", "electra.", "deberta.", "xlm_roberta."),
        )
    ),
)
_OLD_NORM = {".gamma": ".weight", ".beta": ".bias"}


def place_in(name: str) -> tuple[str, str]:
    """(part, name within it) of a tensor; what has no known prefix belongs to the text."""
    for old, new in _OLD_NORM.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    for part, prefix in PREFIXES:
        if name.startswith(prefix):
            return part, _within(part, name, prefix)
    return TEXT, name


def _within(part: str, name: str, prefix: str) -> str:
    """The rest of a name; what connects a Qwen tower keeps which of its two kinds it is."""
    if part is PROJECTOR and "visual." in prefix:
        return name[name.index("visual.") :]
    return name.removeprefix(prefix)


@dataclass
class Aliases:
    """What one model calls the tensors that another one, ``reference``, names; the same names mean the same tensor."""

    reference: Collection[str]
    own: Collection[str]
    _here: Mapping[tuple[str, str], str] = field(init=False, repr=False)
    _there: Mapping[tuple[str, str], str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lacking = [n for n in self.reference if n not in self.own]
        self._here = _read(n for n in self.own if n not in self.reference) if lacking else {}
        self._there = _read(lacking) if self._here else {}

    def of(self, name: str) -> str | None:
        """What the model calls the reference's ``name``; None if it has nothing that could be it."""
        if name in self.own:
            return name
        place = place_in(name) if self._here else None
        return self._here.get(place) or None if place and self._there.get(place) != "" else None

    def back(self, own: str) -> str:
        """What the reference calls the model's tensor ``own``; itself where the reference has none such."""
        if own in self.reference or not self._here:
            return own
        place = place_in(own)
        return self._there.get(place) or own if self._here.get(place) == own else own


def _read(names: Iterable[str]) -> Mapping[tuple[str, str], str]:
    """Names by what they read as; an empty name where several read alike, for then none of them is meant."""
    found: dict[tuple[str, str], str] = {}
    for name in names:
        place = place_in(name)
        found[place] = "" if place in found else name
    return found


def nearest_names(name: str, among: Iterable[str], most: int = 2) -> list[str]:
    """The names most like one that is missing: alike in part and layer first, then in spelling."""
    part, within = place_in(name)
    numbers = re.findall(r"\d+", within)

    def likeness(other: str) -> float:
        own_part, own = place_in(other)
        same = (own_part == part) + (re.findall(r"\d+", own) == numbers)
        return same + SequenceMatcher(None, within, own, autojunk=False).quick_ratio()

    return sorted(among, key=likeness, reverse=True)[:most]
