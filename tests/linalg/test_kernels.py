"""The Triton kernels against float64: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import pytest
import torch

from mergekit_lr.linalg import Blocks, Side, gram, joint_left_subspace, project_combine
from mergekit_lr.linalg import weighted_sum as torch_weighted_sum

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (pip install 'mergekit-lr[gpu]')", allow_module_level=True)

from mergekit_lr.linalg import kernel_combine, kernel_gram

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
Matrix = Callable[..., torch.Tensor]
Far = Callable[[torch.Tensor, torch.Tensor], float]
SMALL = {"block": 16, "block_k": 16, "flush": 32, "interpreted": INTERPRETED}


def assert_rounded(got: torch.Tensor, exact: torch.Tensor) -> None:
    """``got`` is ``exact`` rounded once to bf16; the interpreter truncates, which is one ulp."""
    if not INTERPRETED:
        assert torch.equal(got, exact.to(torch.bfloat16))
    assert bool(((got.float() - exact).abs() <= exact.abs() * 2.0**-7).all())


def fine_tunes(matrix: Matrix, shape: tuple[int, int], count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """A base and ``count`` tensors near it."""
    base = matrix("gauss", *shape, 0)
    near = [base + 0.05 * matrix("gauss", *shape, i + 1) for i in range(count)]
    return [w.to(dtype).to(DEVICE) for w in (base, *near)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize("with_base", [False, True])
def test_gram_accumulate(matrix: Matrix, far: Far, dtype: torch.dtype, side: Side, with_base: bool) -> None:
    """Grouped over clusters, odd sizes, several flushes; agrees with the torch path and with float64."""
    shape = (23, 37) if side is Side.LEFT else (37, 19)
    groups, bases = [], []
    for g in range(2):
        base, *rest = fine_tunes(lambda k, m, n, s, g=g: matrix(k, m, n, s + 10 * g), shape, 2, dtype)
        groups.append(rest)
        bases.append(base if with_base else None)
    got, traces = kernel_gram.gram_accumulate(groups, bases, left=side is Side.LEFT, **SMALL)
    tolerance = 2e-5 if with_base else 2e-6
    for one, trace, group, base in zip(got, traces, groups, bases, strict=True):
        m = torch.cat([w.double() - (0 if base is None else base.double()) for w in group], dim=1)
        want = m @ m.T if side is Side.LEFT else m.T @ m
        assert far(one, want) <= tolerance
        assert float(trace) == pytest.approx(float(want.trace()), rel=tolerance)
        assert torch.equal(one, one.T)
        assert (
            far(one.cpu(), gram(Blocks([w.cpu() for w in group], None if base is None else base.cpu()), side))
            <= tolerance
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_base", [False, True])
def test_weighted_sum(matrix: Matrix, far: Far, dtype: torch.dtype, with_base: bool) -> None:
    base, *matrices = fine_tunes(matrix, (33, 41), 3, dtype)
    reference = base if with_base else None
    weights = [0.5, -0.25, 1.5]
    got = kernel_combine.weighted_sum(matrices, weights, reference, out_dtype=torch.float32, block=256)
    want = torch_weighted_sum([m.cpu() for m in matrices], weights, base=None if reference is None else base.cpu(),
                              out_dtype=torch.float32)  # fmt: skip
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=3e-6)
    exact = sum(f * (m.double() - (base.double() if with_base else 0)) for f, m in zip(weights, matrices, strict=True))
    assert far(got, exact + (base.double() if with_base else 0)) <= 1e-6
    rounded = kernel_combine.weighted_sum(matrices, weights, reference, out_dtype=torch.bfloat16, block=256)
    assert_rounded(rounded, got)


@pytest.mark.parametrize("shape", [(20, 37), (61, 18)])
@pytest.mark.parametrize("with_base", [False, True])
def test_project_combine(matrix: Matrix, far: Far, shape: tuple[int, int], with_base: bool) -> None:
    base, *matrices = fine_tunes(matrix, shape, 3, torch.bfloat16)
    reference = base if with_base else None
    weights, rank = [0.7, 0.4, -0.2], 9
    joint = joint_left_subspace([m.cpu() for m in matrices], rank, base=None if reference is None else base.cpu())
    assert joint.basis is not None
    got = kernel_combine.project_combine(
        joint.basis.to(DEVICE), matrices, weights, reference, left=joint.side is Side.LEFT, scale=0.8,
        out_dtype=torch.float32, interpreted=INTERPRETED, blocks=(16, 16, 16),
    )  # fmt: skip
    plain = project_combine(
        joint, [m.cpu() for m in matrices], weights, base=None if reference is None else base.cpu(), scale=0.8,
        out_dtype=torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(got.cpu(), plain, rtol=0, atol=5e-6)
    rounded = kernel_combine.project_combine(
        joint.basis.to(DEVICE), matrices, weights, reference, left=joint.side is Side.LEFT, scale=0.8,
        out_dtype=torch.bfloat16, interpreted=INTERPRETED, blocks=(16, 16, 16),
    )  # fmt: skip
    assert_rounded(rounded, got)


def test_no_kernel_is_chosen_off_the_gpu(matrix: Matrix) -> None:
    from mergekit_lr.linalg.kernels import gram_kernel, project_combine_kernel

    w = matrix("gauss", 4, 5, 0, torch.bfloat16)
    assert gram_kernel(Blocks([w]), Side.LEFT, torch.float32) is None
    assert project_combine_kernel(Side.LEFT, None, [w], [1.0], None, 1.0, w.dtype, torch.float32) is None
