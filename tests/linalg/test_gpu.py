"""What only a CUDA device can show; run with ``-m gpu``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mergekit_lr.linalg import (
    cusolver,
    full_svd,
    joint_left_subspaces,
    polar_factor,
    project_combine,
    rademacher,
    symmetric_eigh,
    task_gram,
    truncated_svd,
)
from mergekit_lr.linalg.kernels import kernels_work

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
Matrix = Callable[..., torch.Tensor]
Far = Callable[[torch.Tensor, torch.Tensor], float]


def test_the_shim_loads_and_its_routines_are_right(matrix: Matrix) -> None:
    solver = cusolver.load()
    assert solver is not None and solver.version > 0
    g = torch.stack([matrix("power", 96, 200, i, torch.float32) for i in range(4)]).cuda()
    g = g @ g.transpose(1, 2)
    found = cusolver.eigh_batched(g)
    assert found is not None or not solver.has("cusolverDnXsyevBatched")
    if found is not None:
        torch.testing.assert_close(found[0], torch.linalg.eigvalsh(g), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(g @ found[1], found[1] * found[0].unsqueeze(1), rtol=1e-4, atol=1e-5)
    largest = cusolver.eigh_largest(g[0], 7)
    assert largest is not None
    torch.testing.assert_close(g[0] @ largest[1], largest[1] * largest[0], rtol=1e-4, atol=1e-5)
    u, s, vh = full_svd(g[0])
    torch.testing.assert_close((u * s) @ vh, g[0], rtol=1e-4, atol=1e-5)


def test_kernels_compile_and_agree() -> None:
    assert kernels_work(torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(300, 900), (900, 300), (2304, 2304)])
def test_gpu_keeps_the_promise(matrix: Matrix, far: Far, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    a = matrix("power", *shape, 0).to(dtype).cuda()
    factors = truncated_svd(a, 24)
    assert factors.certificate.holds
    tail = torch.linalg.eigvalsh(a.double().T @ a.double()).flip(0)[24:].clamp(min=0).sum().sqrt()
    residual = torch.linalg.vector_norm(a.double() - factors.dense().double())
    assert float(residual / tail) <= 1 + factors.certificate.excess


def test_batched_equals_the_cpu(matrix: Matrix, far: Far) -> None:
    groups = [[matrix("power", 80, 130, 3 * g + i, torch.bfloat16) for i in range(2)] for g in range(3)]
    on_cpu = joint_left_subspaces(groups, 12)
    on_gpu = joint_left_subspaces([[w.cuda() for w in g] for g in groups], 12)
    for group, a, b in zip(groups, on_cpu, on_gpu, strict=True):
        merged = project_combine(b, [w.cuda() for w in group], [0.5, 0.5], out_dtype=torch.float32)
        assert far(merged.cpu(), project_combine(a, group, [0.5, 0.5], out_dtype=torch.float32)) <= 1e-4


def test_signs_task_grams_and_polar_factors(matrix: Matrix, far: Far) -> None:
    assert torch.equal(rademacher(300, 7, name="w", device="cuda").cpu(), rademacher(300, 7, name="w"))
    points = matrix("gauss", 5, 100_000, 0, torch.bfloat16)
    assert far(task_gram(list(points.cuda())).cpu(), task_gram(list(points))) <= 1e-12
    a = matrix("power", 256, 256, 1, torch.float32)
    assert far(polar_factor(a.cuda()).cpu(), polar_factor(a.double())) <= 3e-5


def test_eigensolver_batches_above_32(matrix: Matrix) -> None:
    g = torch.stack([matrix("power", 200, 300, i, torch.float32) for i in range(6)])
    g = g @ g.transpose(1, 2)
    values, vectors = symmetric_eigh(g.cuda())
    want = torch.linalg.eigvalsh(g.double()).flip(-1)
    torch.testing.assert_close(values.cpu().double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(g.cuda() @ vectors, vectors * values.unsqueeze(1), rtol=1e-3, atol=1e-3)
