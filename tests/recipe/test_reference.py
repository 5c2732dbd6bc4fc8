"""Model references: parts, round trip, and local paths with the separators in their names."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lr.checkpoint.reference import ModelReference, Place
from mergekit_lr.errors import RecipeError


def nothing_exists(path: str) -> bool:
    return False


def parse(text: str, *existing: str) -> tuple[str, str | None, str | None, str | None]:
    r = ModelReference.parse(text, exists=lambda p: p in existing)
    assert str(r) == text
    adapter = r.adapter or Place("")
    return r.path, r.revision, adapter.path or None, adapter.revision


@pytest.mark.parametrize(
    ("text", "existing", "expected"),
    [
        ("./model", (), ("./model", None, None, None)),
        ("org/name", (), ("org/name", None, None, None)),
        ("org/name@v1.0", (), ("org/name", "v1.0", None, None)),
        ("org/name@refs/pr/3", (), ("org/name", "refs/pr/3", None, None)),
        ("org/name+./lora", (), ("org/name", None, "./lora", None)),
        ("org/name@v1+org/lora@main", (), ("org/name", "v1", "org/lora", "main")),
        ("a.safetensors", (), ("a.safetensors", None, None, None)),
        ("/data/my model", (), ("/data/my model", None, None, None)),
        ("./c++/model", ("./c++/model",), ("./c++/model", None, None, None)),
        ("./a@b", ("./a@b",), ("./a@b", None, None, None)),
        ("./c++/model+./lora", ("./c++/model",), ("./c++/model", None, "./lora", None)),
        ("./a@b+./lora@x", ("./a@b", "./lora@x"), ("./a@b", None, "./lora@x", None)),
    ],
)
def test_parts(text: str, existing: tuple[str, ...], expected: tuple[str | None, ...]) -> None:
    assert parse(text, *existing) == expected


@pytest.mark.parametrize(
    "text", ["", "  ", "+", "a+", "+a", "@", "a@", "@a", "a@b@c", "a+b+c", "a@+b", "a+b@", "a\nb", "a\0", "x" * 5000]
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        ModelReference.parse(text, nothing_exists)
    assert "PATH_OR_HUB_ID[@REVISION]" in str(caught.value)
    assert len(str(caught.value)) < 250


def test_an_existing_folder_is_found_on_disk(tmp_path: Path) -> None:
    folder = tmp_path / "a@b+c"
    folder.mkdir()
    assert ModelReference.parse(str(folder)) == ModelReference(Place(str(folder)))


@pytest.mark.parametrize(
    ("path", "hub"),
    [
        ("org/name", True),
        ("gpt2", True),
        ("org/name-1.5_b", True),
        ("./org/name", False),
        ("/org/name", False),
        ("a/b/c", False),
        ("~/a", False),
        ("ünï/x", False),
    ],
)
def test_what_is_written_like_a_hub_id(path: str, hub: bool) -> None:
    assert Place(path).is_hub_id is hub


part = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=6)


@given(part, st.none() | part, st.none() | st.tuples(part, st.none() | part))
def test_round_trip(path: str, revision: str | None, adapter: tuple[str, str | None] | None) -> None:
    built = ModelReference(Place(path, revision), Place(*adapter) if adapter else None)
    assert ModelReference.parse(str(built), nothing_exists) == built
