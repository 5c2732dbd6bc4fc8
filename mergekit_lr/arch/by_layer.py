"""A config after its layers were picked anew: the count, lists with an entry for each layer, rules by layer number.

Most configs say only how many layers there are. Some list each layer's kind, some list the layers of one kind, and
some give a rule on the layer's number (every second layer is sparse, the first three are dense). Counts and
lists can be written anew. A rule cannot, so it must give every layer in its new place the kind it was trained as.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from mergekit_lr.arch.modules import COUNTS, DECODER_COUNTS, WHOLE
from mergekit_lr.arch.naming import DECODER, ENCODER
from mergekit_lr.arch.stack import COUNT_KEYS, part_layers, part_section
from mergekit_lr.errors import CheckpointError

Config = Mapping[str, Any]

EACH_LAYER = (
    *("layer_types", "layers_block_type", "mlp_layer_types", "attention_layers", "no_rope_layers"),
    *("activation_sparsity_pattern", "block_types", "mlp_bias_layers"),
)
"""Lists with one entry for each layer. Of other keys, a list that is as long as the model is deep is one too if its
name speaks of layers, or if it is a list where most configs have a number."""

REPEATED = ("block_types",)
"""Lists that start again where the model is deeper than they are long."""

_NUMBERS = (
    "intermediate_size",
    "num_key_value_heads",
    "num_attention_heads",
    "head_dim",
    "hidden_act",
    "sliding_window",
)

LAYERS_OF_A_KIND = (
    *("mlp_only_layers", "moe_layers", "full_attn_idxs", "hybrid_layer_ids", "attn_layer_indices"),
    *("fullatt_block_indexes", "global_attn_indexes"),
)
"""Lists of the numbers of the layers that are of one kind."""

WHOLE_ONLY = (
    *("num_kv_shared_layers", "scale_attn_by_inverse_layer_idx", "attention_types"),
    *("deepstack_visual_indexes", "intermediate_layers_indices"),
)
"""Settings that tie layers to the depth of the model; where they are on, layers cannot be moved."""

SLIDING_EVERY = {"gemma2": 2, "gpt_oss": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "exaone4": 4}
"""Families whose attention alternates by the layer's number where the config lists no layer types."""


def _whole(config: Config, key: str, default: int = 0) -> int:
    value = config.get(key)
    return value if type(value) is int else default


def _every(config: Config, i: int, key: str, offset: int = 0) -> bool:
    period = _whole(config, key)
    return period > 0 and (i - offset) % period == 0


def _alternates(config: Config, i: int) -> bool:
    """Full attention, by sliding_window_pattern or the family's habit."""
    if "layer_types" in config:
        return True
    period = SLIDING_EVERY.get(str(config.get("model_type")), 0)
    period = _whole(config, "_sliding_window_pattern", _whole(config, "sliding_window_pattern", period))
    return period > 1 and (i + 1) % period == 0


def _slides_late(config: Config, i: int) -> bool:
    if "layer_types" in config or not config.get("use_sliding_window"):
        return False
    return i >= _whole(config, "max_window_layers")


def _rotates(config: Config, i: int) -> bool:
    return "no_rope_layers" in config or _every(config, i + 1, "no_rope_layer_interval")


def _to_the_end(config: Config) -> bool:
    """Mixtures reach to the last layer, however deep the model is."""
    end = _whole(config, "moe_layer_end_index", -1)
    return end == -1 or end == _whole(config, "num_hidden_layers") - 1


RULES: dict[str, Callable[[Config, int], Hashable]] = {
    "decoder_sparse_step": lambda c, i: _every(c, i + 1, "decoder_sparse_step"),
    "first_k_dense_replace": lambda c, i: i >= _whole(c, "first_k_dense_replace"),
    "num_dense_layers": lambda c, i: i >= _whole(c, "num_dense_layers"),
    "moe_layer_freq": lambda c, i: _every(c, i, "moe_layer_freq"),
    "moe_layer_interval": lambda c, i: _every(c, i + 1, "moe_layer_interval"),
    "moe_layer_start_index": lambda c, i: i >= _whole(c, "moe_layer_start_index"),
    "moe_layer_end_index": lambda c, i: _to_the_end(c) or i <= _whole(c, "moe_layer_end_index"),
    "interleave_moe_layer_step": lambda c, i: "moe_layers" in c or _every(c, i + 1, "interleave_moe_layer_step"),
    "global_attn_every_n_layers": lambda c, i: "layer_types" in c or _every(c, i + 1, "global_attn_every_n_layers"),
    "attn_layer_period": lambda c, i: _every(c, i, "attn_layer_period", _whole(c, "attn_layer_offset")),
    "expert_layer_period": lambda c, i: _every(c, i, "expert_layer_period", _whole(c, "expert_layer_offset")),
    "max_window_layers": _slides_late,
    "sliding_window_pattern": _alternates,
    "no_rope_layer_interval": _rotates,
}
"""What kind a layer is by its number, for each setting that decides it so."""


