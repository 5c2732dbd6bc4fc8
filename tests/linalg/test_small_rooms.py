"""Grams, eigenproblems, orthonormal bases, polar factors, task Grams, whitening: each against float64 LAPACK."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.errors import LinalgError
from mergekit_lr.linalg import (
    Blocks,
    Side,
    eigh,
    full_svd,
    gram,
    gram_root,
    joint_whitened_subspace,
    largest_eigenpairs,
    orthonormalize,
    polar_factor,
    singular_values,
    sum_svd,
    symmetric_eigh,
    task_components,
    task_gram,
    whitened_svd,
)
from mergekit_lr.linalg.polar import polar_express_coefficients

Matrix = Callable[..., torch.Tensor]
Far = Callable[[torch.Tensor, torch.Tensor], float]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 300),
    widths=st.lists(st.integers(1, 120), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    side=st.sampled_from(list(Side)),
    with_base=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_gram(
    matrix: Matrix, rows: int, widths: list[int], dtype: torch.dtype, side: Side, with_base: bool, seed: int
) -> None:
    if with_base:
        widths = [widths[0]] * len(widths)
    matrices = [matrix("gauss", rows, w, seed + i, dtype) for i, w in enumerate(widths)]
    base = matrix("gauss", rows, widths[0], seed + 50, dtype) if with_base else None
    m = torch.cat([w.double() - (0 if base is None else base.double()) for w in matrices], dim=1)
    want = m @ m.T if side is Side.LEFT else m.T @ m
    blocks = Blocks(matrices, base)
    got = gram(blocks, side)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(got, got.T)
    scale = float(torch.linalg.vector_norm(want))
    # fp32 subtraction of a base rounds each entry once; otherwise products of halves are exact
    assert float(torch.linalg.vector_norm(got.double() - want)) <= 1e-6 * scale
    wide = gram(blocks, side, dtype=torch.float64)
    assert float(torch.linalg.vector_norm(wide - want)) <= 1e-14 * scale
    x = torch.ones(sum(widths), 2, dtype=torch.float64)
    torch.testing.assert_close(blocks.times(x), m @ x, rtol=1e-12, atol=1e-10)
    y = torch.ones(rows, 2, dtype=torch.float64)
    torch.testing.assert_close(blocks.transposed_times(y), m.T @ y, rtol=1e-12, atol=1e-10)


def test_gram_of_wide_half_precision_is_summed_in_pieces(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces change nothing but rounding, and none is larger than what it may be."""
    w = matrix("gauss", 40, 5000, 0, torch.bfloat16)
    for side in Side:
        sizes = [x.numel() for x in Blocks([w]).pieces(side, torch.float32, elements=10_000)]
        assert max(sizes) <= 10_000 and sum(sizes) == w.numel()


def test_extreme_magnitudes_are_scaled_by_powers_of_two(matrix: Matrix) -> None:
    a = matrix("gauss", 8, 12, 0, torch.float32)
    for factor in (2.0**-100, 2.0**90):
        blocks = Blocks([a * factor])
        assert blocks.scale != 1.0 and np.log2(blocks.scale) % 1 == 0
        got = gram(blocks).double() / blocks.scale**2
        want = (a.double() @ a.double().T) * factor**2
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_symmetric_eigh(matrix: Matrix, dtype: torch.dtype) -> None:
    a = torch.stack([matrix("power", 20, 30, i) for i in range(3)])
    g = (a @ a.transpose(1, 2)).to(dtype)
    values, vectors = symmetric_eigh(g)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    np.testing.assert_allclose(values.numpy(), np.linalg.eigvalsh(g.double().numpy())[:, ::-1], atol=tolerance)
    torch.testing.assert_close(g @ vectors, vectors * values.unsqueeze(1), atol=tolerance, rtol=0)
    few, some = largest_eigenpairs(g[0], 4)
    torch.testing.assert_close(few, values[0, :4], atol=tolerance, rtol=0)
    torch.testing.assert_close(g[0] @ some, some * few, atol=tolerance, rtol=0)
    with pytest.raises(LinalgError, match="rank"):
        largest_eigenpairs(g[0], 21)
    with pytest.raises(LinalgError, match="square"):
        symmetric_eigh(torch.ones(2, 3))


