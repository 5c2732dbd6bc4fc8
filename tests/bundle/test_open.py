"""Reading bundles: values against float64, and every way in which a bundle can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergekit_lr.bundle.manifest import FILE
from mergekit_lr.bundle.open import open_bundle
from mergekit_lr.errors import CheckpointError, UsageError

SHAPES = {"model.a.weight": (33, 7), "model.b.weight": (70_001,), "model.norm.weight": (5,)}


class Holder(nn.Module):
    """A module whose state dict has the bundle's names."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.model = nn.Module()
        for name in ("a", "b", "norm"):
            part = nn.Module()
            part.weight = nn.Parameter(torch.full(SHAPES[f"model.{name}.weight"], 7.0, dtype=dtype))
            setattr(self.model, name, part)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))


def test_a_task_is_the_formula_in_float64_rounded_once(bundle_folder: Path, expected: dict[str, Tensor]) -> None:
    with open_bundle(bundle_folder) as bundle:
        assert bundle.tasks == ("python", "german")
        for task in bundle.tasks:
            state = bundle.state_dict(task)
            assert set(state) == set(SHAPES)
            assert len(state) == 3
            for name in state:
                assert same_bits(state[name], expected[f"{task}/{name}"])


@pytest.mark.parametrize("held", [False, True])
def test_swapping_back_and_forth_leaves_the_same_bits(
    bundle_folder: Path, expected: dict[str, Tensor], held: bool
) -> None:
    with open_bundle(bundle_folder) as bundle:
        if held:
            bundle.hold()
        module = Holder()
        pointers = {n: p.data_ptr() for n, p in module.named_parameters()}
        for task in ("python", "german", "german", "python"):
            swap = bundle.load_into(module, task)
            for name, parameter in module.named_parameters():
                assert same_bits(parameter.detach(), expected[f"{task}/{name}"])
                assert parameter.data_ptr() == pointers[name]
            elements = sum(p.numel() for p in module.parameters())
            masks = sum(-(-p.numel() // 8) for p in module.parameters())
            assert swap.bytes == 6 * elements + masks
            assert swap.gigabytes_per_second > 0


def test_a_wider_module_holds_what_a_file_would(bundle_folder: Path, expected: dict[str, Tensor]) -> None:
    module = Holder(torch.float32)
    with open_bundle(bundle_folder) as bundle:
        bundle.load_into(module, "german")
    for name, parameter in module.named_parameters():
        assert same_bits(parameter.detach(), expected[f"german/{name}"].float())


def test_a_module_that_does_not_fit_is_left_alone(bundle_folder: Path) -> None:
    def check(module: nn.Module, words: str) -> None:
        before = {n: t.clone() for n, t in module.state_dict().items()}
        with open_bundle(bundle_folder) as bundle, pytest.raises(CheckpointError, match=words):
            bundle.load_into(module, "python")
        assert all(same_bits(t, before[n]) for n, t in module.state_dict().items())

    check(Holder(torch.float16), "torch.float16 in the module, which rounds it")
    smaller = Holder()
    smaller.model.norm.weight = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))  # type: ignore[union-attr]
    check(smaller, r"'model.norm.weight' is \[5\] in the bundle and \[4\] in the module")
    more = Holder()
    more.head = nn.Linear(3, 3, dtype=torch.bfloat16)
    check(more, "'head.weight' of the module is not in the bundle and would keep its value")
    less = Holder()
    del less.model.norm
    check(less, "'model.norm.weight' has no place in the module")


def test_a_tied_tensor_is_no_stranger(bundle_folder: Path, expected: dict[str, Tensor]) -> None:
    module = Holder()
    module.head = nn.Module()
    module.head.weight = module.model.a.weight  # type: ignore[union-attr]
    with open_bundle(bundle_folder) as bundle:
        bundle.load_into(module, "python")
    assert same_bits(module.head.weight.detach(), expected["python/model.a.weight"])  # type: ignore[operator]


def test_transposed_memory_is_written_too(bundle_folder: Path, expected: dict[str, Tensor]) -> None:
    module = Holder()
    module.model.a.weight.data = torch.zeros(7, 33, dtype=torch.bfloat16).t()  # type: ignore[union-attr]
    with open_bundle(bundle_folder) as bundle:
        bundle.load_into(module, "python")
    assert same_bits(module.model.a.weight.detach(), expected["python/model.a.weight"])  # type: ignore[union-attr,operator]


def test_an_unknown_task_shows_the_nearest(bundle_folder: Path) -> None:
    with open_bundle(bundle_folder) as bundle:
        with pytest.raises(UsageError, match=r"no task 'pyhton'.*did you mean python\?"):
            bundle.state_dict("pyhton")
        with pytest.raises(UsageError, match="it has python, german"):
            bundle.state_dict("zzz")
        with pytest.raises(UsageError, match="stores no low-rank factors"):
            bundle.adapter("python", bundle_folder / "adapter")


def edit(folder: Path, change: Any) -> None:
    path = folder / FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(version=2), "format version 2.*reads up to 1.*update mergekit_lr"),
        (lambda c: c.update(version="1"), "its version is 1"),
        (lambda c: c.update(format="another"), "its format is not"),
        (lambda c: c.pop("tasks"), "KeyError"),
        (lambda c: c["tasks"].append(c["tasks"][0]), "each its own"),
        (lambda c: c["tensors"][0]["own"].update(other=["x"]), "'other' that is not listed"),
        (lambda c: c["tensors"].append(c["tensors"][0]), "twice for task"),
        (lambda c: c["tensors"][0].update(dtype="F3"), "F3"),
        (lambda c: c["tensors"][0].update(shape=[-1]), "shape"),
        (lambda c: c["tensors"][0].update(code=7), "7"),
        (lambda c: c["tensors"][0]["shared"].append("nothing"), "does not hold 'nothing'"),
        (lambda c: c["files"][0].update(bytes=1), "not the one that was written"),
        (lambda c: c["files"][0].update(file="../model.safetensors"), "missing|plain file name"),
        (lambda c: c["files"][0].update(file="other.safetensors"), "'other.safetensors' is missing"),
    ],
)
def test_a_damaged_or_newer_bundle_says_so(bundle_folder: Path, change: Any, words: str) -> None:
    edit(bundle_folder, change)
    with pytest.raises(CheckpointError, match=words):
        open_bundle(bundle_folder)


def test_an_unknown_code_says_so(bundle_folder: Path) -> None:
    edit(bundle_folder, lambda c: c["tensors"][0].update(code="holographic"))
    with open_bundle(bundle_folder) as bundle, pytest.raises(CheckpointError, match="update mergekit_lr"):
        bundle.state_dict("python")["model.a.weight"]


def test_another_shard_under_the_same_name(bundle_folder: Path) -> None:
    shard = bundle_folder / "model.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b"mask/german/model.norm", b"mask/german/model.form"))
    with pytest.raises(CheckpointError, match="not the one that was written"):
        open_bundle(bundle_folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"'model.safetensors' is missing"):
        open_bundle(bundle_folder)


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a bundle.*no bundle\.json"):
        open_bundle(tmp_path)
    (tmp_path / FILE).write_text("{,")
    with pytest.raises(CheckpointError, match=r"bundle\.json: not valid JSON"):
        open_bundle(tmp_path)
    (tmp_path / FILE).write_text('{"format": 1, "format": 2}')
    with pytest.raises(CheckpointError, match="twice"):
        open_bundle(tmp_path)
