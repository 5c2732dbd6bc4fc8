"""The tokenizer's files in an output folder: a model's own, with tokens added or left out, or another template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.small_files import inside, read_json
from mergekit_lr.errors import CheckpointError
from mergekit_lr.tokenizer.align import Tokens
from mergekit_lr.tokenizer.templates import FILE, chosen
from mergekit_lr.tokenizer.vocabulary import NAMED


def with_tokens(files: Mapping[str, bytes], tokens: Tokens) -> tuple[dict[str, bytes], list[str]]:
    """The small files of an output for its vocabulary, and warnings.

    Raises:
        CheckpointError: tokens must be added or left out, and the tokenizer's kind does not allow it.
    """
    out = dict(files)
    warnings: list[str] = []
    if tokens.extension.added or tokens.extension.removed:
        out["tokenizer.json"] = _document(tokens)
        _register(out, tokens)
    generation = _content(out, "generation_config.json")
    if generation is not None and not tokens.renaming.changes_nothing:
        theirs = generation_config(tokens.source) or tokens.renaming.theirs
        generation, warnings = tokens.renaming.apply(generation, "generation_config.json", theirs)
        out["generation_config.json"] = _dumped(generation)
    return out, warnings


def with_template(
    files: Mapping[str, bytes], asked: str, models: Sequence[Checkpoint]
) -> tuple[dict[str, bytes], list[str]]:
    """The small files with the chat template that a recipe asks for: as a file, and in the tokenizer's config."""
    text = chosen(asked, models)
    if text is None:
        return dict(files), ["chat_template: auto finds none, for no model has one"]
    out = {name: data for name, data in files.items() if name != "chat_template.json"}
    out[FILE] = text.encode()
    config = _content(out, "tokenizer_config.json")
    if config is None:
        warning = "the output has a chat template and no tokenizer_config.json, without which few programs look for it"
        return out, [warning]
    out["tokenizer_config.json"] = _dumped({**config, "chat_template": text})
    return out, []


def generation_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """A model's generation_config.json; None where it has none."""
    folder = checkpoint.folder
    if folder is None or not (folder / "generation_config.json").is_file():
        return None
    found = read_json(inside(folder, "generation_config.json"))
    return found if isinstance(found, dict) else None


def _content(files: Mapping[str, bytes], name: str) -> dict[str, Any] | None:
    found = json.loads(files[name]) if name in files else None
    return found if isinstance(found, dict) else None


def _dumped(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _document(tokens: Tokens) -> bytes:
    """tokenizer.json with tokens added and left out."""
    document = tokens.vocabulary.document
    if document is None:
        raise CheckpointError(
            "tokens cannot be added to its tokenizer",
            where=tokens.source.reference,
            why="transformers has no tokenizer.json for this kind",
            fix="use `tokenizer_source: base`, or the tokenizer of another model",
        )
    content = dict(document)
    gone = set(tokens.extension.removed)
    if gone:
        content["model"] = _without(content["model"], gone, tokens.source.reference)
    kept = [t for t in content.get("added_tokens") or [] if t["content"] not in gone]
    content["added_tokens"] = sorted([*kept, *map(dict, tokens.extension.added)], key=lambda t: int(t["id"]))
    return _dumped(content)


def _without(model: Mapping[str, Any], gone: set[str], where: str) -> dict[str, Any]:
    """The model of a tokenizer without some tokens of its vocabulary."""
    vocab = model.get("vocab")
    if isinstance(vocab, list):  # Unigram: a piece's id is its place, so only the last ones can go
        kept = [entry for entry in vocab if entry[0] not in gone]
        if vocab[: len(kept)] != kept:
            why = "they stand between others"
            raise CheckpointError("tokens without an embedding cannot be left out", where=where, why=why)
        return {**model, "vocab": kept}
    found = {**model, "vocab": {t: i for t, i in (vocab or {}).items() if t not in gone}}
    if model.get("merges"):
        found["merges"] = [m for m in model["merges"] if not _pieces(m) & gone]
    return found


def _pieces(merge: Any) -> set[str]:
    """What a merge of a BPE tokenizer joins, and what it makes."""
    parts = merge.split(" ") if isinstance(merge, str) else list(merge)
    return {*parts, "".join(parts)}


def _register(files: dict[str, bytes], tokens: Tokens) -> None:
    """Note added and missing tokens in the files that repeat what tokenizer.json says."""
    gone = set(tokens.extension.removed)
    config = _content(files, "tokenizer_config.json")
    if config is not None:
        known = config.get("added_tokens_decoder")
        if isinstance(known, dict):
            kept = {i: t for i, t in known.items() if not isinstance(t, dict) or t.get("content") not in gone}
            new = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokens.extension.added}
            config["added_tokens_decoder"] = kept | new
        _forget(config, gone)
        files["tokenizer_config.json"] = _dumped(config)
    special = _content(files, "special_tokens_map.json")
    if special is not None:
        _forget(special, gone)
        files["special_tokens_map.json"] = _dumped(special)
    listed = _content(files, "added_tokens.json")
    if listed is not None or ("tokenizer.model" in files and tokens.extension.added):
        before = {t: i for t, i in (listed or {}).items() if t not in gone}
        files["added_tokens.json"] = _dumped(before | {t["content"]: t["id"] for t in tokens.extension.added})


def _forget(content: dict[str, Any], gone: set[str]) -> None:
    """A named token that is left out has no name any more: loaders would add it again, behind the last row."""
    for key in NAMED:
        value = content.get(key)
        if (value.get("content") if isinstance(value, dict) else value) in gone:
            del content[key]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(content.get(key), list):
            content[key] = [t for t in content[key] if (t.get("content") if isinstance(t, dict) else t) not in gone]
