"""The stack of layers that a recipe's slices count in, found by its name and checked against config.json."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_lr.arch.layers import layer_of
from mergekit_lr.errors import CheckpointError

COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Names under which configs keep the number of layers, most common first."""

_TOWER = re.compile(r"(^|[._])(vision|visual|vit|image|img|audio|speech|video)")
_BEFORE = re.compile(r"(^|[._])(word_|token_)?(embed|embeddings|embd|wte|wpe|emb|rotary_emb)")
_HEAD = re.compile(r"(^|\.)embed_out\.")


@dataclass(frozen=True)
class Stack:
    """Layers ``prefix.0`` to ``prefix.(count - 1)``."""

    prefix: str
    count: int

    def index(self, name: str) -> int | None:
        """The layer that a tensor belongs to; None if it is none of this stack."""
        place = layer_of(name)
        return place[1] if place and place[0] == self.prefix else None

    def name(self, name: str, index: int) -> str:
        """What the tensor ``name`` of some layer is called in layer ``index``."""
        rest = name[len(self.prefix) + 1 :].partition(".")[2]
        return f"{self.prefix}.{index}.{rest}"


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section of a config that describes the language model: its ``text_config``, or the whole."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def claimed_layers(config: Mapping[str, Any] | None) -> int | None:
    """How many layers a config says that the language model has; None where it does not say."""
    if config is None:
        return None
    sections = (language_config(config), config)
    return next((s[k] for s in sections for k in COUNT_KEYS if type(s.get(k)) is int), None)


def precedes_layers(name: str) -> bool:
    """Whether a tensor outside the layers is used before them (embeddings, towers) rather than after (norm, head)."""
    if _HEAD.search(name):
        return False
    return bool(_BEFORE.search(name) or _TOWER.search(name))


def main_stack(names: Iterable[str], config: Mapping[str, Any] | None, reference: str) -> Stack:
    """The one stack of the language model. ``reference`` names the model in errors.

    Towers for pictures and sound are left out by their names; among several stacks that remain, the config's number
    of layers decides.

    Raises:
        CheckpointError: there is no such stack, there are several, layers are missing, or the config counts
            otherwise.
    """
    stacks: dict[str, set[int]] = defaultdict(set)
    for name in names:
        place = layer_of(name)
        if place:
            stacks[place[0]].add(place[1])
    if not stacks:
        raise _unclear(reference, "no tensor's name has a layer number in it")
    if config is not None and config.get("is_encoder_decoder"):
        raise _unclear(reference, "it is an encoder with a decoder, which have a stack each")
    language = {p: s for p, s in stacks.items() if not _TOWER.search(p)} or stacks
    claimed = claimed_layers(config)
    if len(language) > 1:
        fitting = {p: s for p, s in language.items() if s == set(range(claimed or 0))}
        if len(fitting) != 1:
            found = ", ".join(f"{p} ({len(s)} layers)" for p, s in sorted(language.items())[:4])
            raise _unclear(reference, f"it has several stacks: {found}")
        language = fitting
    [(prefix, found_layers)] = language.items()
    if found_layers != set(range(len(found_layers))):
        missing = min(set(range(max(found_layers))) - found_layers)
        raise _unclear(reference, f"{prefix} has layers up to {max(found_layers)}, but no layer {missing}")
    if claimed is not None and claimed != len(found_layers):
        raise _unclear(reference, f"config.json says {claimed} layers, and {prefix} has {len(found_layers)}")
    return Stack(prefix, len(found_layers))


def _unclear(reference: str, why: str) -> CheckpointError:
    return CheckpointError(
        "its layers cannot be sliced", where=reference, why=why, fix="merge it whole, under `models`"
    )
