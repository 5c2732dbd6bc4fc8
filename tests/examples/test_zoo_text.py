"""Where training text comes from, and that none of it is held-out text."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
from zoo import sources, text
from zoo.roff import plain_text
from zoo.sources import Document, collect

from mergekit_lr.errors import ResourceError, VerificationError


def test_roff_becomes_the_words_a_reader_sees() -> None:
    page = r""".\" comment
.TH GREP 1
.de XX
hidden
..
.SH "NAME"
grep \- print \fIlines\fP that match
.PP
.BR grep (1)
is f\(:ur \(lqall\(rq, \s-1RE\s0 too\&.
.TS
l l.
cell
.TE
.TP
.B \-v
Invert.
"""
    assert plain_text(page) == (
        'NAME\ngrep - print lines that match\n\ngrep(1)\nis für "all", RE too.\n\n-v\nInvert.\n'
    )
    assert plain_text(".Dd March 1\n.Nm mdoc\n") == ""


@pytest.mark.parametrize("order", ["<", ">"])
def test_catalogue_reads_both_byte_orders(tmp_path: Path, order: str) -> None:
    """A .mo file built by the format's definition: magic, revision, counts, two tables, strings."""
    messages = ["Header: not a message at all", "konnte Datei »%s« nicht öffnen", "kurz"]
    raw = [m.encode() for m in messages]
    count, at = len(raw), 28 + 16 * len(raw)
    table, blob = b"", b""
    for item in raw:
        table += struct.pack(f"{order}II", len(item), at + len(blob))
        blob += item + b"\0"
    path = tmp_path / "x.mo"
    path.write_bytes(struct.pack(f"{order}7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0) + table * 2 + blob)
    assert sources._catalogue(path) == ["konnte Datei »%s« nicht öffnen"]
    path.write_bytes(b"no catalogue, only bytes")
    assert sources._catalogue(path) == []


def test_collection_is_the_same_twice_and_in_name_digest_order() -> None:
    first = collect("c")
    assert first == collect("c")
    assert [d.digest for d in first] == sorted(d.digest for d in first)
    assert len({d.text for d in first}) == len(first)


def test_missing_text_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MAN", tmp_path)
    monkeypatch.setattr(sources, "_LOCALE", tmp_path)
    with pytest.raises(ResourceError, match=r"only 0 bytes of german text found.*apt-get install"):
        collect("german")


def test_manual_pages_skip_links_and_unfree_pages(tmp_path: Path) -> None:
    folder = tmp_path / "man1"
    folder.mkdir()
    for name in ("a.1", "gcloud_x.1"):
        (folder / f"{name}.gz").write_bytes(gzip.compress(b".SH NAME\ntext\n"))
    (folder / "b.1.gz").symlink_to("a.1.gz")
    assert [d.name for d in sources._manual_pages(tmp_path, "1-8")] == ["man1/a.1"]


def test_passages_of_three_lines_are_cut_and_mostly_shared_files_dropped() -> None:
    shared = [f"a held-out line number {i} with some words in it" for i in range(3)]
    forbidden = frozenset(t for _, t in text._passages(shared))
    assert len(forbidden) == 1
    own = [f"own line {i} that nobody else has written yet" for i in range(12)]
    mixed = "\n".join([*own[:6], *("    " + line for line in shared), *own[6:]]) + "\n"
    kept = text.without_passages(mixed, forbidden)
    assert [line for line in kept.splitlines() if line] == own
    assert text.without_passages("\n".join([*own[:4], *shared]), forbidden) == ""
    assert text.without_passages("\n".join(own), forbidden) == "\n".join(own)


def test_heldout_choice_takes_free_documents_up_to_the_size() -> None:
    documents = [Document(f"d{i}", f"line {i}\n" * 2000, "PSF-2.0" if i % 2 else "") for i in range(40)]
    chosen = text.choose_heldout(documents)
    assert all(d.licence for d in chosen)
    assert max(len(d.text) for d in chosen) <= 10_000
    assert text.HELDOUT_BYTES - 400 <= sum(len(d.text) for d in chosen) <= text.HELDOUT_BYTES
    assert chosen == text.choose_heldout(list(reversed(documents)))


def test_training_text_shares_no_long_run_of_characters_with_the_heldout_slice() -> None:
    """Independent of how passages are found: every 397th window of 240 characters, indentation aside."""

    def flat(raw: str) -> str:
        return "\n".join(line.strip() for line in raw.splitlines() if line.strip())

    held = flat(text.heldout_text("python"))
    training = "\0".join(flat(document) for document in text.training_documents("python"))
    windows = [held[i : i + 240] for i in range(0, len(held) - 240, 397)]
    assert len(windows) > 150
    assert not [w for w in windows if w in training]


def test_changed_heldout_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "manifest.json").write_bytes((text.HELDOUT / "manifest.json").read_bytes())
    (tmp_path / "c.txt").write_text("something else")
    monkeypatch.setattr(text, "HELDOUT", tmp_path)
    with pytest.raises(VerificationError, match="not the recorded one"):
        text.heldout_text("c")
