"""Python files of a model that are carried over to the output, where ``copy_code`` asks for it. They are never run.

A model of an architecture that transformers does not know comes with its classes in files beside the weights, and names
them under ``auto_map``. Without ``copy_code`` both stay behind. With it the files come along as bytes, and so does each
reference to one of them; a reference to another repository never does, for whatever is there when somebody loads the
output would run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.reference import ModelReference, Place
from mergekit_lr.checkpoint.small_files import read_plain
from mergekit_lr.errors import CheckpointError, UsageError
from mergekit_lr.tokenizer.vocabulary import tokenizer_folder

LARGEST = 4 << 20  # bytes of one file
MOST = 200  # files
_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\.py")


@dataclass(frozen=True)
class CodeFile:
    """A Python file of ``model`` as it is."""

    name: str
    data: bytes
    model: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        return {"file": self.name, "bytes": len(self.data), "sha256": self.sha256, "model": self.model}


def code_of(reference: Checkpoint, tokenizer: Checkpoint) -> list[CodeFile]:
    """The Python files of the model that the output is laid out as, and of the one that its tokenizer comes from.

    Those at the top of the folder whose names can be imported; of a model of the Hub they are fetched now, at the
    commit that it was opened at.

    Raises:
        CheckpointError: one of them is a link out of the folder, no plain file, too large or cannot be read; there are
            too many; or the two models have different files of one name.
    """
    found: dict[str, CodeFile] = {}
    for checkpoint, folder in ((reference, reference.folder), (tokenizer, tokenizer_folder(tokenizer))):
        for file in _files(checkpoint, folder):
            before = found.setdefault(file.name, file)
            if before.data != file.data:
                raise CheckpointError(
                    f"two models have different files {file.name!r}",
                    where=f"{before.model} and {file.model}",
                    why="the output's tokenizer comes from another model than its config, and one would be lost",
                    fix="take both from one model, or leave out --copy-code",
                )
    return [found[name] for name in sorted(found)]


def _files(checkpoint: Checkpoint, folder: Path | None) -> Iterable[CodeFile]:
    if folder is None:
        return
    if checkpoint.revision is not None and folder == checkpoint.folder:
        _fetch(checkpoint)
    names = sorted(p.name for p in folder.iterdir() if _MODULE.fullmatch(p.name))
    if len(names) > MOST:
        raise CheckpointError(
            f"there are {len(names)} Python files", where=str(folder), why=f"at most {MOST} are carried over",
            fix="leave out --copy-code, or remove what the model does not need",
        )  # fmt: skip
    for name in names:
        try:
            data = read_plain(folder, name, most=LARGEST)
        except CheckpointError as e:
            if isinstance(e.__cause__, OSError):
                raise
            raise CheckpointError(
                f"{name!r} is not carried over", where=str(folder), why=e.why or e.what,
                fix="remove it, copy the file into the folder, or leave out --copy-code",
            ) from e  # fmt: skip
        yield CodeFile(name, data, checkpoint.reference)


def _fetch(checkpoint: Checkpoint) -> None:
    """Bring the Python files of a model of the Hub into the cache, beside what is there of it."""
    from mergekit_lr.checkpoint.hub import snapshot

    place = ModelReference.parse(checkpoint.reference).model
    snapshot(Place(place.path, checkpoint.revision), ("*.py",), None, "")


def modules_of(code: Sequence[CodeFile]) -> frozenset[str]:
    """Names under which the files are imported."""
    return frozenset(c.name.removesuffix(".py") for c in code)


def told_of(code: Sequence[CodeFile], reference: str) -> list[str]:
    """What whoever asked for code must know, as warnings."""
    if not code:
        return [f"{reference}: there are no Python files to carry over"]
    models = " and ".join(dict.fromkeys(c.model for c in code))
    return [
        f"{models}: code is carried over, unread ({', '.join(c.name for c in code)}); whoever loads the output with "
        "trust_remote_code runs it"
    ]


def refuse_kind(kind: str) -> None:
    """Raise a UsageError if the output is no model."""
    if kind != "model":
        raise UsageError(
            f"code is not carried over into {'an adapter' if kind == 'adapter' else 'a bundle'}",
            why="only a model's folder holds what loads it",
            fix="leave out --copy-code",
        )


def refuse_taken(code: Sequence[CodeFile], written: Mapping[str, bytes]) -> None:
    """Raise a UsageError if a method writes a file of the same name."""
    taken = sorted({c.name for c in code} & written.keys())
    if taken:
        raise UsageError(
            f"{taken[0]!r} is written by the method itself", why="the model has a file of that name",
            fix="leave out --copy-code",
        )  # fmt: skip


def code_section(code: Sequence[CodeFile]) -> str:
    """What the card says of it."""
    if not code:
        return ""
    lines = [f"* `{c.name}`, sha256 `{c.sha256}`" for c in code]
    text = (
        "These Python files came with an input model. They were copied and neither read nor run. Loading this model "
        "with `trust_remote_code=True` runs them: look at them first."
    )
    return "\n".join(["", "## Code", "", text, "", *lines, ""])
