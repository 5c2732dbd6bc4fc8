"""Held-out slices that stay fixed, training text that shares no passage with them, and both as tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergekit_lr.errors import VerificationError
from zoo import HELDOUT, WORK
from zoo.sources import DOMAINS, Document, collect
from zoo.tokenizer import END_OF_TEXT, digest, encode, folder

HELDOUT_BYTES = 80_000
_DOCUMENT_BYTES = 10_000  # a slice of one document, so that no single page is the whole domain
_WINDOW = 3  # consecutive non-blank lines ...
_WINDOW_CHARACTERS = 90  # ... that together are at least this long count as a shared passage

Tokens = NDArray[np.uint16]


def _order(document: Document) -> str:
    return hashlib.sha256(f"held-out {document.name}".encode()).hexdigest()


def _head(text: str, limit: int) -> str:
    """The first lines of ``text`` that fit into ``limit`` bytes."""
    kept: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        size += len(line.encode())
        if size > limit:
            break
        kept.append(line)
    return "".join(kept)


def choose_heldout(documents: Iterable[Document]) -> list[Document]:
    """About 80 kB of freely licensed documents in the order of a salted digest, each cut to 10 kB."""
    chosen: list[Document] = []
    total = 0
    for document in sorted((d for d in documents if d.licence), key=_order):
        text = _head(document.text, min(_DOCUMENT_BYTES, HELDOUT_BYTES - total))
        if len(text) < 400:
            continue
        chosen.append(Document(document.name, text, document.licence))
        total += len(text.encode())
        if total >= HELDOUT_BYTES - 400:
            break
    return chosen


def write_heldout() -> None:
    """Write ``text/heldout/<domain>.txt`` and the manifest with digests, sources and licences."""
    HELDOUT.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {}
    for domain in DOMAINS:
        chosen = choose_heldout(collect(domain))
        raw = "\n".join(document.text for document in chosen).encode()
        (HELDOUT / f"{domain}.txt").write_bytes(raw)
        manifest[domain] = {
            "file": f"{domain}.txt",
            "bytes": len(raw),
            "sha256": hashlib.sha256(raw).hexdigest(),
            "documents": [{"name": d.name, "licence": d.licence} for d in chosen],
        }
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    (HELDOUT / "manifest.json").write_text(text, encoding="utf-8")


def read_manifest() -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((HELDOUT / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def heldout_text(domain: str) -> str:
    """The committed slice, checked against its digest.

    Raises:
        VerificationError: the file is not the one that the manifest names.
    """
    path = HELDOUT / f"{domain}.txt"
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != read_manifest()[domain]["sha256"]:
        raise VerificationError(
            "the held-out text is not the recorded one",
            where=str(path),
            why="its sha256 differs from manifest.json",
            fix="restore the committed file: losses on other text cannot be compared",
        )
    return raw.decode("utf-8")


def _passages(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Each run of three non-blank lines: the index of its first line and its text without indentation."""
    filled = [(i, line.strip()) for i, line in enumerate(lines) if line.strip()]
    for start in range(len(filled) - _WINDOW + 1):
        text = "\n".join(line for _, line in filled[start : start + _WINDOW])
        if len(text) >= _WINDOW_CHARACTERS:
            yield start, text


def heldout_passages() -> frozenset[str]:
    """Every passage of every held-out slice."""
    return frozenset(t for domain in DOMAINS for _, t in _passages(heldout_text(domain).splitlines()))


def without_passages(text: str, forbidden: frozenset[str]) -> str:
    """``text`` without the lines of any passage in ``forbidden``; empty if over a third of it goes.

    Works by text and not by file name, so it also catches another version of a held-out file, and notices
    that many files share.
    """
    lines = text.splitlines(keepends=True)
    filled = [i for i, line in enumerate(lines) if line.strip()]
    dropped = {
        filled[start + k] for start, t in _passages(lines) if t in forbidden for k in range(_WINDOW)
    }
    if 3 * len(dropped) > len(filled):
        return ""
    # Cutting brings lines together that were apart; the rare text where that makes a passage goes too.
    kept = "".join("\n" if i in dropped else line for i, line in enumerate(lines))
    return kept if not any(t in forbidden for _, t in _passages(kept.splitlines())) else ""


def training_documents(domain: str) -> list[str]:
    """Training text of ``domain``: no held-out document, no passage of one, order fixed by names."""
    held = {entry["name"] for entry in read_manifest()[domain]["documents"]}
    forbidden = heldout_passages()
    cleaned = (without_passages(d.text, forbidden) for d in collect(domain) if d.name not in held)
    return [text for text in cleaned if len(text) >= 200]


def _token_file(domain: str) -> Path:
    return WORK / "text" / f"{domain}.npy"


def write_tokens() -> None:
    """Tokenise the training text of every domain once; documents are parted by the end-of-text token."""
    (WORK / "text").mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"tokenizer": digest(folder())}
    for domain in DOMAINS:
        documents = training_documents(domain)
        ids: list[int] = []
        for row in encode(documents):
            ids.extend((*row, END_OF_TEXT))
        np.save(_token_file(domain), np.asarray(ids, dtype=np.uint16))
        size = sum(len(text.encode()) for text in documents)
        summary[domain] = {"documents": len(documents), "bytes": size, "tokens": len(ids)}
    text = json.dumps(summary, indent=1) + "\n"
    (WORK / "text" / "summary.json").write_text(text, encoding="utf-8")


def training_tokens(domain: str) -> Tokens:
    """The training tokens of ``domain``.

    Raises:
        VerificationError: another tokenizer made them than the one in use now.
    """
    if read_summary()["tokenizer"] != digest(folder()):
        raise VerificationError(
            "the training tokens are of another tokenizer", where=str(WORK / "text"), why="its sha256 differs",
            fix="delete the folder and build the part text again",
        )  # fmt: skip
    tokens: Tokens = np.load(_token_file(domain))
    return tokens


def read_summary() -> dict[str, Any]:
    """Documents, bytes and tokens of each domain, and the digest of the tokenizer that made the tokens."""
    summary: dict[str, Any] = json.loads((WORK / "text" / "summary.json").read_text(encoding="utf-8"))
    return summary


def heldout_tokens(domain: str) -> Tokens:
    return np.asarray(encode([heldout_text(domain)])[0], dtype=np.uint16)
