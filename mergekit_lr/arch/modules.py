"""The parts of a model that a recipe may merge each in its own way, found from names and config alone.

* an encoder with a decoder: ``encoder``, ``decoder``, and ``shared`` for what belongs to both or to neither;
* a language model that also sees or hears: ``text_decoder``, ``vision_tower``, ``audio_tower``,
  ``multi_modal_projector``;
* anything else: ``default``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mergekit_lr.arch.naming import AUDIO, DECODER, ENCODER, PROJECTOR, SHARED, TEXT, VISION, place_in

WHOLE = "default"
SYNONYMS = {
    **{"vision_model": VISION, "visual": VISION, "vision": VISION, "vision_encoder": VISION},
    **{"language_model": TEXT, "text_model": TEXT, "text": TEXT},
    **{"projector": PROJECTOR, "connector": PROJECTOR, "merger": PROJECTOR, "audio_encoder": AUDIO},
}
"""Other words for the same part, as mergekit and config files use them."""

_CODER = re.compile(r"^(?:model\.|transformer\.)?(encoder|decoder)\.")
SECTIONS = {TEXT: ("text_config",), VISION: ("vision_config",), AUDIO: ("audio_config",)}
DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")
COUNTS: dict[str, tuple[str, ...]] = {
    ENCODER: ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers"),
    DECODER: (*DECODER_COUNTS, "num_layers", "num_hidden_layers"),
    VISION: ("num_hidden_layers", "depth", "num_layers", "layers"),
    AUDIO: ("num_hidden_layers", "encoder_layers", "num_layers", "depth"),
}
"""Names under which configs count the layers of each part that is not a language model, the first that is there."""


def modules_of(names: Iterable[str], config: Mapping[str, Any] | None) -> dict[str, str]:
    """The part that each tensor belongs to, by its name."""
    listed = list(names)
    coders = {n: m[1] for n in listed if (m := _CODER.match(n))}
    if {ENCODER, DECODER} <= set(coders.values()) and (config is None or config.get("is_encoder_decoder", True)):
        return {n: coders.get(n, SHARED) for n in listed}
    parts = {n: place_in(n)[0] for n in listed}
    if set(parts.values()) == {TEXT}:
        return dict.fromkeys(listed, WHOLE)
    return parts


def module_named(word: str, known: Iterable[str]) -> str | None:
    """The part that a recipe means by ``word``; None if the model has none such."""
    found = set(known)
    meant = word if word in found else SYNONYMS.get(word, word)
    if meant not in found and found == {WHOLE} and meant in (TEXT, DECODER):
        meant = WHOLE
    return meant if meant in found else None
