"""Which tensors of a model have a row for each token, told from names and shapes."""

from __future__ import annotations

import re

from mergekit_lr.arch.layers import layer_of
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError

_EMBEDDINGS = re.compile(
    r"(?:^|\.)(?:embed_tokens(?:_per_layer)?|word_embeddings|wte|embed_in|tok_embeddings|token_embedding|shared|embedding"
    r"|backbone\.embeddings|rwkv\.embeddings|transformer\.embed)\.weight$"
)
_HEADS = re.compile(
    r"(?:^|\.)(?:lm_head(?:\.decoder)?|embed_out|output|output_layer|shared_head\.head|vocab_projector"
    r"|predictions\.decoder|generator_lm_head)\.(?:weight|bias)$"
    r"|(?:^|\.)(?:lm_head|predictions)\.bias$|(?:^|\.)final_logits_bias$"
)
_OTHER_TOWERS = re.compile(r"(?:^|\.)(?:visual|vision\w*|audio\w*|image\w*|encoder\.codebook)\.")
_PER_LAYER = re.compile(r"(?:^|\.)(?:embed_tokens|shared_head\.head)\.weight$")


def vocabulary_tensors(checkpoint: Checkpoint) -> dict[str, int]:
    """Tensor name -> how many rows of tokens it has: embeddings, output heads, biases over the vocabulary.

    Rows are the first axis, or the second of a bias ``[1, V]``. What lies in layers is not looked at, but for the
    embeddings and heads of multi-token prediction.
    """
    candidates = {n: i for n, i in checkpoint.tensors.items() if not _OTHER_TOWERS.search(n) and _may_have_rows(n)}
    embeddings = {n: i.shape[0] for n, i in candidates.items() if _EMBEDDINGS.search(n) and len(i.shape) == 2}
    sizes = set(embeddings.values())
    heads = {n: rows for n, i in candidates.items() if _HEADS.search(n) and (rows := _rows(i, sizes)) is not None}
    return embeddings | heads


def _may_have_rows(name: str) -> bool:
    return layer_of(name) is None or _PER_LAYER.search(name) is not None


def _rows(info: TensorInfo, sizes: set[int]) -> int | None:
    """Tokens that a head has rows for; None for a head of something else (a pooler, a classifier)."""
    shape = info.shape
    rows = shape[1] if len(shape) == 2 and shape[0] == 1 else shape[0] if shape else 0
    return rows if rows in sizes or (not sizes and len(shape) == 2 and shape[0] > 1) else None


def vocabulary_rows(checkpoint: Checkpoint) -> int | None:
    """How many tokens a model has embeddings for; None where it has none that are known.

    Raises:
        CheckpointError: its embeddings disagree, so that one map of rows cannot be right for all.
    """
    found = vocabulary_tensors(checkpoint)
    if not found:
        return None
    if len(set(found.values())) > 1:
        told = ", ".join(f"{n} has {rows}" for n, rows in found.items())
        raise CheckpointError(
            "its embeddings and heads have different numbers of rows",
            where=checkpoint.reference,
            why=told,
            fix="give them one vocabulary first; rows cannot be moved otherwise",
        )
    return next(iter(found.values()))
