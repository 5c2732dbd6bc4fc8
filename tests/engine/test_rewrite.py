"""Methods that lay out their own output, through the whole engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mergekit_lr import merge, plan
from mergekit_lr.errors import NonFiniteError, RecipeError, ResourceError, UsageError
from mergekit_lr.registry import get_method

from ..killing import killed_everywhere
from . import toy_rewrite
from .toy_rewrite import Halves, registered


@pytest.fixture
def halves(monkeypatch):
    """The toy method, as if it were installed."""
    registered(monkeypatch.setattr)
    assert isinstance(get_method("halves"), Halves)
    return Halves


@pytest.fixture
def model(make, random_tensors):
    shapes = {"a.weight": (6, 8), "b.weight": (400, 512), "norm.weight": (8,)}
    return make("m", random_tensors(3, shapes=shapes))


def recipe(model: Path, **more: object) -> dict[str, object]:
    return {"merge_method": "halves", "models": [{"model": str(model)}], **more}


def check(out: Path, model: Path, load) -> None:
    """Top half times the prepared factor, signs of the whole packed eight to a byte, vectors as they were."""
    source, found = load(model), load(out)
    assert sorted(found) == ["a.signs", "a.top", "b.signs", "b.top", "norm.weight"]
    assert torch.equal(found["norm.weight"], source["norm.weight"])
    for name in "ab":
        w = source[f"{name}.weight"].float()
        assert torch.equal(found[f"{name}.top"], (w[: len(w) // 2] * 3.0).bfloat16())
        bits = [int(w.reshape(-1)[i] > 0) << (i % 8) for i in range(w.numel())]
        packed = torch.tensor([sum(bits[i : i + 8]) for i in range(0, len(bits), 8)], dtype=torch.uint8)
        assert torch.equal(found[f"{name}.signs"], packed)


@pytest.mark.parametrize(("threads", "memory"), [(1, None), (2, None), (2, "3MiB")])
def test_outputs_are_what_the_method_says(halves, model, load, tmp_path, threads, memory):
    out = tmp_path / "out"
    result = merge(recipe(model), out, device="cpu", threads=threads, max_memory=memory, shard_size=100_000)
    check(out, model, load)
    assert result.report["notes"] == {"a": {"elements": 48}, "b": {"elements": 204_800}}
    assert result.report["details"] == {"factor": 3.0}
    assert result.report["rules"] == {"copied: a vector": 1, "halved": 4, "dropped: replaced by its halves": 2}
    assert json.loads((out / "config.json").read_text())["halved"] is True
    assert (out / "extra" / "note.txt").read_text() == "5 tensors written"


def test_forked_workers_write_the_same(halves, model, load, tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_lr.engine.processes.FORK_FROM", 0)
    merge(recipe(model), tmp_path / "out", device="cpu", threads=2)
    check(tmp_path / "out", model, load)


def test_a_plan_reads_no_weights_and_prepares_nothing(halves, model, tmp_path, monkeypatch):
    monkeypatch.setattr(Halves, "prepare", None)
    d = plan(recipe(model), device="cpu").to_dict()
    assert d["tensors"] == 5 and any("not known before" in w for w in d["warnings"])
    assert d["bytes_in"] == (48 + 204_800 + 8) * 2


def test_a_task_that_does_not_fit_is_refused_before_anything_is_written(halves, model, tmp_path):
    with pytest.raises(ResourceError, match="max-memory"):
        merge(recipe(model), tmp_path / "out", device="cpu", max_memory="600KiB")
    assert not (tmp_path / "out").exists()


def test_what_is_not_finite_is_found(halves, make, random_tensors, tmp_path):
    tensors = random_tensors(3, shapes={"a.weight": (6, 8)})
    tensors["a.weight"][2, 1] = float("nan")
    bad = make("bad", tensors)
    with pytest.raises(NonFiniteError, match=r"'a\.weight'"):
        merge(recipe(bad), tmp_path / "out", device="cpu")
    merge(recipe(bad, nonfinite="allow"), tmp_path / "allowed", device="cpu")


def test_overflow_of_the_cast_is_found(halves, make, tmp_path):
    big = make("big", {"a.weight": torch.full((2, 8), 3e4, dtype=torch.float16)})
    with pytest.raises(NonFiniteError, match="90000"):
        merge(recipe(big), tmp_path / "out", device="cpu")


def test_a_method_that_forgets_elements_cannot_commit(halves, model, tmp_path, monkeypatch):
    monkeypatch.setattr(toy_rewrite, "FORGET", True)
    with pytest.raises(Exception, match="elements were written"):
        merge(recipe(model), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_another_recipe_does_not_take_over_what_was_prepared(halves, model, tmp_path, monkeypatch):
    monkeypatch.setattr(toy_rewrite, "FORGET", True)
    with pytest.raises(Exception, match="elements were written"):
        merge(recipe(model), tmp_path / "out", device="cpu")
    with pytest.raises(UsageError, match="changed since: recipe"):
        merge(recipe(model, seed=5), tmp_path / "out", device="cpu")


def test_a_bundle_keeps_no_model_at_its_root(halves, model, load, tmp_path, monkeypatch):
    monkeypatch.setattr(Halves, "kind", "bundle")
    merge(recipe(model), tmp_path / "out", device="cpu", shard_size=100_000)
    names = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    shards = {n for n in names if n.endswith(".safetensors")}
    assert shards and all(n.startswith("bundle") for n in shards)
    assert names - shards == {
        "README.md", "bundle.safetensors.index.json", "extra/note.txt", "merge_report.json", "mergekit_lr.yml",
        "shared/config.json",
    }  # fmt: skip
    check(tmp_path / "out", model, load)


ACTION = """
import mergekit_lr.engine.run as run
from tests.engine.toy_rewrite import registered

registered(setattr)
def act(out):
    run.merge({recipe!r}, out, device="cpu", threads=1, shard_size=100_000)
"""


def test_killed_at_every_operation_while_preparing_and_writing(halves, make, random_tensors, tmp_path):
    small = make("s", random_tensors(3, shapes={"a.weight": (6, 8), "b.weight": (4, 16), "norm.weight": (8,)}))
    assert killed_everywhere(ACTION.format(recipe=recipe(small)), tmp_path / "work") > 30


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"calibration": {"text": ["a.txt"]}}, "calibration: is not used by halves"),
        ({"permutations": "auto"}, "permutations: is not used by halves"),
    ],
)
def test_settings_that_the_method_does_not_use_are_refused(halves, model, more, what):
    with pytest.raises(RecipeError, match=what):
        plan(recipe(model, **more))
