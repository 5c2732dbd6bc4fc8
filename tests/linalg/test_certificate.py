"""Certificates are never below the truth, computed by LAPACK (numpy) in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.errors import LinalgError
from mergekit_lr.linalg import Blocks, TruncatedSVD, subspace, truncated_svd
from mergekit_lr.linalg.certificate import (
    PROBES,
    capture_loss,
    coarse_loss,
    coupled_ritz_sum,
    perturbation,
    refined_loss,
)
from mergekit_lr.linalg.gram import probe
from mergekit_lr.linalg.krylov import krylov
from mergekit_lr.linalg.random_signs import rademacher
from mergekit_lr.linalg.subspace import make_request

Matrix = Callable[..., torch.Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def truth(a: torch.Tensor, factors: TruncatedSVD) -> tuple[float, float, float]:
    """Residual of the returned factors, the optimum and the norm, all float64."""
    wide = a.double().numpy()
    sigma = np.linalg.svd(wide, compute_uv=False)
    product = (factors.u.double().numpy() * factors.s.double().numpy()) @ factors.vh.double().numpy()
    return (
        float(np.linalg.norm(wide - product)),
        float(np.linalg.norm(sigma[factors.rank :])),
        float(np.linalg.norm(sigma)),
    )


def check(a: torch.Tensor, factors: TruncatedSVD, promise: float) -> None:
    residual, optimum, norm = truth(a, factors)
    c = factors.certificate
    assert c.holds
    if c.excess <= c.promise:
        # the reference itself is right to a few 1e-16 of the norm
        assert residual <= (1.0 + c.excess) * optimum + 3e-15 * norm, (c, residual, optimum)
        assert c.excess <= promise
    else:
        assert residual <= c.floor * norm, (c, residual, norm)
    identity = torch.eye(factors.rank, dtype=torch.float64)
    for gram in (factors.u.double().T @ factors.u.double(), factors.vh.double() @ factors.vh.double().T):
        assert float((gram - identity).abs().max()) <= 1e-5


@pytest.mark.parametrize("seed", range(8))
def test_never_below_the_truth_in_two_thousand_cases(matrix: Matrix, spectra: tuple[str, ...], seed: int) -> None:
    rng, raised = np.random.default_rng(seed), 0
    for case in range(250):
        kind, dtype = spectra[case % len(spectra)], DTYPES[case // 2 % len(DTYPES)]
        m, n = (int(x) for x in rng.integers(1, 48, 2))
        a = matrix(kind, m, n, seed * 1000 + case, dtype)
        exact = case % 5 == 0
        rank = int(rng.integers(1, min(m, n) + 1))
        try:
            factors = truncated_svd(a, rank, exact=exact, seed=case)
        except LinalgError:  # the other half of exact's promise, allowed only where float64 itself gives out
            sigma = np.linalg.svd(a.double().numpy(), compute_uv=False)
            assert exact and float(np.linalg.norm(sigma[rank:])) < 1e-7 * float(np.linalg.norm(sigma))
            raised += 1
            continue
        check(a, factors, 1e-6 if exact else 1e-3)
    assert raised <= 5


@pytest.mark.parametrize("kind", ["gauss", "flat", "power", "clustered", "tiny tail"])
def test_krylov_bound_is_never_below_the_truth(matrix: Matrix, kind: str) -> None:
    certified = 0
    for case in range(40):
        rng = np.random.default_rng(case)
        n, rank = int(rng.integers(90, 220)), int(rng.integers(1, 5))
        shape = (n, n + 30) if case % 2 else (n + 30, n)
        a = matrix(kind, *shape, case, torch.float32)
        request = make_request(Blocks([a]), rank, tolerance=0.2, seed=case)
        found = krylov(request, rank)
        if found is None:
            continue
        certified += 1
        basis = found.subspace.basis.double().numpy()
        wide = a.double().numpy()
        side = wide if shape[0] <= shape[1] else wide.T
        basis = np.linalg.qr(basis)[0]
        residual = float(np.linalg.norm(side - basis @ (basis.T @ side)))
        sigma = np.linalg.svd(wide, compute_uv=False)
        optimum = float(np.linalg.norm(sigma[rank:]))
        c = found.subspace.certificate
        assert c.holds
        assert residual <= (1 + c.excess) * optimum or residual <= c.floor * float(np.linalg.norm(sigma))
    assert certified >= 10


def random_gram(rng: np.random.Generator, n: int) -> np.ndarray:
    """A positive semidefinite matrix with a spectrum that decays, or does not."""
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    values = np.sort(rng.uniform(0, 1, n) ** rng.integers(1, 6))[::-1]
    return (q * values) @ q.T


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(3, 20), st.data())
def test_capture_loss_bounds_every_basis(seed: int, n: int, data: st.DataObject) -> None:
    """The theorem itself: any orthonormal basis, exact coupling and gaps, no rounding to hide behind."""
    rank = data.draw(st.integers(1, n - 1))
    rng = np.random.default_rng(seed)
    g = random_gram(rng, n)
    noise = 10.0 ** rng.uniform(-6, 1)
    q = np.linalg.qr(np.linalg.eigh(g)[1][:, ::-1] + noise * rng.standard_normal((n, n)))[0]
    t = q.T @ g @ q
    theta = np.linalg.eigvalsh(t[:rank, :rank])[::-1]
    mu = np.linalg.eigvalsh(t[rank:, rank:])[-1]
    loss = capture_loss(torch.from_numpy(theta - mu), float(np.linalg.norm(t[rank:, :rank])))
    truly = np.linalg.eigvalsh(g)[::-1][:rank].sum() - np.trace(t[:rank, :rank])
    assert loss >= truly - 1e-13


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(6, 24), st.data())
def test_coupled_ritz_sum_bounds_and_beats_the_gap_bound(seed: int, n: int, data: st.DataObject) -> None:
    space = data.draw(st.integers(2, n - 1))
    rank = data.draw(st.integers(1, space))
    rng = np.random.default_rng(seed)
    g = random_gram(rng, n)
    start = rng.standard_normal((n, space))
    q = np.linalg.qr(g @ g @ start + 1e-9 * start)[0]
    theta, w = np.linalg.eigh(q.T @ g @ q)
    theta, w = theta[::-1].copy(), w[:, ::-1]
    residual = (g @ q - q @ (q.T @ g @ q)) @ w
    complement = np.eye(n) - q @ q.T
    mu = float(np.linalg.eigvalsh(complement @ g @ complement)[-1])
    bound = coupled_ritz_sum(torch.from_numpy(theta), torch.from_numpy(residual.T @ residual), mu, rank)
    assert bound >= np.linalg.eigvalsh(g)[::-1][:rank].sum() - 1e-12
    if mu < theta[rank - 1]:
        sigma = np.linalg.svd(residual, compute_uv=False)[:rank]
        with_gap = theta[:rank].sum() + (sigma**2).sum() / (theta[rank - 1] - mu)
        assert bound <= with_gap + 1e-6 * theta[0] * rank


def test_water_filling_against_a_grid() -> None:
    """capture_loss is the maximum of sum g(d_i, b_i) over every distribution of the coupling, found by brute force."""
    gaps, coupling = np.array([0.9, 0.4, 0.05]), 0.3
    best = 0.0
    for a in np.linspace(0, 1, 201):
        for b in np.linspace(0, 1 - a, 201):
            squares = coupling**2 * np.array([a, b, max(0.0, 1 - a - b)])
            best = max(best, float((np.sqrt(gaps**2 / 4 + squares) - gaps / 2).sum()))
    loss = capture_loss(torch.from_numpy(gaps), coupling)
    assert best <= loss <= best + 1e-4


def test_measured_perturbation_is_above_the_truth_and_near_it(matrix: Matrix) -> None:
    for seed in range(20):
        a = matrix("power", 40, 90, seed, torch.float32)
        blocks = Blocks([a])
        signs = rademacher(40, PROBES, seed=seed, dtype=torch.float64)
        look = probe(blocks, blocks.small_side, signs)
        exact = a.double() @ a.double().T
        torch.testing.assert_close(look.images, exact @ signs, rtol=1e-12, atol=1e-12)
        assert look.trace == pytest.approx(float(exact.trace()), rel=1e-13)
        values, vectors = torch.linalg.eigh(a @ a.T)
        measured = perturbation(look, values, vectors)
        q = torch.linalg.qr(vectors.double())[0]
        h = float(torch.linalg.vector_norm(exact - q @ torch.diag(values.double()) @ q.T))
        assert h <= measured <= 12 * h


def test_refined_loss_is_above_the_truth_and_below_the_coarse_one(matrix: Matrix) -> None:
    a = matrix("power", 120, 400, 5, torch.float32)
    g = a @ a.T
    values, vectors = (x.flip(-1) for x in torch.linalg.eigh(g))
    exact = a.double() @ a.double().T
    rounding = float(torch.linalg.vector_norm(exact - g.double()))
    for rank in (4, 30, 60, 100):
        loss, kept = refined_loss(g, vectors, rank, rounding)
        q = torch.linalg.qr(vectors[:, :rank].double())[0]
        captured = float((q.T @ exact @ q).trace())
        optimum = float(torch.linalg.eigvalsh(exact).flip(0)[:rank].sum())
        assert loss >= optimum - captured
        assert kept == pytest.approx(captured, abs=rank**0.5 * rounding + 1e-9)
        q_all = torch.linalg.qr(vectors.double())[0]
        h = float(torch.linalg.vector_norm(exact - q_all @ torch.diag(values.double()) @ q_all.T))
        assert loss <= 3 * coarse_loss(values.double(), rank, 3 * h)


@pytest.mark.parametrize("fault", ["rotated", "swapped", "scaled"])
def test_a_wrong_eigensolver_is_found_out(matrix: Matrix, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Solvers have returned garbage without an error: the certificate must fail, and the call must still be right."""
    right = subspace.symmetric_eigh

    def wrong(g: torch.Tensor, **kwargs: str) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = right(g, **kwargs)
        if fault == "rotated":
            vectors = torch.linalg.qr(vectors + 0.1 * torch.ones_like(vectors))[0]
        elif fault == "swapped":
            vectors = vectors.roll(5, dims=-1)
        else:
            vectors = vectors * 1.01
        return values, vectors

    monkeypatch.setattr(subspace, "symmetric_eigh", wrong)
    a = matrix("power", 30, 50, 3, torch.float32)
    factors = truncated_svd(a, 6)
    assert factors.certificate.route == "full fp64"
    check(a, factors, 1e-3)