def test_energy_check_catches_garbage(matrix: Matrix) -> None:
    g = matrix("power", 10, 20, 1)
    g = g @ g.T
    values = torch.linalg.eigvalsh(g)
    assert eigh.energy_is_right(g, values)
    assert not eigh.energy_is_right(g, values * 1.001)
    assert not eigh.energy_is_right(g, torch.full_like(values, float(values.mean())))  # right trace, wrong norm
    assert eigh.energy_is_right(torch.zeros(3, 3), torch.zeros(3))


def test_eigensolver_failure_is_an_error_with_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_g: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge\nmore")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(LinalgError, match=r"layer: the symmetric eigensolver did not converge \(did not converge\)"):
        symmetric_eigh(torch.eye(3), where="layer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e9, float("inf")])
def test_orthonormalize(matrix: Matrix, dtype: torch.dtype, condition: float) -> None:
    rng = np.random.default_rng(0)
    sigma = np.logspace(0, -np.log10(condition), 6) if np.isfinite(condition) else np.array([1, 1, 0, 0, 0, 0.0])
    u = np.linalg.qr(rng.standard_normal((50, 6)))[0]
    x = torch.from_numpy((u * sigma) @ np.linalg.qr(rng.standard_normal((6, 6)))[0]).to(dtype)
    p = torch.linalg.qr(matrix("gauss", 50, 8, 3))[0].to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    for against in (None, p):
        q = orthonormalize(x, against)
        everything = q if against is None else torch.cat((against, q), dim=1)
        identity = torch.eye(everything.shape[1], dtype=torch.float64)
        # p itself is orthonormal only to its dtype
        assert float((everything.double().T @ everything.double() - identity).abs().max()) <= tolerance
    if condition <= 1e3:
        q = orthonormalize(x).double()
        torch.testing.assert_close(q @ (q.T @ x.double()), x.double(), atol=1e-5, rtol=0)


def test_full_svd(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    a = matrix("power", 12, 20, 0)
    want = np.linalg.svd(a.numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(a).numpy(), want, rtol=1e-12)
    real = torch.linalg.svd

    def fails(*_args: object, **_kwargs: object) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    def fails_too(*_args: object, **_kwargs: object) -> None:
        raise np.linalg.LinAlgError("no convergence")

    def garbage(x: torch.Tensor, **kwargs: bool) -> tuple[torch.Tensor, ...]:
        u, s, vh = real(x, **kwargs)
        return u, s * 1.01, vh

    for broken in (fails, garbage):  # the second solver answers
        monkeypatch.setattr(torch.linalg, "svd", broken)
        u, s, vh = full_svd(a)
        np.testing.assert_allclose(s.numpy(), want, rtol=1e-12)
        torch.testing.assert_close((u * s) @ vh, a)
    monkeypatch.setattr("scipy.linalg.svd", fails_too)
    with pytest.raises(LinalgError, match="did not converge"):
        full_svd(a)


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("iterate", [False, True])
def test_polar_factor(matrix: Matrix, far: Far, shape: tuple[int, int], dtype: torch.dtype, iterate: bool) -> None:
    a = matrix("power", *shape, 4, dtype)
    u, _, vh = np.linalg.svd(a.double().numpy(), full_matrices=False)
    got = polar_factor(a, iterate=iterate)
    assert got.dtype == dtype
    assert far(got, torch.from_numpy(u @ vh)) <= (2e-5 if dtype == torch.float32 else 1e-11)
    assert far(polar_factor(a * 2.0**70, iterate=iterate), got) <= 1e-6


def test_polar_of_stacked_bases_with_a_known_bound(matrix: Matrix, far: Far) -> None:
    """T orthonormal bases side by side, square and nearly singular: sigma_1 <= sqrt(T)."""
    bases = [torch.linalg.qr(matrix("gauss", 128, 16, i, torch.float32))[0] for i in range(8)]
    stacked = torch.cat(bases, dim=1)
    u, s, vh = np.linalg.svd(stacked.double().numpy())
    assert 1e2 < s[0] / s[-1] < 1e5
    want = torch.from_numpy(u @ vh)
    assert far(polar_factor(stacked, bound=8**0.5, iterate=True), want) <= 5e-6
    assert far(polar_factor(stacked), want) <= 5e-5


def test_polar_iteration_falls_back_when_singular(matrix: Matrix, far: Far) -> None:
    """Rank-deficient: the unique partial isometry, iterated or not; zero stays zero."""
    a = matrix("low rank", 15, 15, 0)
    u, s, vh = np.linalg.svd(a.numpy())
    r = int((s > 1e-12).sum())
    want = torch.from_numpy(u[:, :r] @ vh[:r])
    for iterate in (False, True):
        assert far(polar_factor(a, iterate=iterate), want) <= 1e-10
        assert torch.equal(polar_factor(torch.zeros(3, 5), iterate=iterate), torch.zeros(3, 5))
    for bad in ({"bound": 0.0}, {"bound": -1.0}, {"condition": 1.0}):
        with pytest.raises(LinalgError, match="must exceed"):
            polar_factor(a, **bad)


@pytest.mark.parametrize("lower", [1e-2, 1e-3, 1e-5])
def test_polar_express_steps_are_minimax(lower: float) -> None:
    """Each step equioscillates (four alternating extremes) on the interval that the steps before it left."""
    low, high = lower, 1.0
    for a, b, c in polar_express_coefficients(lower):
        points = np.geomspace(low, high, 200_001)
        error = 1.0 - (a * points + b * points**3 + c * points**5)
        worst = np.abs(error).max()
        extremes = error[np.abs(error) > worst * (1 - 1e-6)]
        signs = np.sign(extremes)[np.append(True, np.diff(np.sign(extremes)) != 0)]
        assert signs.tolist() == [1, -1, 1, -1]
        low, high = 1 - worst, 1 + worst


@pytest.mark.parametrize("lower", [1e-2, 1e-5, 1e-7])
def test_polar_express_ends_near_one(lower: float) -> None:
    x = np.geomspace(lower, 1.0, 200_001)
    for a, b, c in polar_express_coefficients(lower):
        x = a * x + b * x**3 + c * x**5
    assert np.abs(1 - x).max() < 1e-3


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 400), st.booleans(), st.integers(0, 999))
def test_task_gram(matrix: Matrix, count: int, length: int, with_base: bool, seed: int) -> None:
    vectors = [matrix("gauss", 1, length, seed + i, torch.bfloat16).reshape(-1) for i in range(count)]
    base = matrix("gauss", 1, length, seed + 77, torch.bfloat16).reshape(-1) if with_base else None
    points = torch.stack([v.double() for v in vectors]) - (0 if base is None else base.double())
    got = task_gram(vectors, base)
    torch.testing.assert_close(got, points @ points.T, rtol=1e-12, atol=1e-12)
    assert torch.equal(got, got.T)


