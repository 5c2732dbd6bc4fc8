"""The public ``transplant``: a model with another model's tokenizer, by the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_lr.engine.plan import DEFAULT_SHARD
from mergekit_lr.engine.progress import Progress
from mergekit_lr.engine.run import MergeResult, merge


def transplant(
    model: str | Path,
    donor: str | Path,
    out: str | Path,
    *,
    k: int = 64,
    approximation_method: str = "omp",
    cosine_similarity: bool = False,
    weight_scheme: str = "distance_proportional",
    subword_method: str = "mean",
    prefix_match: str = "no",
    byte_match: str = "no",
    dtype: str | None = None,
    seed: int = 0,
    device: str = "auto",
    max_memory: str | int | None = None,
    threads: int | None = None,
    shard_size: str | int = DEFAULT_SHARD,
    resume: bool = True,
    overwrite: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Write ``model`` with the tokenizer of ``donor`` to the folder ``out``; the recipe ``merge_method: transplant``.

    The same models and arguments give the same bytes, whatever the threads, the memory budget and interruptions.

    Args:
        k: most tokens in a combination that stands for a new one.
        approximation_method: ``omp``, ``common_interpolation``, ``subword``, ``mean``, ``zero`` or ``randn``; what each
            is, and what the arguments after it mean, is on the page docs/methods/transplant.md.
        dtype: ``float32``, ``float16`` or ``bfloat16`` to write; by default each tensor's own.
        seed: decides the rows that ``randn`` draws.
        other arguments: as in `merge`.

    Raises:
        CheckpointError: one of the two has no tokenizer or no embeddings that are known, or they share no token.
        RecipeError: an argument is out of range.
    """
    parameters: dict[str, Any] = {
        "k": k,
        "approximation_method": approximation_method,
        "cosine_similarity": cosine_similarity,
        "weight_scheme": weight_scheme,
        "subword_method": subword_method,
        "prefix_match": prefix_match,
        "byte_match": byte_match,
    }
    recipe = {
        "merge_method": "transplant",
        "base_model": str(model),
        "models": [{"model": str(donor)}],
        "parameters": parameters,
        "seed": seed,
    }
    return merge(
        recipe | ({} if dtype is None else {"out_dtype": dtype}),
        out,
        device=device,
        max_memory=max_memory,
        threads=threads,
        shard_size=shard_size,
        resume=resume,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
        progress=progress,
    )
