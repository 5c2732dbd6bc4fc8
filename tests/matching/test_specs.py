"""Specs that do not fit are errors with a name; specs that a user writes are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergekit_lr.arch.families import family_names
from mergekit_lr.arch.spec import spec_for
from mergekit_lr.arch.symmetry import Draft
from mergekit_lr.errors import CheckpointError, RecipeError
from mergekit_lr.matching.member import apply_all, identity

SPEC = """
family: mine
sizes: {heads: 2, dim: 3}
groups:
  "h.{l}": {size: heads}
  "v.{l}": {size: dim, parent: "h.{l}", signed: true}
tensors:
  "b.{l}.v": ["h.{l} * v.{l}", res]
  "b.{l}.o": [res, "h.{l} * v.{l}"]
  "b.{l}.packed": ["h.{l} * 3 | h.{l} * 3", ~]
"""
SHAPES = {"b.0.v": (6, 4), "b.0.o": (4, 6), "b.0.packed": (12, 2)}


def written(folder: Path, text: str) -> str:
    (folder / "spec.yml").write_text(text)
    return str(folder / "spec.yml")


def test_a_written_spec_moves_what_it_says(tmp_path: Path) -> None:
    spec = spec_for(written(tmp_path, SPEC), SHAPES, None, "mine")
    assert {g: (s.size, s.parent, s.signed) for g, s in spec.groups.items()} == {
        "h.0": (2, None, False),
        "v.0": (3, "h.0", True),
        "res": (4, None, False),
    }
    tensors = {n: torch.arange(float(s[0] * s[1])).reshape(s) for n, s in SHAPES.items()}
    member = identity(spec).with_group("h.0", torch.tensor([1, 0]))
    member = member.with_group("v.0", torch.tensor([[2, 0, 1], [0, 1, 2]]), torch.tensor([[1, -1, 1], [1, 1, 1]]))
    moved = apply_all(spec, member, tensors)
    # place 0 takes head 1, whose dimensions come as 2, 0 (flipped), 1; place 1 takes head 0 as it is
    assert moved["b.0.v"][:, 0].tolist() == [20.0, -12.0, 16.0, 0.0, 4.0, 8.0]
    assert moved["b.0.o"][0].tolist() == [5.0, -3.0, 4.0, 0.0, 1.0, 2.0]
    assert moved["b.0.packed"][:, 0].tolist() == [6.0, 8.0, 10.0, 0.0, 2.0, 4.0, 18.0, 20.0, 22.0, 12.0, 14.0, 16.0]


@pytest.mark.parametrize(
    ("text", "shapes", "words"),
    [
        (SPEC, SHAPES | {"c": (3,)}, "does not cover the tensor c"),
        (SPEC, SHAPES | {"b.0.v": (7, 4)}, "does not fit"),
        (SPEC, SHAPES | {"b.0.o": (5, 6)}, "does not fit"),
        (SPEC.replace("sizes: {heads: 2, dim: 3}", ""), SHAPES, "needs the size 'heads'"),
        (SPEC.replace('["h.{l} * v.{l}", res]', "[res]"), SHAPES, "names 1 axes of a tensor that has 2"),
        (SPEC.replace('"h.{l} * v.{l}", res]', '"v.{l} * h.{l}", res]'), SHAPES, "without its parent"),
        (SPEC.replace('["h.{l} * v.{l}", res]', '["h.{l} ** v", res]'), SHAPES, "cannot read"),
    ],
)
def test_specs_that_do_not_fit_are_errors(
    tmp_path: Path, text: str, shapes: dict[str, tuple[int, ...]], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words.replace("*", r"\*")):
        spec_for(written(tmp_path, text), shapes, None, "mine")


@pytest.mark.parametrize(
    ("text", "words"), [("tensors: 3", "no permutation spec"), (SPEC + "\nfamly: x", "famly"), ("[", "cannot read")]
)
def test_files_that_are_no_specs_are_errors(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        spec_for(written(tmp_path, text), SHAPES, None, "mine")


def test_an_unknown_family_is_an_error_that_lists_them() -> None:
    with pytest.raises(RecipeError, match="gpt2, llama, moe"):
        spec_for("lama", SHAPES, None, "mine")
    assert "llama" in family_names()


@pytest.mark.parametrize(
    "shapes",
    [
        {
            "decoder.0.weight": (9, 4),
            "decoder.1.weight": (6, 9),
            "encoder.0.weight": (9, 6),
            "encoder.1.weight": (4, 9),
        },
        {"a.weight": (4, 3), "b.weight": (5, 6)},
        {"a.0.weight": (4, 3), "a.1.weight": (3, 4), "gate": (4,)},
        {"a.0.weight": (4, 3), "n.weight": (7,), "a.1.weight": (3, 4)},
    ],
    ids=["either order", "no chain", "odd name", "stray norm"],
)
def test_what_is_no_plain_chain_is_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(CheckpointError, match="cannot be inferred"):
        spec_for("chain", shapes, None, "odd")


def test_parents_may_not_be_signed_or_nested() -> None:
    draft = Draft("odd", declared={"a": {"signed": True}, "b": {"parent": "a"}}, sizes={"a": 2, "b": 3})
    draft.add(["x"], (6,), ["a * b"])
    with pytest.raises(CheckpointError, match="parent is signed"):
        draft.finish()