def test_escalation_follows_the_tail(matrix: Matrix) -> None:
    """fp32 Grams resolve tails down to about 1e-2, fp64 Grams to 1e-5; the route says which one answered."""
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.standard_normal((60, 60)))[0]
    v = np.linalg.qr(rng.standard_normal((200, 60)))[0]
    routes = []
    for tail in (0.3, 1e-4, 0.0):
        sigma = np.where(np.arange(60) < 8, 1.0, tail)
        a = torch.from_numpy((u * sigma) @ v.T).float()
        factors = truncated_svd(a, 8)
        check(a, factors, 1e-3)
        routes.append(factors.certificate.route)
    assert routes[0] == "gram fp32"
    assert routes[1] == "gram fp64"


def test_an_exact_promise_that_nothing_can_keep_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail of 1e-11 of the norm cannot be certified to 1e-6 in float64."""
    rng = np.random.default_rng(1)
    u = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    v = np.linalg.qr(rng.standard_normal((40, 30)))[0]
    a = torch.from_numpy((u * np.where(np.arange(30) < 5, 1.0, 1e-11)) @ v.T)
    with pytest.raises(LinalgError, match="no solver certifies"):
        truncated_svd(a, 5, exact=True)


def test_infinite_excess_has_a_residual(matrix: Matrix) -> None:
    a = matrix("low rank", 12, 9, 0, torch.float32)
    factors = truncated_svd(a, 9)
    assert factors.certificate.excess == math.inf
    assert factors.certificate.residual <= 7.1e-6 * factors.certificate.norm
