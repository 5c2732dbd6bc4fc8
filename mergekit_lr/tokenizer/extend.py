"""The output's vocabulary: one model's tokens, the others' added behind them, those without an embedding left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_lr.errors import CheckpointError
from mergekit_lr.tokenizer.rows import Member
from mergekit_lr.tokenizer.vocabulary import Vocabulary

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
SHOWN = 5


@dataclass(frozen=True)
class Extension:
    """``ids``: the output's tokens. ``added``: entries for ``added_tokens`` that the source did not have, by id.

    ``removed``: tokens of the source for which it has no row of embeddings.
    """

    ids: Mapping[str, int]
    added: tuple[Mapping[str, Any], ...] = ()
    removed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def extend(
    vocabulary: Vocabulary, rows: int | None, union: Sequence[Member], named: Sequence[str], where: str
) -> Extension:
    """The source's ``vocabulary`` with ``rows`` of embeddings, joined by the tokens of ``union`` and ``named`` ones.

    New tokens are numbered behind the source's: first the ordinary tokens of each model in order of their ids, then
    the models' own added tokens with the settings that the first of them gives, then the named ones.

    Raises:
        CheckpointError: no free ids follow the source's.
    """
    removed = tuple(t for t, i in vocabulary.ids.items() if rows is not None and i >= rows)
    ids = {t: i for t, i in vocabulary.ids.items() if rows is None or i < rows}
    if not ids:
        raise CheckpointError("none of its tokens has an embedding", where=where, fix="use another tokenizer")
    entries: dict[str, dict[str, Any]] = {}
    differ: list[str] = []
    for member in union:
        for token in sorted(_embedded(member) - member.vocabulary.added.keys(), key=member.vocabulary.ids.__getitem__):
            if token not in ids:
                entries.setdefault(token, _entry(token))
    for member in union:
        for token, entry in sorted(member.vocabulary.added.items(), key=lambda e: e[1]["id"]):
            if entry["id"] >= member.rows:
                continue
            known = vocabulary.added.get(token) if token in ids else entries.get(token)
            if known is not None and token not in differ and _flags(known) != _flags(entry):
                if token in entries and token not in _added_of(union, member):
                    entries[token] = _entry(token, entry)  # an ordinary token of an earlier model, added by this one
                else:
                    differ.append(token)
            elif token not in ids:
                entries.setdefault(token, _entry(token, entry))
    for token in named:
        if token not in ids:
            entries.setdefault(token, _entry(token))
    added = _numbered(vocabulary, ids, removed, entries, where)
    ids |= {e["content"]: e["id"] for e in added}
    warnings = []
    if differ:
        shown = ", ".join(repr(t) for t in differ[:SHOWN])
        warnings.append(f"added tokens with different settings in different models, the first is used: {shown}")
    if removed:
        shown = ", ".join(repr(t) for t in removed[:SHOWN])
        more = f" and {len(removed) - SHOWN} more" if len(removed) > SHOWN else ""
        warnings.append(f"{where}: its tokenizer has tokens without an embedding, which are left out: {shown}{more}")
    return Extension(ids, tuple(added), removed, tuple(warnings))


def _embedded(member: Member) -> set[str]:
    return {t for t, i in member.vocabulary.ids.items() if i < member.rows}


def _added_of(union: Sequence[Member], before: Member) -> set[str]:
    """Tokens that models before this one have as added ones."""
    found: set[str] = set()
    for member in union:
        if member is before:
            break
        found |= {t for t, e in member.vocabulary.added.items() if e["id"] < member.rows}
    return found


def _entry(token: str, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An entry of ``added_tokens``; a plain one is matched in normalised text and is not special."""
    flags = _flags(like) if like is not None else (False, False, False, True, False)
    return {"id": -1, "content": token, **dict(zip(FLAGS, flags, strict=True))}


def _flags(entry: Mapping[str, Any]) -> tuple[bool, ...]:
    special = bool(entry.get("special", False))
    defaults = {"normalized": not special}
    return tuple(bool(entry.get(f, defaults.get(f, False))) for f in FLAGS)


def _numbered(
    vocabulary: Vocabulary,
    ids: Mapping[str, int],
    removed: Sequence[str],
    entries: Mapping[str, dict[str, Any]],
    where: str,
) -> list[dict[str, Any]]:
    """New entries with the ids that a tokenizer library gives them when it loads the file."""
    ordinary = len(vocabulary.core - set(removed))
    following = max([ordinary, *(vocabulary.ids[t] + 1 for t in vocabulary.added if t in ids)])
    taken = set(ids.values())
    numbered = []
    for number, entry in enumerate(entries.values(), following):
        if number in taken:
            raise CheckpointError(
                f"its tokenizer leaves ids unused, and has {number} in use behind them, so no token can be added",
                where=where,
                fix="use `tokenizer_source: base`, or the tokenizer of another model",
            )
        numbered.append({**entry, "id": number})
    return numbered
