"""Models must number their tokens alike where a recipe says nothing of a tokenizer: rows are merged by number."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError, join_problems
from mergekit_lr.tokenizer.vocabulary import Vocabulary, read_vocabulary, tokenizer_folder

FIX = (
    "add `tokenizer_source: union` to keep the tokens of all models, or `tokenizer_source: base` to keep those of the "
    "first: rows of embeddings then follow the token"
)


def check_vocabularies(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse inputs whose tokens have different ids: row i of the embeddings would mean different tokens.

    Raises:
        CheckpointError: counts and names tokens that differ. Models without tokenizer.json are not compared.
    """
    reference: tuple[str, Vocabulary] | None = None
    problems: list[str] = []
    for checkpoint in checkpoints:
        folder = tokenizer_folder(checkpoint)
        if folder is None or not (folder / "tokenizer.json").is_file():
            continue
        found = read_vocabulary(checkpoint)
        assert found is not None
        if reference is None:
            reference = (checkpoint.reference, found)
            continue
        name, own = reference
        differ = sorted(t for t in own.ids.keys() & found.ids.keys() if own.ids[t] != found.ids[t])
        only = sorted(found.ids.keys() - own.ids.keys())
        missing = len(own.ids.keys() - found.ids.keys())
        # A token that only one of them has is harmless unless another token stands at its id.
        taken = set(own.ids.values())
        moved = [t for t in only if found.ids[t] in taken]
        if differ or moved:
            shown = ", ".join(repr(t) for t in (differ or moved)[:3])
            problems.append(
                f"{checkpoint.reference}: {len(differ) or len(moved)} tokens have other ids than in {name} "
                f"(for example {shown}; {len(only)} tokens only here, {missing} only there); {FIX}"
            )
    if problems:
        raise join_problems(CheckpointError, problems)
