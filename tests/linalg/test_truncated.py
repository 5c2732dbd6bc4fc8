"""Truncated SVDs over shapes, spectra, magnitudes and dtypes, and what they refuse."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.errors import LinalgError, NonFiniteError
from mergekit_lr.linalg import (
    energy,
    joint_left_subspace,
    polar_factor,
    rademacher,
    ratio,
    task_gram,
    truncated,
    truncated_svd,
)

Matrix = Callable[..., torch.Tensor]
KINDS = ["gauss", "flat", "power", "low rank", "clustered", "tiny tail"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    exponent=st.sampled_from([0, 0, -3, 12, -60, 60]),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_promise(
    matrix: Matrix,
    kind: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    exponent: int,
    seed: int,
    data: st.DataObject,
) -> None:
    """``||A - U S V|| <= (1 + 1e-3) tau_r`` or the rounding floor, orthonormal, sorted, scaled like the input."""
    if dtype == torch.float16:
        exponent = max(-3, min(exponent, 12))
    a = (matrix(kind, *shape, seed) * 2.0**exponent).to(dtype)
    rank = data.draw(st.integers(1, min(shape)))
    factors = truncated_svd(a, rank, seed=seed)
    wide = a.double()
    sigma = np.linalg.svd(wide.numpy(), compute_uv=False)
    norm, tau = float(np.linalg.norm(sigma)), float(np.linalg.norm(sigma[rank:]))
    product = (factors.u.double() * factors.s.double()) @ factors.vh.double()
    residual = float(torch.linalg.vector_norm(wide - product))
    assert residual <= max((1 + 1e-3) * tau, 7.1e-6 * norm)
    assert factors.certificate.norm == pytest.approx(norm, rel=1e-6)
    assert bool((factors.s.diff() <= 0).all()) and bool((factors.s >= 0).all())
    assert factors.dense().shape == a.shape
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert factors.u.dtype == factors.s.dtype == factors.vh.dtype == expected
    for i in range(rank):
        if sigma[i] > 0.05 * sigma[0]:
            assert float(factors.s[i]) == pytest.approx(sigma[i], rel=1e-4)


@pytest.mark.parametrize("shape", [(30, 80), (80, 30), (50, 50)])
def test_exact_matches_lapack(matrix: Matrix, shape: tuple[int, int]) -> None:
    a = matrix("power", *shape, 3, torch.float32)
    factors = truncated_svd(a, 7, exact=True)
    sigma = np.linalg.svd(a.double().numpy(), compute_uv=False)
    assert factors.u.dtype == torch.float64
    np.testing.assert_allclose(factors.s.numpy(), sigma[:7], rtol=1e-10)
    residual = float(torch.linalg.vector_norm(a.double() - factors.dense()))
    assert residual <= (1 + 1e-6) * float(np.linalg.norm(sigma[7:]))


def test_side_by_side_is_the_concatenation(matrix: Matrix) -> None:
    parts = [matrix("gauss", 24, w, w, torch.bfloat16) for w in (5, 40, 17)]
    together = truncated_svd(torch.cat(parts, dim=1), 6)
    apart = truncated_svd(parts, 6)
    torch.testing.assert_close(apart.dense(), together.dense(), rtol=1e-5, atol=1e-5)


def test_base_is_subtracted(matrix: Matrix) -> None:
    base = matrix("gauss", 20, 31, 0, torch.bfloat16)
    tuned = (base.float() + 0.01 * matrix("gauss", 20, 31, 1, torch.float32)).to(torch.bfloat16)
    delta = tuned.float() - base.float()
    torch.testing.assert_close(truncated_svd(tuned, 4, base=base).dense(), truncated_svd(delta, 4).dense())


def test_krylov_route_at_full_size(matrix: Matrix) -> None:
    """The decision table iterates from order 2048 and rank n / 16; the answer meets the promise against float64."""
    rng = np.random.default_rng(0)
    sigma = torch.from_numpy(np.arange(1, 2049) ** -1.0).float()
    u = torch.linalg.qr(torch.from_numpy(rng.standard_normal((2048, 300))).float())[0]
    v = torch.linalg.qr(torch.from_numpy(rng.standard_normal((2100, 300))).float())[0]
    a = (u * sigma[:300]) @ v.T
    for matrix_ in (a, a.T):
        factors = truncated_svd(matrix_, 8)
        assert factors.certificate.route.startswith("krylov")
        residual = float(torch.linalg.vector_norm(matrix_.double() - factors.dense().double()))
        optimum = float(torch.linalg.vector_norm(sigma[8:300].double())) * (1 + 1e-6)  # a is fp32: sigma up to rounding
        assert residual <= (1 + factors.certificate.excess) * optimum
        identity = torch.eye(8)
        assert float((factors.u.T @ factors.u - identity).abs().max()) <= 1e-5
        assert float((factors.vh @ factors.vh.T - identity).abs().max()) <= 1e-5


def test_same_bits_again_and_signs_are_fixed(matrix: Matrix) -> None:
    a = matrix("power", 33, 50, 9, torch.float32)
    first, second = truncated_svd(a, 5, name="w"), truncated_svd(a.clone(), 5, name="w")
    assert torch.equal(first.u, second.u) and torch.equal(first.s, second.s) and torch.equal(first.vh, second.vh)
    pivots = first.u.gather(0, first.u.abs().argmax(dim=0, keepdim=True))
    assert bool((pivots > 0).all())


def test_balanced_factors(matrix: Matrix) -> None:
    factors = truncated_svd(matrix("power", 20, 30, 2, torch.float32), 4)
    b, a = factors.balanced()
    torch.testing.assert_close(b @ a, factors.dense())
    torch.testing.assert_close(torch.linalg.vector_norm(b, dim=0), torch.linalg.vector_norm(a, dim=1))


def test_rank_policies_choose(matrix: Matrix) -> None:
    a = matrix("power", 30, 60, 4, torch.float32)
    assert truncated_svd(a, ratio(0.2)).rank == 6
    sigma = np.linalg.svd(a.double().numpy(), compute_uv=False)
    expected = int(np.searchsorted(np.cumsum(sigma**2), 0.9 * (sigma**2).sum())) + 1
    assert truncated_svd(a, energy(0.9)).rank == expected


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_one_row_or_column(shape: tuple[int, int]) -> None:
    a = torch.linspace(-1, 2, shape[0] * shape[1]).reshape(shape)
    factors = truncated_svd(a, 1)
    torch.testing.assert_close(factors.dense(), a)
    assert float(factors.s[0]) == pytest.approx(float(torch.linalg.vector_norm(a)), rel=1e-6)


def test_zero_matrix() -> None:
    factors = truncated_svd(torch.zeros(6, 9, dtype=torch.bfloat16), 3)
    assert factors.certificate.holds and factors.certificate.residual == 0.0
    assert torch.equal(factors.s, torch.zeros(3)) and torch.equal(factors.dense(), torch.zeros(6, 9))
    torch.testing.assert_close(factors.u.T @ factors.u, torch.eye(3))
    torch.testing.assert_close(factors.vh @ factors.vh.T, torch.eye(3))


def test_rank_deficient_matrix_keeps_orthonormal_columns() -> None:
    a = torch.outer(torch.arange(1.0, 9.0), torch.arange(1.0, 13.0))
    factors = truncated_svd(a, 4)
    assert float(factors.s[1]) <= 1e-5 * float(factors.s[0])
    torch.testing.assert_close(factors.u.T @ factors.u, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(factors.vh @ factors.vh.T, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3), "expected a matrix"),
        (torch.zeros(2, 3, 4), "expected a matrix"),
        (torch.ones(3, 3, dtype=torch.int32), "cannot decompose"),
        (torch.ones(3, 3, dtype=torch.bool), "cannot decompose"),
        (torch.zeros(0, 3), "empty"),
        ([], "empty"),
        ([torch.ones(3, 3), torch.ones(4, 3)], "rows"),
        ([torch.ones(3, 3), torch.ones(3, 3, device="meta")], "move them to one device"),
    ],
)
def test_bad_matrices(bad: torch.Tensor | list[torch.Tensor], message: str) -> None:
    with pytest.raises(LinalgError, match=message):
        truncated_svd(bad, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite(value: float) -> None:
    a = torch.ones(4, 5)
    a[2, 3] = value
    with pytest.raises(NonFiniteError, match="layer\\.3"):
        truncated_svd(a, 1, name="layer.3")
    with pytest.raises(NonFiniteError):
        joint_left_subspace([torch.ones(4, 5), a], 1)
    with pytest.raises(NonFiniteError):
        polar_factor(a)
    with pytest.raises(NonFiniteError):
        task_gram([a, torch.ones(4, 5)])


@pytest.mark.parametrize("rank", [0, -1, 5, 2.0, True])
def test_bad_rank(rank: int) -> None:
    with pytest.raises(LinalgError, match="rank"):
        truncated_svd(torch.ones(4, 6), rank)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -1.0])
def test_bad_tolerance(tolerance: float) -> None:
    with pytest.raises(LinalgError, match="tolerance"):
        truncated_svd(torch.ones(4, 6), 1, tolerance=tolerance)


def test_inputs_are_not_changed(matrix: Matrix) -> None:
    a = matrix("power", 12, 20, 1, torch.float32)
    copy = a.clone()
    truncated_svd(a, 3)
    joint_left_subspace([a, a], 3)
    polar_factor(a)
    assert torch.equal(a, copy)


def test_core_finish_agrees_with_the_polished_one(matrix: Matrix) -> None:
    rows = matrix("gauss", 6, 40, 1)
    rotation, s, vectors = truncated._core(rows)
    torch.testing.assert_close((rotation * s) @ vectors, rows)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(6, dtype=torch.float64))


def test_rademacher_bits() -> None:
    """Signs, balanced, independent of shape beyond the flat index, keyed by seed, name and purpose."""
    x = rademacher(64, 50, seed=1, name="a")
    assert set(x.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(x.mean())) < 0.06
    assert torch.equal(x.reshape(-1), rademacher(50, 64, seed=1, name="a").reshape(-1))
    assert torch.equal(x[:10], rademacher(10, 50, seed=1, name="a"))
    assert torch.equal(x.to(torch.bfloat16), rademacher(64, 50, seed=1, name="a", dtype=torch.bfloat16))
    for other in ({"seed": 2}, {"name": "b"}, {"purpose": "certificate"}):
        assert not torch.equal(x, rademacher(64, 50, **{"seed": 1, "name": "a", **other}))
    gram = x.T @ x / 64 - torch.eye(50)
    assert float(gram.abs().max()) < 0.6


def test_rademacher_is_philox() -> None:
    """The low halves of numpy's Philox4x64-10 words, least significant bit first."""
    import hashlib

    key = int.from_bytes(hashlib.sha256(b"rademacher\x007\x00w\x00range").digest()[:16], "little")
    words = np.random.Philox(key=key, counter=0).random_raw(4)
    bits = np.concatenate([(words[i] >> np.arange(32, dtype=np.uint64)) & np.uint64(1) for i in range(4)])
    assert rademacher(8, 16, seed=7, name="w").reshape(-1).tolist() == (2.0 * bits - 1.0).tolist()


def test_every_public_function_says_what_it_raises() -> None:
    import mergekit_lr.linalg as room

    for name in room.__all__:
        value = getattr(room, name)
        assert inspect.getdoc(value), name
