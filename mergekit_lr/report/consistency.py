"""What a config.json claims against what the tensors are: shapes in headers are the truth.

Checks that hold for every architecture are made always; those that depend on how a family lays out its attention
only for families known to follow it. Nothing here reads weights.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mergekit_lr.arch.layers import layer_of
from mergekit_lr.arch.moe_families import EXPERT_KEYS, SHARED_KEYS
from mergekit_lr.arch.stack import architectures
from mergekit_lr.arch.tied import EMBEDDINGS, HEADS
from mergekit_lr.checkpoint.header import TensorInfo

Tensors = Mapping[str, TensorInfo]

_GROUPS = "num_key_value_heads"
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_ROUTER = re.compile(r"\.(mlp|block_sparse_moe|feed_forward)\.(gate|router)\.weight$")
_ROUTER_BIAS = (".e_score_correction_bias", ".gate.bias", ".router.bias")
# Families whose q/k/v projections are (heads x head_dim) rows and whose gated MLP is (intermediate x hidden).
PLAIN_FAMILIES = frozenset(
    {"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"}
    | {"olmo", "olmo2", "granite", "cohere", "starcoder2", "stablelm", "smollm3"}
)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: itself, or its ``text_config``."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def whole(config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of ``keys`` that holds an integer."""
    return next((config[k] for k in keys if type(config.get(k)) is int), None)


def expert_count(config: Mapping[str, Any]) -> int | None:
    """Routed experts that a config claims for each MoE layer."""
    return whole(text_config(config), *EXPERT_KEYS)


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Layers that a config claims for its main stack."""
    return whole(text_config(config), "num_hidden_layers", "n_layer", "num_layers", "n_layers")


def layers_by_stack(names: Iterable[str]) -> dict[str, set[int]]:
    """Layer indices of each stack: ``{"model.layers": {0, 1, ...}}``."""
    stacks: dict[str, set[int]] = defaultdict(set)
    for name in names:
        place = layer_of(name)
        if place:
            stacks[place[0]].add(place[1])
    return dict(stacks)


def experts_by_layer(tensors: Tensors) -> dict[tuple[str, int], int]:
    """Routed experts of each MoE layer, from per-expert names or from the first axis of fused tensors."""
    found: dict[tuple[str, int], set[int]] = defaultdict(set)
    fused: dict[tuple[str, int], int] = {}
    for name, info in tensors.items():
        place = layer_of(name)
        if place is None:
            continue
        numbered = _EXPERT.search(name)
        if numbered:
            found[place].add(int(numbered[1]))
        elif ".experts." in name and len(info.shape) == 3 and ".shared_experts." not in name:
            fused[place] = info.shape[0]
    return {**fused, **{place: len(indices) for place, indices in found.items()}}


def config_problems(config: Mapping[str, Any], tensors: Tensors) -> list[str]:
    """Every contradiction between a config and the tensors' names and shapes, each naming both sides."""
    text = text_config(config)
    return [
        *_vocabulary(text, tensors),
        *_width(text, tensors),
        *_layers(config, tensors),
        *_experts(config, tensors),
        *_attention(text, tensors),
        *_head(config, tensors),
    ]


def count_problems(config: Mapping[str, Any], tensors: Tensors) -> list[str]:
    """Layers and experts that a config claims and the tensors lack: a loader would build as many as are claimed."""
    return [*_layers(config, tensors), *_experts(config, tensors)]


def _vocabulary(text: Mapping[str, Any], tensors: Tensors) -> list[str]:
    claimed = whole(text, "vocab_size")
    if claimed is None:
        return []
    present = [n for n in (*EMBEDDINGS, *HEADS) if n in tensors and len(tensors[n].shape) == 2]
    return [
        f"config.json says vocab_size {claimed}, but {n!r} has {tensors[n].shape[0]} rows"
        for n in present
        if tensors[n].shape[0] != claimed
    ]


