"""Folders that another library is let loose on: what would lead it elsewhere is refused first."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergekit_lr.checkpoint import foreign_code
from mergekit_lr.checkpoint.foreign_code import MAX_DEPTH, check_loadable, references, refuse_kernels, without_code
from mergekit_lr.errors import CheckpointError

Folder = Callable[..., Path]


def test_links_to_nothing_and_folders_are_let_be(make_folder: Folder) -> None:
    folder = make_folder(config={"auto_map": {"AutoModel": "x.Y"}})
    (folder / "gone").symlink_to(folder / "nothing")
    (folder / "images").mkdir()
    check_loadable(folder)


@pytest.mark.parametrize(
    ("put", "what", "rest"),
    [
        (lambda f: os.mkfifo(f / "tokenizer.model"), "'tokenizer.model' is not a regular file", "remove it from the"),
        (lambda f: (f / "tokenizer.json").write_bytes(b" " * 101), "'tokenizer.json' is too large", "over 100 bytes"),
        (lambda f: (f / "notes.txt").write_bytes(b" " * 101), "'notes.txt' is too large", "over 100 bytes"),
    ],
    ids=["a pipe", "a tokenizer", "a text"],
)
def test_what_a_loader_would_wait_for_or_read_whole_is_refused(
    make_folder: Folder, monkeypatch: pytest.MonkeyPatch, put: Callable[[Path], Any], what: str, rest: str
) -> None:
    monkeypatch.setattr(foreign_code, "MOST", 100)
    folder = make_folder()
    (folder / "image.png").write_bytes(b" " * 101)  # nobody reads it whole
    check_loadable(folder)
    put(folder)
    with pytest.raises(CheckpointError) as caught:
        check_loadable(folder)
    assert caught.value.what == what and rest in str(caught.value) and str(folder) in str(caught.value)


def nested(depth: int) -> dict[str, Any]:
    """Code named ``depth`` objects and as many lists below the top."""
    content: dict[str, Any] = {"auto_map": {"AutoModel": "repo--x.Y"}, "kept": 1}
    for _ in range(depth):
        content = {"inner": [content], "attn_implementation": "sdpa"}
    return content


def test_code_is_found_and_removed_as_deep_as_a_config_goes() -> None:
    depth = MAX_DEPTH // 2
    left, found = without_code(nested(depth))
    assert len(found) == 1 and found[0].endswith(".0.auto_map")
    assert "auto_map" not in json.dumps(left) and json.dumps(left).count("sdpa") == depth
    assert without_code(nested(2 * MAX_DEPTH)) == (nested(2 * MAX_DEPTH), [])  # no loader looks there, nor do we


def test_dots_in_a_key_hide_nothing() -> None:
    content = {"." * 2 * MAX_DEPTH: {"_attn_implementation_internal": "org/kernels"}}
    assert len(list(references(content))) == 1
    with pytest.raises(CheckpointError, match="names code of a repository"):
        refuse_kernels(content, "here")
