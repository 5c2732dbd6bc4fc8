"""Text of a dataset on the Hugging Face Hub, where the optional package ``datasets`` is installed."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint.reference import Place
from mergekit_lr.errors import CheckpointError

COLUMN = "text"


def is_dataset(text: str | Path) -> bool:
    """It is written ``org/name[:CONFIG[:SPLIT]]`` and no such file is there."""
    if isinstance(text, Path) or Path(text).exists():
        return False
    name = text.split(":")[0]
    return Place(name).is_hub_id and "/" in name and "." not in name.rpartition("/")[2]


def dataset_text(reference: str, *, at_least: int) -> str:
    """The first records' ``text`` of a dataset, joined by blank lines, until there are ``at_least`` characters.

    Written ``org/name``, ``org/name:CONFIG`` or ``org/name:CONFIG:SPLIT``; the split is ``train`` by default. Records
    are streamed in the dataset's own order; nothing of it is executed.

    Raises:
        CheckpointError: ``datasets`` is not installed, the dataset cannot be had, or it has no column ``text``.
    """
    try:
        import datasets
    except ImportError as e:
        raise CheckpointError(
            "a Hub dataset needs the package datasets",
            where=reference,
            why="no file of that name is there",
            fix="pip install 'mergekit-lr[datasets]', or give a text file",
        ) from e
    name, _, rest = reference.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = iter(datasets.load_dataset(name, config or None, split=split or "train", streaming=True))
        first: dict[str, Any] = next(rows)
    except StopIteration as e:
        raise CheckpointError("the dataset is empty", where=reference) from e
    except Exception as e:  # what a dataset raises is not one family
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise CheckpointError("cannot get the dataset", where=reference, why=why) from e
    if not isinstance(first.get(COLUMN), str):
        raise CheckpointError(
            f"the dataset has no column {COLUMN!r} of text", where=reference, why=f"it has {', '.join(first)}"
        )
    parts: list[str] = []
    length = 0
    for row in chain([first], rows):
        parts.append(row[COLUMN])
        length += len(row[COLUMN]) + 2
        if length >= at_least:
            break
    return "\n\n".join(parts)
