"""Rows of embeddings that mean the same token, where two models have different tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lr.arch.tied import EMBEDDINGS, HEADS
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.small_files import read_json
from mergekit_lr.errors import CheckpointError

ROWS = frozenset((*EMBEDDINGS, *HEADS, "wte.weight", "embeddings.word_embeddings.weight"))
"""Tensors whose first axis counts tokens."""


def token_numbers(model: Checkpoint) -> dict[str, int] | None:
    """token -> row, from tokenizer.json; None where there is none."""
    path = None if model.folder is None else Path(model.folder) / "tokenizer.json"
    if path is None or not path.exists():
        return None
    data: Any = read_json(path, most=1 << 28)
    vocabulary = data.get("model", {}).get("vocab", {}) if isinstance(data, dict) else {}
    if isinstance(vocabulary, dict):
        found = {str(t): int(i) for t, i in vocabulary.items()}
    else:  # Unigram: a list of (token, score)
        found = {str(entry[0]): i for i, entry in enumerate(vocabulary)}
    for added in data.get("added_tokens", []) if isinstance(data, dict) else []:
        found[str(added["content"])] = int(added["id"])
    return found


def row_map(first: Checkpoint, other: Checkpoint) -> Tensor | None:
    """int64, for each token row of ``first`` the row of the same token in ``other``, -1 where it has none.

    None where both number their tokens alike, or where one of them has no tokenizer.json and so cannot be compared.

    Raises:
        CheckpointError: the two share no token at all.
    """
    a, b = token_numbers(first), token_numbers(other)
    if a is None or b is None or a == b:
        return None
    rows = max((first.tensors[n].shape[0] for n in first.tensors if n in ROWS), default=0)
    most = min((other.tensors[n].shape[0] for n in other.tensors if n in ROWS), default=0)
    found = torch.full((rows,), -1, dtype=torch.int64)
    for token, i in a.items():
        j = b.get(token, -1)
        if i < rows and j < most:
            found[i] = j
    if rows and not bool((found >= 0).any()):
        raise CheckpointError(
            "its tokenizer shares no token with that of the first model",
            where=other.reference,
            fix="merge models that share at least a part of their vocabulary",
        )
    return found


def take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """The rows in the order of the map; zeros where there is none."""
    picked = tensor.index_select(0, rows.clamp_min(0))
    return picked * (rows >= 0).to(picked.dtype).reshape(-1, *[1] * (tensor.ndim - 1))
