"""Output heads that the merged model has no place for, because its reference ties head and embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_lr.arch.tied import tied_source
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError, join_problems
from mergekit_lr.graph.nodes import MergeGraph
from mergekit_lr.graph.places import TIED
from mergekit_lr.lazy import torch
from mergekit_lr.pieces import element_count

STEP = 1 << 20  # elements compared at once


def refuse_untied_heads(graph: MergeGraph, inputs: Mapping[str, Checkpoint]) -> None:
    """A dropped head must hold the very numbers of the model's own embeddings; only then nothing is lost.

    Reads both tensors of such a model, so it belongs before a run, not into a plan from headers.

    Raises:
        CheckpointError: a model's head is its own; ``problems`` names every such model.
    """
    problems = []
    for model, name, rule in graph.dropped:
        if not rule.startswith(TIED):
            continue
        embeddings = tied_source(name, inputs[model].tensors)
        if embeddings is None or not _same(inputs[model], name, embeddings):
            reference = graph.models[0]
            problems.append(
                f"{model}: {name!r} differs from the model's embeddings, and {reference} ties the two, so the merge "
                f"would lose it; make a model that stores its own head the base_model (a tied model's embeddings then "
                f"count as its head), or tie the head of {model}"
            )
    if problems:
        raise join_problems(CheckpointError, problems)


def _same(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether two tensors of a model are equal bit for bit."""
    a, b = checkpoint.tensors[name], checkpoint.tensors[other]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    n = element_count(a.shape)
    for start in range(0, n, STEP):
        stop = min(n, start + STEP)
        mine, theirs = (checkpoint.read(t, start, stop).view(torch.uint8) for t in (name, other))
        if not torch.equal(mine, theirs):
            return False
    return True
