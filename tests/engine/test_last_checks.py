"""What is looked at before an output is called one, and what a workspace does when others come between."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lr import merge
from mergekit_lr.checkpoint import fs
from mergekit_lr.engine.workspace import Workspace
from mergekit_lr.errors import NonFiniteError, ResourceError, UsageError, VerificationError


@pytest.fixture
def recipe(make, random_tensors) -> dict[str, Any]:
    entries = [{"model": str(make(f"m{i}", random_tensors(i))), "parameters": {"weight": 0.5}} for i in range(2)]
    return {"merge_method": "linear", "models": entries}


def when_merged(do: Callable[[], None]) -> Callable[[Any], None]:
    """A progress that lets ``do`` happen once the last tensor is written, before the shards are read back."""
    return lambda event: do() if event.stage == "merging" and event.done_bytes == event.total_bytes else None


def test_a_shard_that_somebody_removed_is_no_output(recipe, tmp_path):
    shard = tmp_path / "out.partial" / "model" / "model.safetensors"
    with pytest.raises(ResourceError, match=r"a shard is gone.*removed it while it was written.*run the same") as e:
        merge(recipe, tmp_path / "out", device="cpu", threads=1, progress=when_merged(shard.unlink))
    assert str(shard) in str(e.value)
    assert not (tmp_path / "out").exists()
    merge(recipe, tmp_path / "out", device="cpu", threads=1)
    merge(recipe, tmp_path / "undisturbed", device="cpu", threads=1)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_a_shard_that_somebody_replaced_is_no_output(recipe, tmp_path):
    shard = tmp_path / "out.partial" / "model" / "model.safetensors"

    def replace() -> None:
        save_file({"other": torch.zeros(3)}, shard)

    with pytest.raises(VerificationError, match=r"do not hold what was planned.*--restart"):
        merge(recipe, tmp_path / "out", device="cpu", threads=1, progress=when_merged(replace))
    assert not (tmp_path / "out").exists()


def test_what_is_not_of_the_output_does_not_come_into_it(recipe, tmp_path):
    model = tmp_path / "out.partial" / "model"

    def stray() -> None:
        (model / "model-00009-of-00009.safetensors").write_bytes(b"left over")
        (model / "link").symlink_to(tmp_path / "m0")

    merge(recipe, tmp_path / "out", device="cpu", threads=1, progress=when_merged(stray))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "merge_report.json", "mergekit_lr.yml", "model.safetensors",
    ]  # fmt: skip
    assert (tmp_path / "m0" / "model.safetensors").exists()


def test_a_merge_that_overflows_on_finite_inputs_is_its_own_fault(make, tmp_path):
    big = str(make("big", {"w.weight": torch.full((4, 4), 3e38)}))
    models = [{"model": big, "parameters": {"weight": 1.0}}, {"model": big, "parameters": {"weight": 1.0}}]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"normalize": False}, "dtype": "float32"}
    with pytest.raises(
        NonFiniteError, match=r"'w\.weight'.*linear overflowed fp32 on finite inputs.*weights and lambda"
    ):
        merge(recipe, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hook() -> Iterator[Callable[[Callable[[str, str], None]], None]]:
    yield fs.set_hook
    fs.set_hook(None)


@pytest.mark.parametrize(("theirs", "fits"), [({"recipe": "a"}, True), ({"recipe": "b"}, False)])
def test_a_plan_that_another_writes_down_at_the_same_moment_is_compared(theirs, fits, tmp_path, hook):
    space = Workspace(tmp_path / "out")
    space.root.mkdir()

    def sooner(operation: str, path: str) -> None:
        if operation == "link":
            Path(path).write_text(json.dumps(theirs))

    hook(sooner)
    if fits:
        space.match(space.plan, {"recipe": "a"})
    else:
        with pytest.raises(UsageError, match=r"another run.*changed since: recipe"):
            space.match(space.plan, {"recipe": "a"})
    assert json.loads(space.plan.read_bytes()) == theirs
    assert [p.name for p in space.root.iterdir()] == ["plan.json"]


def test_an_output_that_is_there_is_not_worked_for(tmp_path):
    (tmp_path / "out").mkdir()
    space = Workspace(tmp_path / "out")
    with pytest.raises(UsageError, match=r"exists already.*--overwrite"):
        space.reserve(resume=True, overwrite=False)
    assert not space.root.exists() and not space.held
    space.reserve(resume=True, overwrite=True)
    space.take()  # it is ours already
    assert space.held
    space.release()


def test_a_finished_output_beside_new_work_is_made_again(recipe, tmp_path):
    """A report of this very run is believed only where the rename took the model with it."""
    out = tmp_path / "out"
    merge(recipe, out, device="cpu", threads=1)
    before = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(b"damaged")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "lock").write_bytes(b"")
    shutil.copytree(out, tmp_path / "out.partial" / "model")
    merge(recipe, out, device="cpu", threads=1, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "out.partial").exists()
