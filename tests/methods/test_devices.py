"""The torch-only way, and a GPU where there is one, against the CPU's way through numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergekit_lr import host, selection
from mergekit_lr.method import GRID
from mergekit_lr.philox import draws

from .examples import CASES, EXAMPLES, METHODS, apply, bases, inputs


def merged(name: str, i: int, shape: tuple[int, ...], device: str) -> list[torch.Tensor]:
    shared, each = EXAMPLES[name][i]
    out = []
    for with_base in bases(METHODS[name]):
        models, base = inputs(METHODS[name], shape, with_base=with_base)
        models = [m.to(device) for m in models]
        base = None if base is None else base.to(device)
        got = apply(METHODS[name], models, base, merge=shared, models=each[: len(models)], seed=3, most=GRID)
        assert got.device.type == device
        out.append(got.cpu())
    return out


def agree(name: str, ours: list[torch.Tensor], reference: list[torch.Tensor]) -> None:
    for a, b in zip(ours, reference, strict=True):
        assert torch.allclose(a, b, rtol=3e-6, atol=1e-7)


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(where: Any) -> bool:
        return False

    monkeypatch.setattr(host, "through_numpy", never)


@pytest.mark.parametrize(("name", "i"), CASES)
@pytest.mark.parametrize("shape", [(), (60, 50), (70_011,)], ids=str)
def test_by_torch_alone(name: str, i: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    reference = merged(name, i, shape, "cpu")
    monkeypatch.setattr(host, "through_numpy", lambda where: False)
    agree(name, merged(name, i, shape, "cpu"), reference)


@pytest.mark.parametrize("collected", [1 << 22, 0], ids=["collect", "count"])
def test_large_selections_by_torch_alone(collected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "SMALL", 1 << 18)
    monkeypatch.setattr(selection, "MOST_COLLECTED", collected)
    x = torch.randn(5 * GRID + 3, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    ties = METHODS["ties"]
    each = [{"weight": 1.0, "density": 0.3}]
    reference = apply(ties, [x], torch.zeros_like(x), models=each, most=GRID)
    monkeypatch.setattr(host, "through_numpy", lambda where: False)
    monkeypatch.setattr(selection, "MOST_COUNTED", 0)
    assert torch.equal(apply(ties, [x], torch.zeros_like(x), models=each, most=GRID), reference)


def test_draws_by_torch_alone(torch_alone: None) -> None:
    words = np.random.Philox(key=5).random_raw(100).view(np.uint16)
    assert np.array_equal(draws(5, 37, 200, "cpu").numpy(), words[37:237])


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "i"), CASES)
@pytest.mark.parametrize("shape", [(), (60, 50), (300_011,)], ids=str)
def test_on_a_gpu(name: str, i: int, shape: tuple[int, ...]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    agree(name, merged(name, i, shape, "cuda"), merged(name, i, shape, "cpu"))