def _width(text: Mapping[str, Any], tensors: Tensors) -> list[str]:
    claimed = whole(text, "hidden_size", "n_embd", "d_model")
    if claimed is None or {"embedding_size", "word_embed_proj_dim"} & text.keys():
        return []
    present = [n for n in EMBEDDINGS if n in tensors and len(tensors[n].shape) == 2]
    return [
        f"config.json says hidden size {claimed}, but {n!r} has {tensors[n].shape[1]} columns"
        for n in present
        if tensors[n].shape[1] != claimed
    ]


def _layers(config: Mapping[str, Any], tensors: Tensors) -> list[str]:
    claimed = layer_count(config)
    stacks = layers_by_stack(tensors)
    main = main_stack(stacks)
    if claimed is None or main is None:
        return []
    present = stacks[main]
    extra = whole(text_config(config), "num_nextn_predict_layers", "mtp_num_hidden_layers") or 0
    held = sum(i < claimed for i in present)  # a count of 10^12 is a lie, and no reason to count so far
    if max(present) + 1 > claimed + extra or held < claimed - claimed // 2:
        return [f"config.json says {claimed} layers, but {main} has {len(present)}"]
    absent = sorted(set(range(claimed)) - present)
    return [f"config.json says {claimed} layers, but {main}.{absent[0]} is missing{more(absent)}"] if absent else []


def main_stack(stacks: Mapping[str, set[int]]) -> str | None:
    """The stack of decoder layers: that of a language model if one is named so, else the longest."""
    named = [s for s in stacks if s.endswith(("layers", ".h", "blocks")) and not re.search("vision|visual|audio", s)]
    candidates = named or list(stacks)
    return max(candidates, key=lambda s: len(stacks[s]), default=None)


def _experts(config: Mapping[str, Any], tensors: Tensors) -> list[str]:
    claimed, text = expert_count(config), text_config(config)
    counts = experts_by_layer(tensors)
    if claimed is None:
        return []
    if isinstance(text.get("expert_map"), dict):
        return list(_mapped_experts(text["expert_map"], claimed, counts))
    said = {k: text[k] for k in EXPERT_KEYS if type(text.get(k)) is int}
    problems = [f"config.json contradicts itself: {said}"] if len(set(said.values())) > 1 else []
    problems += [
        f"config.json says {claimed} experts, but {stack}.{layer} has {n}"
        for (stack, layer), n in sorted(counts.items())
        if n != claimed
    ]
    problems += _shared_experts(text, tensors)
    for name, info in tensors.items():
        # ERNIE keeps it as [1, experts]
        bias = name.endswith(_ROUTER_BIAS) and layer_of(name) in counts
        if bias and info.numel != claimed:
            problems.append(f"config.json says {claimed} experts, but {name!r} is {list(info.shape)}")
        if _ROUTER.search(name) and len(info.shape) == 2 and layer_of(name) in counts and info.shape[0] != claimed:
            problems.append(f"config.json says {claimed} experts, but the router {name!r} has {info.shape[0]} rows")
    chosen = whole(text, "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts")
    if chosen is not None and chosen > claimed:
        problems.append(f"config.json routes each token to {chosen} experts of {claimed}")
    return problems


def _shared_experts(text: Mapping[str, Any], tensors: Tensors) -> Iterator[str]:
    """Shared experts that are wider or narrower than the config says."""
    width, number = whole(text, "moe_intermediate_size"), whole(text, *SHARED_KEYS)
    many = f"{number} shared experts of width {width}"
    expected = {
        ".shared_expert.": (whole(text, "shared_expert_intermediate_size"), "a shared expert of that width"),
        ".shared_experts.": (None if width is None or number is None else width * number, many),
    }
    for name, info in tensors.items():
        for part, (rows, claim) in expected.items():
            plain = part in name and name.endswith(("gate_proj.weight", "up_proj.weight")) and len(info.shape) == 2
            if plain and rows is not None and info.shape[0] != rows:
                yield f"config.json says {claim} ({rows} rows), but {name!r} has {info.shape[0]}"