def test_task_gram_over_many_chunks(matrix: Matrix) -> None:
    points = matrix("gauss", 3, 100_000, 0, torch.float32)
    want = points.double() @ points.double().T
    torch.testing.assert_close(task_gram(list(points)), want, rtol=1e-13, atol=0)


def test_task_errors_and_absent_directions(matrix: Matrix) -> None:
    for bad in ([], [torch.ones(3), torch.ones(4)], [torch.ones(3, dtype=torch.int64)], [torch.ones(0)]):
        with pytest.raises(LinalgError):
            task_gram(bad)
    with pytest.raises(LinalgError, match="task vector"):
        task_gram([torch.ones(3)], torch.ones(4))
    with pytest.raises(LinalgError, match="T x T"):
        task_components(torch.ones(2, 3))
    with pytest.raises(LinalgError, match="rank"):
        task_components(torch.eye(3), 4)
    v = matrix("gauss", 1, 50, 0).reshape(-1)
    assert task_components(task_gram([v, 2 * v, -v])).sigma.numel() == 1
    assert task_components(task_gram([0 * v, 0 * v])).sigma.numel() == 0


@pytest.mark.parametrize("shape", [(10, 16), (30, 12)])
@pytest.mark.parametrize("tokens", [100, 7])
def test_whitened_svd_minimises_the_activation_error(matrix: Matrix, shape: tuple[int, int], tokens: int) -> None:
    """The optimum of ``||(W - W_r) X^T||`` is the tail of the singular values of ``W X^T``, whatever was not seen."""
    w = matrix("gauss", *shape, 1)
    x = matrix("power", tokens, shape[1], 2)
    b, a, _ = whitened_svd(w, x.T @ x, 4)
    optimum = float(np.linalg.norm(np.linalg.svd((w @ x.T).numpy(), compute_uv=False)[4:]))
    assert float(torch.linalg.vector_norm((w - b @ a) @ x.T)) == pytest.approx(optimum, rel=1e-6, abs=1e-9)
    plain = np.linalg.svd(w.numpy(), full_matrices=False)
    unwhitened = torch.from_numpy((plain[0][:, :4] * plain[1][:4]) @ plain[2][:4])
    assert float(torch.linalg.vector_norm((w - unwhitened) @ x.T)) > optimum


