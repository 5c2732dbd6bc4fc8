"""What a token means, whatever alphabet its tokenizer spells it in: ``Ġthe``, ``▁the`` and ``the`` are `` the``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from mergekit_lr.tokenizer.vocabulary import NAMED, Vocabulary

Key: TypeAlias = bytes | str | int
"""Bytes of text; the name of an added token; the number of a byte-fallback token."""

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
WORD = "▁"


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes with: printable Latin-1 as itself, the rest from 256 on."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in itself]
    return {chr(b): b for b in itself} | {chr(256 + i): b for i, b in enumerate(rest)}


BYTES = _byte_alphabet()


def _holds(node: Any, kind: str) -> bool:
    """Whether a part of tokenizer.json, or one inside it, has the type ``kind``."""
    if isinstance(node, Mapping):
        return node.get("type") == kind or any(_holds(v, kind) for v in node.values())
    return isinstance(node, list) and any(_holds(v, kind) for v in node)


def meanings(vocabulary: Vocabulary) -> dict[str, Key]:
    """The `Key` of every token."""
    document = vocabulary.document or {}
    model = document.get("model") or {}
    continues = model.get("continuing_subword_prefix") if model.get("type") == "WordPiece" else None
    parts = {k: document.get(k) for k in ("pre_tokenizer", "decoder")}
    byte_level = _holds(parts, "ByteLevel") or (not document and "Ġthe" in vocabulary.ids)

    def key(token: str) -> Key:
        if token in vocabulary.added:
            return token
        if byte_level:
            return bytes(BYTES[c] for c in token) if all(c in BYTES for c in token) else token
        if continues:
            return token.removeprefix(continues).encode() if token.startswith(continues) else f" {token}".encode()
        number = _BYTE.fullmatch(token)
        return int(number[1], 16) if number else token.replace(WORD, " ").encode()

    return {token: key(token) for token in vocabulary.ids}


@dataclass(frozen=True)
class Matches:
    """Donor id -> id of the model. ``exact``: the same token; ``loose``: a byte or a prefix of it."""

    exact: Mapping[int, int]
    loose: Mapping[int, int]
    lacking: Mapping[str, Key]


def match(
    donor: Vocabulary, rows: int, model: Vocabulary, own_rows: int, *, byte: bool = False, prefix: bool = False
) -> Matches:
    """Which of the model's tokens each of the donor's is; tokens without a row (id from ``rows`` on) take no part.

    A token with a name (`NAMED`: begin, end, padding, ...) is the model's token of that name; others are the same where
    they mean the same. With ``byte``, a letter of one byte may be the byte-fallback token of it, and the reverse; with
    ``prefix``, a token may be the longest one that it begins with.
    """
    theirs = {k: model.ids[t] for t, k in reversed(list(meanings(model).items())) if model.ids[t] < own_rows}
    roles = {name: model.ids[t] for name, t in model.named.items() if model.ids.get(t, own_rows) < own_rows}
    named: dict[str, int] = {}
    for name in reversed(NAMED):
        if name in roles and name in donor.named:
            named[donor.named[name]] = roles[name]
    exact: dict[int, int] = {}
    loose: dict[int, int] = {}
    lacking: dict[str, Key] = {}
    for token, key in meanings(donor).items():
        i = donor.ids[token]
        if i >= rows:
            continue
        found = named.get(token, theirs.get(key))
        if found is None and isinstance(key, str):
            found = theirs.get(key.encode())
        if found is not None:
            exact[i] = found
        elif (near := _near(key, theirs, byte, prefix)) is not None:
            loose[i] = near
        else:
            lacking[token] = key
    return Matches(exact, loose, lacking)


def _near(key: Key, theirs: Mapping[Key, int], byte: bool, prefix: bool) -> int | None:
    if byte:
        other: Key | None = key[0] if isinstance(key, bytes) and len(key) == 1 else None
        other = bytes([key]) if isinstance(key, int) else other
        if other is not None and other in theirs:
            return theirs[other]
    if prefix and isinstance(key, bytes):
        for end in range(len(key) - 1, 0, -1):
            if not key[:end].strip():
                break
            if key[:end] in theirs:
                return theirs[key[:end]]
    return None


def text_of(key: Key) -> str | None:
    """The text that a token stands for; None where it is part of a character."""
    if isinstance(key, int):
        return None
    try:
        return key.decode() if isinstance(key, bytes) else key
    except UnicodeDecodeError:
        return None


def piece_weights(count: int, how: str, head: bool) -> list[float]:
    """Weights of the ``count`` pieces that a token is cut into, for its row of the embeddings or of the head."""
    if how == "first_last":
        place = 0 if head else count - 1
        return [1.0 if i == place else 0.0 for i in range(count)]
    if how == "sum":
        return [1.0] * count
    weights = [1.0] * count if how == "mean" else [float(i + 1 if head else count - i) for i in range(count)]
    return [w / sum(weights) for w in weights]


def cut_tokens(model: Vocabulary, where: str, tokens: list[Key]) -> list[list[int]]:
    """Each token as ids of the model's tokenizer, without special tokens; parts of characters byte by byte.

    Raises:
        CheckpointError: the tokenizer cannot be run here.
    """
    from mergekit_lr.errors import CheckpointError

    if model.document is None:
        raise CheckpointError(
            "its tokenizer has no tokenizer.json, so nothing can be cut by it",
            where=where,
            fix="use another approximation_method, or write one with `save_pretrained` of its tokenizer",
        )
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(model.document))
    texts = [text_of(t) for t in tokens]
    encoded = tokenizer.encode_batch([t or "" for t in texts], add_special_tokens=False)
    ids = {k: model.ids[t] for t, k in meanings(model).items()}
    return [
        list(e.ids) if text is not None else _bytes_of(token, ids)
        for token, text, e in zip(tokens, texts, encoded, strict=True)
    ]


def _bytes_of(token: Key, ids: Mapping[Key, int]) -> list[int]:
    """A token that is no text, as the model's tokens of single bytes."""
    numbers = [token] if isinstance(token, int) else list(token) if isinstance(token, bytes) else []
    found = (ids.get(n, ids.get(bytes([n]))) for n in numbers)
    return [i for i in found if i is not None]