def _mapped_experts(mapping: Mapping[str, Any], rows: int, counts: Mapping[tuple[str, int], int]) -> Iterator[str]:
    """Layers whose experts are not those that a map of router rows to experts leads to."""
    for (stack, layer), n in sorted(counts.items()):
        own = mapping.get(str(layer))
        if not isinstance(own, list) or len(own) != rows:
            yield f"config.json has no expert_map for the {rows} router rows of {stack}.{layer}"
        elif set(own) != set(range(n)):
            yield f"the expert_map of {stack}.{layer} does not lead to each of its {n} experts"


def _attention(text: Mapping[str, Any], tensors: Tensors) -> list[str]:
    if text.get("model_type") not in PLAIN_FAMILIES:
        return []
    hidden, heads = whole(text, "hidden_size"), whole(text, "num_attention_heads")
    if hidden is None or not heads:
        return []
    size = whole(text, "head_dim") or hidden // heads
    groups = whole(text, _GROUPS) or heads
    inner = whole(text, "intermediate_size")
    queries, keys = (f"{k} {n} x head_dim {size}" for k, n in (("num_attention_heads", heads), (_GROUPS, groups)))
    expected = {
        ".self_attn.q_proj.weight": (queries, (heads * size, hidden)),
        ".self_attn.k_proj.weight": (keys, (groups * size, hidden)),
        ".self_attn.v_proj.weight": (keys, (groups * size, hidden)),
        ".self_attn.o_proj.weight": (queries, (hidden, heads * size)),
    }
    if inner is not None:
        expected[".mlp.gate_proj.weight"] = (f"intermediate_size {inner}", (inner, hidden))
        expected[".mlp.up_proj.weight"] = (f"intermediate_size {inner}", (inner, hidden))
        expected[".mlp.down_proj.weight"] = (f"intermediate_size {inner}", (hidden, inner))
    wrong: dict[str, list[str]] = defaultdict(list)
    main = main_stack(layers_by_stack(tensors))
    for name, info in tensors.items():
        place = layer_of(name)
        if place is None or place[0] != main:  # a vision tower has sizes of its own
            continue
        for ending, (key, shape) in expected.items():
            if name.endswith(ending) and info.shape != shape:
                wrong[f"{key} in config.json asks for {list(shape)}"].append(f"{name!r} is {list(info.shape)}")
    return [f"{claim}, but {found[0]}{more(found)}" for claim, found in wrong.items()]


def _head(config: Mapping[str, Any], tensors: Tensors) -> list[str]:
    causal = any(a.endswith("ForCausalLM") for a in architectures(config))
    untied = text_config(config).get("tie_word_embeddings") is False
    if causal and untied and not any(n in tensors for n in HEADS) and any(n in tensors for n in EMBEDDINGS):
        return ["config.json says the output head is not tied, but there is none: loaders would make up a random one"]
    return []


def layer_outliers(tensors: Tensors) -> list[str]:
    """Tensors that all other layers of their stack have and some layers lack: a sign that something was lost."""
    kinds: dict[tuple[str, str], set[int]] = defaultdict(set)
    for name in tensors:
        place = layer_of(name)
        if place and not _EXPERT.search(name):
            kinds[place[0], name[len(f"{place[0]}.{place[1]}.") :]].add(place[1])
    stacks = layers_by_stack(tensors)
    out = []
    for (stack, kind), present in sorted(kinds.items()):
        absent = sorted(stacks[stack] - present)
        if absent and len(absent) <= len(stacks[stack]) // 8:
            out.append(f"{stack}.{absent[0]}.{kind} is missing, though {len(present)} other layers have it")
    return out


def dtype_bytes(tensors: Tensors) -> dict[str, int]:
    """Bytes by dtype, most first."""
    total: Counter[str] = Counter()
    for info in tensors.values():
        total[info.dtype] += info.nbytes
    return dict(total.most_common())


def more(found: Sequence[object]) -> str:
    """What follows the first of several findings in a message."""
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""