def test_tall_whitened_union_is_given_as_left_vectors(matrix: Matrix, far: Far) -> None:
    w, x = matrix("gauss", 30, 6, 0), matrix("gauss", 50, 6, 1)
    joint = joint_whitened_subspace([w], [x.T @ x], 3)
    u = torch.from_numpy(np.linalg.svd((w @ x.T).numpy())[0][:, :3].copy())
    assert joint.side is Side.LEFT and joint.basis is not None
    assert far(joint.basis @ joint.basis.T, u @ u.T) <= 1e-6


def test_gram_root(matrix: Matrix, far: Far) -> None:
    x = matrix("gauss", 5, 9, 0)
    c = x.T @ x
    root, inverse = gram_root(c)
    assert root.shape == (9, 5)
    assert far(root @ root.T, c) <= 1e-13
    assert far(inverse @ root, torch.eye(5, dtype=torch.float64)) <= 1e-12
    for bad, message in (
        (torch.zeros(3, 3), "zero or not"),
        (-torch.eye(3), "zero or not"),
        (torch.triu(torch.ones(3, 3)), "symmetric"),
        (torch.ones(2, 3), "square"),
    ):
        with pytest.raises(LinalgError, match=message):
            gram_root(bad)
    with pytest.raises(LinalgError, match="activation Gram"):
        whitened_svd(torch.ones(4, 5), torch.eye(4), 1)
    with pytest.raises(LinalgError, match="1 activation Grams"):
        joint_whitened_subspace([torch.ones(4, 5)] * 2, [torch.eye(5)], 1)


def test_low_rank_errors_and_wide_stacks(matrix: Matrix, far: Far) -> None:
    b, a = matrix("gauss", 6, 4, 0), matrix("gauss", 4, 7, 1)
    found = sum_svd([(b, a), (b, 2 * a), (b, a)])  # total rank 12 exceeds both dimensions
    assert far(found.dense(), 4 * b @ a) <= 1e-13
    zero = sum_svd([(b, a), (b, a)], [1.0, -1.0])
    assert float(zero.s.max()) <= 1e-13
    for pairs, message in (
        ([], "empty"),
        ([(b, b)], "does not chain"),
        ([(b, a), (b, matrix("gauss", 4, 8, 1))], "different shapes"),
        ([(b.int(), a)], "cannot decompose"),
    ):
        with pytest.raises(LinalgError, match=message):
            sum_svd(pairs)
    with pytest.raises(LinalgError, match="weights"):
        sum_svd([(b, a)], [1.0, 2.0])
    with pytest.raises(LinalgError, match="rank"):
        sum_svd([(b, a)], rank=5)