def relayered(
    config: Config, reference: str, layers: Sequence[tuple[Config, str, int]], part: str = WHOLE
) -> dict[str, Any]:
    """``config`` for a model whose layer k was layer i of another: ``layers[k] = (its config, its reference, i)``.

    ``part``: whose layers these are, as `mergekit_lr.arch.modules` names it.

    Raises:
        CheckpointError: the config does not count its layers, lists them in a way that cannot be carried over, or
            has a rule under which a moved layer would be of another kind.
    """
    key, section = part_section(part, config)
    stated = part_layers(part, config)
    if len(layers) == stated and all(i == k for k, (_, _, i) in enumerate(layers)):
        return dict(config)
    sources = [(part_section(part, c)[1], name, i) for c, name, i in layers]
    new = _recounted(part, section, len(layers), stated) | _lists(section, reference, sources, stated)
    end = section.get("moe_layer_end_index")
    if type(end) is int and end >= 0 and _to_the_end(section):
        new["moe_layer_end_index"] = len(layers) - 1
    _check_rules(new, reference, sources)
    if stated is None:
        raise CheckpointError(
            "config.json does not say how many layers there are",
            where=reference,
            why=f"none of {', '.join(COUNTS.get(part, COUNT_KEYS))} is in it",
            fix="add the number that the model has",
        )
    if key is None:
        return new
    outer = _recounted(part, config, len(layers), stated) if key == "text_config" else dict(config)
    return {**outer, key: new}


def _recounted(part: str, section: Config, count: int, stated: int | None) -> dict[str, Any]:
    """``section`` with the number of a part's layers, under every name that it has it under."""
    new = dict(section)
    for key in COUNTS.get(part, COUNT_KEYS):
        if type(new.get(key)) is int and (part != DECODER or key in DECODER_COUNTS):
            new[key] = count
    if part in (ENCODER, DECODER) and not any(k in section for k in DECODER_COUNTS):
        new[DECODER_COUNTS[-1]] = count if part == DECODER else stated  # until now one number stood for both
    return new


def _lists(
    section: Config, reference: str, sources: Sequence[tuple[Config, str, int]], stated: int | None
) -> dict[str, Any]:
    """The lists of a config, each entry taken from where its layer came from."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        if key in LAYERS_OF_A_KIND and isinstance(value, list):
            found[key] = [k for k, (own, _, i) in enumerate(sources) if i in (own.get(key) or [])]
        elif _has_one_each(key, value, stated):
            found[key] = [_entry(own, key, name, i) for own, name, i in sources]
    missing = {k: name for own, name, _ in sources for k in EACH_LAYER if own.get(k) and not section.get(k)}
    for key, name in missing.items():
        raise CheckpointError(
            f"config.json has no {key}, and that of {name} has", where=reference, fix="name that model as base_model"
        )
    return found


def _has_one_each(key: str, value: Any, count: int | None) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return key in EACH_LAYER or (len(value) == count and ("layer" in key or key in _NUMBERS))


def _entry(own: Config, key: str, name: str, index: int) -> Any:
    values = own.get(key)
    if isinstance(values, list) and key in REPEATED and values:
        return values[index % len(values)]
    if not isinstance(values, list) or index >= len(values):
        raise CheckpointError(
            f"config.json has no {key} for layer {index}", where=name, fix="give every layer an entry in it"
        )
    return values[index]


def _check_rules(new: Config, reference: str, sources: Sequence[tuple[Config, str, int]]) -> None:
    for key in WHOLE_ONLY:
        if new.get(key):
            raise CheckpointError(
                "its layers cannot be moved",
                where=reference,
                why=f"config.json has {key} {new[key]!r}",
                fix="merge it whole, under `models`",
            )
    for k, (own, name, i) in enumerate(sources):
        for key, kind in RULES.items():
            if kind(new, k) != kind(own, i):
                raise CheckpointError(
                    f"layer {i} would be of another kind as layer {k} of the output",
                    where=name,
                    why=f"{key} in config.json gives a layer's kind by its number",
                    fix="choose slices that keep every layer's place in that pattern",
                )
