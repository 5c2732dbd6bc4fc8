"""WUDI's closed form against its objective, and the soft filter against the descent that it stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergekit_lr.linalg.gram_weighted import entropy_rank, participation_of_roots
from mergekit_lr.pieces import apply
from mergekit_lr.registry import tensor_method

METHOD = tensor_method("wudi")


def tasks(shape: tuple[int, ...] = (5, 8), count: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g) for _ in range(count)]


def merged(t: list[torch.Tensor], **merge: Any) -> torch.Tensor:
    return apply(METHOD, t, torch.zeros_like(t[0]), merge=merge).double()


def gradient(x: torch.Tensor, t: list[torch.Tensor]) -> torch.Tensor:
    parts = [(x - a.double()) @ a.double().T @ a.double() / a.double().square().sum() for a in t]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize("start", ["sum", "mean", "zero"])
@pytest.mark.parametrize("shape", [(5, 8), (9, 4), (2, 40)])
def test_unfiltered_it_is_a_minimum(shape: tuple[int, ...], start: str) -> None:
    t = tasks(shape)
    assert float(gradient(merged(t, filter="pinv", start=start), t).abs().max()) < 1e-6


def test_the_soft_filter_is_gradient_flow() -> None:
    t = tasks()
    x = sum(a.double() for a in t)
    assert isinstance(x, torch.Tensor)
    for _ in range(3000):
        x = x - 1e-3 * gradient(x, t)
    assert torch.allclose(merged(t, time=3.0), x, atol=2e-3)
    assert torch.allclose(merged(t, time=1e-12), t[0].double() + t[1].double(), atol=1e-6)


def test_orthogonal_row_spaces_add_up() -> None:
    """Tasks that do not interfere: the sum serves every one of them, whatever is filtered out."""
    a, b = torch.zeros(3, 6), torch.zeros(3, 6)
    a[:, :3], b[:, 3:] = torch.randn(3, 3), torch.randn(3, 3)
    assert torch.allclose(merged([a, b], filter="pinv"), (a + b).double(), atol=1e-5)


def test_ranks_by_hand() -> None:
    assert participation_of_roots(np.array([4.0, 4.0, 4.0])) == 3
    assert participation_of_roots(np.array([9.0, 1.0])) == 2  # (3 + 1)^2 / 10 = 1.6
    assert participation_of_roots(np.array([1.0, 1e-12])) == 2
    assert entropy_rank(np.array([1.0, 1.0])) == 2
    t = tasks((4, 4), 1)
    one = merged(t, filter="hard", rank="ratio", rank_ratio=0.25, start="zero")
    _, vectors = torch.linalg.eigh(t[0].double().T @ t[0].double())
    top = vectors[:, -1:]
    assert torch.allclose(one, t[0].double() @ top @ top.T, atol=1e-5)


def test_stacked_experts_are_solved_one_by_one_and_embeddings_are_averaged() -> None:
    t = tasks((3, 4, 5))
    whole = merged(t)
    for k in range(3):
        assert torch.allclose(whole[k], merged([a[k] for a in t]))
    e = tasks((6, 4))
    zero = torch.zeros(6, 4)
    mean = apply(METHOD, e, zero, name="model.embed_tokens.weight")
    assert torch.allclose(mean, (e[0] + e[1]) / 2)
    solved = apply(METHOD, e, zero, name="model.embed_tokens.weight", merge={"embeddings": "solve"})
    assert not torch.allclose(mean, solved)
