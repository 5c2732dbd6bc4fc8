"""The stack of layers that a recipe's slices count in, found by its name and checked against config.json."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_lr.arch.layers import layer_of
from mergekit_lr.arch.modules import COUNTS, SECTIONS, WHOLE
from mergekit_lr.arch.naming import TEXT
from mergekit_lr.errors import CheckpointError

COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Names under which configs keep the number of layers, most common first."""

_TOWER = re.compile(r"(^|[._])(vision|visual|vit|image|img|audio|speech|video)")
_BEFORE = re.compile(r"(^|[._])(word_|token_)?(embed|embeddings|embd|wte|wpe|emb|rotary_emb)")
_HEAD = re.compile(r"(^|\.)embed_out\.")
_SHARED_BIAS = re.compile(r"relative_attention_bias\.")


@dataclass(frozen=True)
class Stack:
    """Layers ``prefix.0`` to ``prefix.(count - 1)``.

    ``pinned``: tensors that are stored in the first layer and used by all, so that they move with none.
    """

    prefix: str
    count: int
    pinned: frozenset[str] = frozenset()

    def index(self, name: str) -> int | None:
        """The layer that a tensor belongs to; None if it is none of this stack."""
        place = layer_of(name)
        return place[1] if place and place[0] == self.prefix and name not in self.pinned else None

    def name(self, name: str, index: int) -> str:
        """What the tensor ``name`` of some layer is called in layer ``index``."""
        rest = name[len(self.prefix) + 1 :].partition(".")[2]
        return f"{self.prefix}.{index}.{rest}"


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section of a config that describes the language model: its ``text_config``, or the whole."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def architectures(config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Names of the model's classes; none where the entry is not a list of texts."""
    found = (config or {}).get("architectures")
    return tuple(n for n in found if isinstance(n, str)) if isinstance(found, list) else ()


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
    return bool(_BEFORE.search(name) or _TOWER.search(name) or _SHARED_BIAS.search(name))


def main_stack(names: Iterable[str], config: Mapping[str, Any] | None, reference: str) -> Stack:
    """The one stack of the language model. ``reference`` names the model in errors.

    Towers for pictures and sound are left out by their names; among several stacks that remain, the config's number
    of layers decides.

    Raises:
        CheckpointError: there is no such stack, there are several, layers are missing, or the config counts
            otherwise.
    """
    listed = list(names)
    stacks = _stacks(listed, reference)
    if config is not None and config.get("is_encoder_decoder"):
        raise _unclear(
            reference,
            "it is an encoder with a decoder, which have a stack each",
            "write `modules: {encoder: {slices: [...]}, decoder: {models: [...]}}`, or merge it whole, under `models`",
        )
    language = {p: s for p, s in stacks.items() if not _TOWER.search(p)} or stacks
    claimed = claimed_layers(config)
    if len(language) > 1:
        fitting = {p: s for p, s in language.items() if len(s) == claimed and max(s) == claimed - 1}
        if len(fitting) != 1:
            found = ", ".join(f"{p} ({len(s)} layers)" for p, s in sorted(language.items())[:4])
            raise _unclear(reference, f"it has several stacks: {found}")
        language = fitting
    [(prefix, layers)] = language.items()
    after = language_config(config or {}).get("num_nextn_predict_layers")
    if claimed is not None and type(after) is int and after > 0 and len(layers) == claimed + after:
        plural = "s" * (after > 1)
        raise _unclear(reference, f"it has {after} layer{plural} after those for tokens beyond the next one")
    return _checked(prefix, layers, listed, claimed, reference)


def part_stack(part: str, names: Iterable[str], config: Mapping[str, Any] | None, reference: str) -> Stack:
    """The layers of one part of a model (`mergekit_lr.arch.modules`), given that part's ``names``.

    Raises:
        CheckpointError: as `main_stack` does.
    """
    if part in (WHOLE, TEXT):
        return main_stack(names, config, reference)
    listed = list(names)
    if part not in COUNTS:
        raise _unclear(reference, f"its {part} has no layers of its own")
    stacks = _stacks(listed, reference)
    if len(stacks) > 1:
        found = ", ".join(f"{p} ({len(s)} layers)" for p, s in sorted(stacks.items())[:4])
        raise _unclear(reference, f"its {part} has several stacks: {found}")
    [(prefix, layers)] = stacks.items()
    return _checked(prefix, layers, listed, part_layers(part, config), reference)


def part_section(part: str, config: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """The section of a config that describes a part: its key (None for the config itself) and what it holds."""
    for key in SECTIONS.get(part, ("text_config",) if part == WHOLE else ()):
        nested = config.get(key)
        if isinstance(nested, dict):
            return key, nested
    return None, config


def part_layers(part: str, config: Mapping[str, Any] | None) -> int | None:
    """How many layers a config says that a part has; None where it does not say."""
    if config is None:
        return None
    if part not in COUNTS:
        return claimed_layers(config)
    section = part_section(part, config)[1]
    return next((section[k] for k in COUNTS[part] if type(section.get(k)) is int), None)


def _stacks(names: list[str], reference: str) -> dict[str, set[int]]:
    stacks: dict[str, set[int]] = defaultdict(set)
    for name in names:
        place = layer_of(name)
        if place:
            stacks[place[0]].add(place[1])
    if not stacks:
        raise _unclear(reference, "no tensor's name has a layer number in it")
    return stacks


def _checked(prefix: str, layers: set[int], names: list[str], claimed: int | None, reference: str) -> Stack:
    if layers != set(range(len(layers))):
        missing = next(i for i in range(len(layers)) if i not in layers)  # a number may be 10^12
        raise _unclear(reference, f"{prefix} has layers up to {max(layers)}, but no layer {missing}")
    if claimed is not None and claimed != len(layers):
        raise _unclear(reference, f"config.json says {claimed} layers, and {prefix} has {len(layers)}")
    shared = {n for n in names if n.startswith(f"{prefix}.0.") and _SHARED_BIAS.search(n)}
    second = f"{prefix}.1."
    pinned = frozenset(n for n in shared if second + n[len(second) :] not in names)
    return Stack(prefix, len(layers), pinned if len(layers) > 1 else frozenset(shared))


def _unclear(reference: str, why: str, fix: str = "merge it whole, under `models`") -> CheckpointError:
    return CheckpointError("its layers cannot be sliced", where=reference, why=why, fix=fix)
