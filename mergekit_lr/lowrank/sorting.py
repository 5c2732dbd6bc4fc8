"""Which tensors of a fine-tune become low-rank pairs, which are kept whole, and which cannot be either.

Headers and names decide, but for one thing: whether a tensor differs from the base's at all is found by reading.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mergekit_lr.checkpoint.adapter import CONV1D_MODELS, tied_embedding
from mergekit_lr.checkpoint.dtypes import AVERAGED
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError, UsageError, join_problems
from mergekit_lr.lowrank.peft import is_embedding, is_head

Embeddings = Literal["save", "lora", "drop"]

LORA, SAVED, BIAS = "lora", "saved", "bias"
_EXPERTS = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Sorted:
    """``rules``: tensor -> `LORA`, `SAVED`, `BIAS` or ``dropped: <why>``, for every tensor of the model that may differ
    from the base (whether it does is not known yet); ``impossible``: tensors that no adapter can hold, and why."""

    rules: dict[str, str]
    impossible: dict[str, str]
    warnings: list[str]


def sort_tensors(
    model: Checkpoint,
    base: Checkpoint,
    *,
    embeddings: Embeddings = "save",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Sorted:
    """Give every tensor of ``model`` its rule.

    Matrices named ``*.weight`` become pairs; token embeddings and output heads go by ``embeddings``; norms and biases
    are kept whole. ``include``: patterns (searched in names) that a matrix must match to become a pair; others are
    dropped. ``exclude``: patterns of tensors that are dropped.

    Raises:
        CheckpointError: the two are not of one architecture: other names or shapes.
        UsageError: a pattern is no regular expression.
    """
    wanted, unwanted = _compiled(include, "include"), _compiled(exclude, "exclude")
    tied = tied_embedding(base) is not None
    rules: dict[str, str] = {}
    impossible: dict[str, str] = {}
    problems = [
        f"{n!r} is in {base.reference} and not in {model.reference}" for n in base.tensors if n not in model.tensors
    ]
    for name, info in model.tensors.items():
        old = base.tensors.get(name)
        if any(p.search(name) for p in unwanted):
            rules[name] = "dropped: excluded"
        elif old is None and not (tied and is_head(name)):
            problems.append(f"{name!r} is in {model.reference} and not in {base.reference}")
        elif old is not None and old.shape != info.shape and not _resized(name, old, info):
            problems.append(f"{name!r} is {list(info.shape)} and in the base {list(old.shape)}")
        else:
            rule = _rule(name, info, old, embeddings)
            if rule == LORA and wanted and not any(p.search(name) for p in wanted):
                rule = "dropped: not included"
            if rule.startswith("!"):
                impossible[name] = rule[1:]
            else:
                rules[name] = rule
    if problems:
        raise join_problems(CheckpointError, problems)
    return Sorted(rules, impossible, _expert_warning(rules))


def _rule(name: str, info: TensorInfo, old: TensorInfo | None, embeddings: Embeddings) -> str:
    if info.dtype not in AVERAGED or (old is not None and old.dtype not in AVERAGED):
        return f"!it is stored as {info.dtype}"
    if name.endswith(".bias"):
        return BIAS
    if not name.endswith(".weight"):
        return "!it is no module's weight or bias"
    if is_embedding(name) or is_head(name):
        if embeddings == "drop":
            return "dropped: an embedding or a head"
        return LORA if embeddings == "lora" and old is not None and old.shape == info.shape else SAVED
    if len(info.shape) == 1:
        return SAVED
    return LORA if len(info.shape) == 2 else f"!it has {len(info.shape)} dimensions"


def _resized(name: str, old: TensorInfo, new: TensorInfo) -> bool:
    """A vocabulary that grew: the only shape that a fine-tune may change."""
    return (is_embedding(name) or is_head(name)) and len(old.shape) == 2 and old.shape[1:] == new.shape[1:]


def _expert_warning(rules: dict[str, str]) -> list[str]:
    found = [n for n, r in rules.items() if r == LORA and _EXPERTS.search(n)]
    if not found:
        return []
    return [
        f"{len(found)} matrices of single experts are adapted one by one: this package applies them (BASE+ADAPTER), "
        "PEFT cannot where transformers keeps a layer's experts in one tensor"
    ]


def _compiled(patterns: Sequence[str], option: str) -> list[re.Pattern[str]]:
    try:
        return [re.compile(p) for p in patterns]
    except re.error as e:
        raise UsageError(f"{option}: not a regular expression", why=str(e)) from e


def stored_transposed(weight: str, base: Checkpoint) -> bool:
    """Whether the weight is stored ``[in, out]``: a Conv1D's, or an embedding's as PEFT sees it."""
    if is_embedding(weight):
        return True
    return (base.config or {}).get("model_type") in CONV1D_MODELS and not is_head(weight)
