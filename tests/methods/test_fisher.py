"""Fisher merging is the minimum of the sum of the models' quadratic losses."""

from __future__ import annotations

import torch

from mergekit_lr.pieces import apply
from mergekit_lr.registry import tensor_method

FISHER = tensor_method("fisher")


def test_it_minimises_the_sum_of_quadratics() -> None:
    g = torch.Generator().manual_seed(0)
    w = [torch.randn(6, 5, generator=g) for _ in range(3)]
    f = [torch.rand(6, 5, generator=g) + 0.1 for _ in range(3)]
    models = [{"curvature": "x", "weight": a} for a in (1.0, 2.0, 0.5)]
    x = apply(FISHER, w, None, models=models, extra=f).double().requires_grad_()
    loss = sum(a["weight"] * (h.double() * (x - y.double()) ** 2).sum() for a, h, y in zip(models, f, w, strict=True))
    loss.backward()  # type: ignore[union-attr]
    assert x.grad is not None
    assert float(x.grad.abs().max()) < 1e-5


def test_equal_curvature_is_the_mean() -> None:
    w = [torch.full((4,), 1.0), torch.full((4,), 3.0)]
    f = [torch.full((4,), 1e-30)] * 2
    assert apply(FISHER, w, None, models=[{"curvature": "x"}] * 2, extra=f).tolist() == [2.0] * 4
