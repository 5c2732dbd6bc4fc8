"""Bundles held in memory: the same bits as from files, whatever the weights are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_lr import merge
from mergekit_lr.bundle.apart import bits_of, prepared
from mergekit_lr.bundle.codes import get_code
from mergekit_lr.bundle.manifest import Entry
from mergekit_lr.bundle.masks import pack
from mergekit_lr.bundle.memory import HeldPart, MemoryDesk, Part
from mergekit_lr.bundle.open import open_bundle

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
EDGES = [0, 1, -1, "least", "greatest"]


def anything(dtype: torch.dtype, n: int, seed: int) -> Tensor:
    """Bit patterns of every kind: NaN, infinities, both zeros, subnormal numbers, and the ends of the integers."""
    kind = bits_of(dtype)
    ends = torch.iinfo(kind)
    found = torch.randint(ends.min, ends.max, (n,), dtype=kind, generator=torch.Generator().manual_seed(seed))
    edges = [{"least": ends.min, "greatest": ends.max}.get(e, e) for e in EDGES]  # type: ignore[call-overload]
    turn = edges if seed % 2 else edges[::-1]
    found[: 5 * 5] = torch.tensor(turn, dtype=kind).repeat(5) if seed % 2 else torch.tensor(turn).repeat_interleave(5)
    return found.view(dtype)


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("n", [1, 25, 70_000])
def test_either_value_comes_back_bit_for_bit(code: str, n: int) -> None:
    dtype, kind = DTYPES[code], bits_of(DTYPES[code])
    low, high = (anything(dtype, max(n, 25), seed)[:n] for seed in (1, 2))
    mask = torch.rand(n, generator=torch.Generator().manual_seed(3)) < 0.5
    parts: dict[str, Part] = {"l": HeldPart(low), "h": HeldPart(high), "m": HeldPart(pack(mask))}
    entry = prepared(Entry("w", code, (n,), "select", ("l", "h"), {"t": ("m",)}), parts)
    assert "l" not in parts and "h" not in parts  # they would be taken for what is stored
    wanted, out = entry.of("t"), torch.zeros(n, dtype=dtype)
    get_code(wanted.code).decode(wanted, MemoryDesk([parts[p] for p in wanted.parts], out, code))
    assert torch.equal(out.view(kind), torch.where(mask, high.view(kind), low.view(kind)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({"merge_method": "tall_masks"}, "apart"),
        ({"merge_method": "tall_masks", "parameters": {"lambda": "auto", "factor": "fitted"}}, "masked"),
        ({"merge_method": "two_values"}, "apart"),
        ({"merge_method": "quantized", "parameters": {"bits": 4}}, "offsets"),
    ],
)
def test_a_held_bundle_gives_the_bits_of_its_files(
    tmp_path: Path, write: Callable[..., list[str]], dtype: torch.dtype, parameters: dict[str, Any], code: str
) -> None:
    g = torch.Generator().manual_seed(5)
    models = [{"w": torch.randn(701, 101, generator=g).to(dtype), "b": torch.randn(6, 4, generator=g).to(dtype)}]
    models += [
        {n: (x + 0.1 * torch.randn(x.shape, generator=g)).to(dtype) for n, x in models[0].items()} for _ in "abc"
    ]
    models[0]["w"][0, :2] = torch.tensor([-0.0, 0.0])
    base, *tasks = write(models)
    recipe = parameters | {"base_model": base, "models": [{"model": m, "name": f"t{i}"} for i, m in enumerate(tasks)]}
    merge(recipe, tmp_path / "bundle", device="cpu")
    kind = bits_of(dtype)
    with open_bundle(tmp_path / "bundle") as bundle:
        filed = {(t, n): w for t in bundle.tasks for n, w in bundle.state_dict(t).items()}
        stored = {n: bundle.part(n).take(0, info.numel) for n, info in bundle.stored.tensors.items()}
        bundle.hold()
        assert {bundle.tensors(t)["w"].code for t in bundle.tasks} == {code}
        for (task, name), w in filed.items():
            assert torch.equal(bundle.state_dict(task)[name].view(kind), w.view(kind))
        for n, w in stored.items():  # a stored tensor is still what its name says
            assert torch.equal(bundle.part(n).take(0, w.numel()).view(torch.uint8), w.view(torch.uint8))


def test_a_bundle_can_be_held_again_and_is_whole_after_closing(
    bundle_folder: Path, expected: dict[str, Tensor]
) -> None:
    bundle = open_bundle(bundle_folder)
    for _ in range(2):
        bundle.hold()
        assert torch.equal(bundle.state_dict("german")["model.b.weight"], expected["german/model.b.weight"])
    bundle.close()
    assert bundle.tensors("german")["model.b.weight"].code == "masked"
