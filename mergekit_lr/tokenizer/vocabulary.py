"""What ids a model's tokenizer gives to which strings, read from its files as data; no code of a model ever runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint.foreign_code import check_loadable
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.small_files import inside, read_json
from mergekit_lr.errors import CheckpointError

MOST = 1 << 28
"""Largest tokenizer.json that is read: those of 256 K tokens have some 35 MB."""

SLOW_FILES = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tiktoken.model",
    "added_tokens.json",
)
"""Files of a tokenizer without a tokenizer.json: transformers reads them."""

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens by the names that transformers gives them; each has an ``..._id`` in config.json."""


@dataclass(frozen=True)
class Vocabulary:
    """Token string -> id, added tokens included.

    ``core``: the tokens that the tokenizer's model itself knows; some of them may be among the added ones too.
    ``added``: entries of ``added_tokens`` as tokenizer.json writes them, by their string. ``document``: the whole
    tokenizer.json, where a new one can be made from it. ``named``: `NAMED` special tokens that the files name.
    """

    ids: Mapping[str, int]
    core: frozenset[str]
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    document: Mapping[str, Any] | None = field(default=None, repr=False)
    named: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def end(self) -> int:
        """One more than the highest id."""
        return max(self.ids.values(), default=-1) + 1


def tokenizer_folder(checkpoint: Checkpoint) -> Path | None:
    """Where a model's tokenizer is: with its adapter where that brings embeddings of its own, else with the model."""
    own = getattr(checkpoint, "adapter_folder", None)
    if own is not None and (own / "tokenizer.json").is_file() and _replaces_rows(checkpoint):
        return Path(own)
    return checkpoint.folder


def _replaces_rows(checkpoint: Checkpoint) -> bool:
    from mergekit_lr.checkpoint.lora import AdaptedCheckpoint
    from mergekit_lr.tokenizer.axes import vocabulary_tensors

    assert isinstance(checkpoint, AdaptedCheckpoint)
    replaced = [n for n, u in checkpoint.updates.items() if u.replaced is not None]
    return any(n in vocabulary_tensors(checkpoint) for n in replaced)


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary | None:
    """The vocabulary of a model; None where it has no tokenizer files.

    tokenizer.json is read as the data that it is. Other formats (SentencePiece, vocab.json, vocab.txt, tiktoken) are
    read by transformers, without remote code.

    Raises:
        CheckpointError: the files are damaged, or transformers cannot read them without running code of the model.
    """
    folder = tokenizer_folder(checkpoint)
    if folder is None:
        return None
    return read_folder(folder)


def read_folder(folder: Path) -> Vocabulary | None:
    """As `read_vocabulary`, of a folder."""
    if (folder / "tokenizer.json").is_file():
        path = inside(folder, "tokenizer.json")
        found = _from_document(read_json(path, most=MOST), path, _named(folder))
        return replace(found, warnings=_contradictions(folder, found))
    if any((folder / name).is_file() for name in SLOW_FILES):
        return _through_transformers(folder)
    return None


def _from_document(content: Any, path: Path, named: Mapping[str, str]) -> Vocabulary:
    model = content.get("model") if isinstance(content, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    added = content.get("added_tokens") or [] if isinstance(content, dict) else []
    try:
        if isinstance(vocab, list):  # Unigram: [[token, score], ...]
            ids = {_text(entry[0]): i for i, entry in enumerate(vocab)}
        else:
            ids = {_text(token): _number(i) for token, i in dict(vocab or {}).items()}
        core = frozenset(ids)
        entries = {_text(t["content"]): dict(t) for t in added}
        ids |= {token: _number(entry["id"]) for token, entry in entries.items()}
    except (TypeError, ValueError, KeyError, IndexError) as e:
        why = f"{type(e).__name__}: {str(e)[:200]}"
        raise CheckpointError("is no sound tokenizer.json", where=str(path), why=why, fix="download it again") from e
    if not ids:
        raise CheckpointError("the tokenizer has no tokens", where=str(path), fix="download it again")
    _refuse_shared_ids(ids, path)
    return Vocabulary(ids, core, entries, content, named)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no token")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no id")
    return value


def _refuse_shared_ids(ids: Mapping[str, int], path: Path) -> None:
    seen: dict[int, str] = {}
    for token, i in ids.items():
        if i in seen:
            raise CheckpointError(
                f"the tokens {seen[i]!r} and {token!r} have one id, {i}",
                where=str(path),
                fix="mend tokenizer.json: a row of the embeddings can stand for one token only",
            )
        seen[i] = token


def _named(folder: Path) -> dict[str, str]:
    """Special tokens by name, as tokenizer_config.json has them, else special_tokens_map.json."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        content = read_json(inside(folder, name)) if path.is_file() else {}
        for key in NAMED:
            value = content.get(key) if isinstance(content, dict) else None
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[key] = value
    return found


def _contradictions(folder: Path, found: Vocabulary) -> tuple[str, ...]:
    """Ids that tokenizer_config.json gives to tokens which have another in tokenizer.json: loaders disagree here."""
    path = folder / "tokenizer_config.json"
    content = read_json(inside(folder, path.name)) if path.is_file() else {}
    listed = content.get("added_tokens_decoder") if isinstance(content, dict) else None
    wrong = []
    for number, entry in (listed if isinstance(listed, dict) else {}).items():
        token = entry.get("content") if isinstance(entry, dict) else None
        if isinstance(token, str) and str(found.ids.get(token, number)) != number:
            wrong.append(f"{token!r} ({number}, not {found.ids[token]})")
    if not wrong:
        return ()
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return (f"tokenizer_config.json gives other ids than tokenizer.json, which counts: {', '.join(wrong[:3])}{more}",)


def _through_transformers(folder: Path) -> Vocabulary:
    """A tokenizer in another format: transformers converts it, and gives a tokenizer.json wherever it can."""
    import json

    check_loadable(folder)
    try:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        backend = getattr(loaded, "backend_tokenizer", None)
        if backend is not None:
            return _from_document(json.loads(backend.to_str()), folder, _named(folder))
        ids = {str(token): int(i) for token, i in loaded.get_vocab().items()}
        added = {
            str(t.content): {
                "id": int(i),
                "content": str(t.content),
                "single_word": bool(t.single_word),
                "lstrip": bool(t.lstrip),
                "rstrip": bool(t.rstrip),
                "normalized": bool(t.normalized),
                "special": bool(t.special),
            }
            for i, t in loaded.added_tokens_decoder.items()
        }
    except CheckpointError:
        raise
    except Exception as e:  # whatever transformers and its tokenizer libraries raise for files that they cannot read
        raise CheckpointError(
            "cannot read its tokenizer",
            where=str(folder),
            why=" ".join(str(e).split())[:300],
            fix="add a tokenizer.json to the model; `save_pretrained` of its tokenizer writes one",
        ) from e
    return Vocabulary(ids, frozenset(ids.keys() - added.keys()), added, None, _named(folder))
