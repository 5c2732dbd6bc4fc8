"""Merges of experts against float64 formulas, and against what the merged expert computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.experts.merging import aligned, aligned_mean, least_squares_down, rank_of, shares, union_merge
from mergekit_lr.experts.quantised import decode_fp8, decode_mxfp4, encode_fp8
from mergekit_lr.experts.storage import MATRICES, Expert, weighted_mean

F64 = torch.float64


def experts(count: int, seed: int = 0, *, width: int = 5, hidden: int = 7, biases: bool = False) -> list[Expert]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    def one() -> Expert:
        own = Expert(draw(width, hidden), draw(width, hidden), draw(hidden, width))
        if not biases:
            return own
        return Expert(own.gate, own.up, own.down, draw(width), draw(width), draw(hidden))

    return [one() for _ in range(count)]


def function(e: Expert, x: torch.Tensor) -> torch.Tensor:
    gate, up = x @ e.gate.T, x @ e.up.T
    if e.gate_bias is not None:
        gate, up = gate + e.gate_bias, up + e.up_bias
    out = (torch.nn.functional.silu(gate) * up) @ e.down.T
    return out if e.down_bias is None else out + e.down_bias


@given(seed=st.integers(0, 100), count=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_full_rank_union_is_the_weighted_mean_and_so_is_the_papers_route(seed: int, count: int) -> None:
    """U S (sum f V_i)^T, computed by an SVD of the concatenation, equals sum f W_i: what the docs state."""
    own, weights = experts(count, seed), [1.0 + i for i in range(count)]
    f = shares(weights)
    merged = union_merge(own, weights, "full")
    for m in MATRICES:
        w = [getattr(e, m) for e in own]
        u, s, vh = torch.linalg.svd(torch.cat(w, dim=1), full_matrices=False)
        blocks = torch.split(vh, w[0].shape[1], dim=1)
        paper = u @ torch.diag(s) @ sum(fi * b for fi, b in zip(f, blocks, strict=True))
        mean = sum(fi * wi for fi, wi in zip(f, w, strict=True))
        torch.testing.assert_close(paper, mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(getattr(merged, m), mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 0.5])
def test_truncated_union_projects_the_mean(rank: int | float) -> None:
    own, weights = experts(3, 1), [5.0, 1.0, 2.0]
    merged = union_merge(own, weights, rank)
    for m in MATRICES:
        w = [getattr(e, m) for e in own]
        u = torch.linalg.svd(torch.cat(w, dim=1), full_matrices=False)[0]
        r = rank if isinstance(rank, int) else round(rank * min(w[0].shape[0], 3 * w[0].shape[1]))
        mean = sum(f * x for f, x in zip(shares(weights), w, strict=True))
        torch.testing.assert_close(getattr(merged, m), u[:, :r] @ u[:, :r].T @ mean, rtol=1e-8, atol=1e-9)


def test_whitening_changes_only_the_subspace() -> None:
    own, weights, r = experts(2, 2), [1.0, 3.0], 2
    inputs = [{m: torch.randn(40, getattr(e, m).shape[1], dtype=F64) for m in MATRICES} for e in own]
    grams = [{m: x.T @ x for m, x in found.items()} for found in inputs]
    merged = union_merge(own, weights, r, grams)
    for m in MATRICES:
        w = [getattr(e, m) for e in own]
        roots = [torch.linalg.cholesky(g[m]) for g in grams]  # the paper's S_i
        u = torch.linalg.svd(torch.cat([x @ s for x, s in zip(w, roots, strict=True)], dim=1))[0][:, :r]
        mean = sum(f * x for f, x in zip(shares(weights), w, strict=True))
        torch.testing.assert_close(getattr(merged, m), u @ u.T @ mean, rtol=1e-6, atol=1e-7)


def test_identical_experts_merge_to_themselves_at_any_rank_that_holds_them() -> None:
    [one] = experts(1, 3)
    for merged in (weighted_mean([one] * 3, [1, 2, 3]), union_merge([one] * 3, [1, 2, 3], 5)):
        for m in MATRICES:
            torch.testing.assert_close(getattr(merged, m), getattr(one, m), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("biases", [False, True])
def test_alignment_undoes_a_permutation(biases: bool) -> None:
    [one] = experts(1, 4, width=12, biases=biases)
    shuffled = one.neurons(torch.randperm(12))
    x = torch.randn(6, 7, dtype=F64)
    torch.testing.assert_close(function(shuffled, x), function(one, x))
    back = aligned(one, shuffled)
    for a, b in zip(back.tensors(), one.tensors(), strict=True):
        assert torch.equal(a, b)
    mean = aligned_mean([shuffled, one], [1.0, 1.0], centre=1)
    torch.testing.assert_close(function(mean, x), function(one, x))
    plain = weighted_mean([shuffled, one], [0.5, 0.5])
    assert (function(plain, x) - function(one, x)).abs().max() > 0.1


def test_least_squares_is_the_least_squares_solution() -> None:
    p, t = torch.randn(60, 5, dtype=F64), torch.randn(60, 7, dtype=F64)
    want = torch.linalg.lstsq(p, t).solution.T
    torch.testing.assert_close(least_squares_down(p.T @ p, t.T @ p, 0.0), want, rtol=1e-9, atol=1e-9)
    old = torch.randn(7, 5, dtype=F64)
    torch.testing.assert_close(least_squares_down(p.T @ p, t.T @ p, 1e9, old), old, rtol=1e-5, atol=1e-5)
    lam = 0.3 * float((p.T @ p).diagonal().mean())
    stacked = torch.linalg.lstsq(
        torch.cat([p, lam**0.5 * torch.eye(5, dtype=F64)]), torch.cat([t, lam**0.5 * old.T])
    ).solution.T
    torch.testing.assert_close(least_squares_down(p.T @ p, t.T @ p, 0.3, old), stacked, rtol=1e-8, atol=1e-9)


def test_shares_and_ranks() -> None:
    assert shares([1, 3]) == [0.25, 0.75]
    assert shares([0, 0]) == [0.5, 0.5]
    assert rank_of("full", 10, 40) is None
    assert rank_of(10, 10, 40) is None
    assert rank_of(1.0, 10, 40) is None
    assert rank_of(0.5, 10, 40) == 5
    assert rank_of(3, 10, 40) == 3


def test_fp8_round_trip_and_block_edges() -> None:
    w = torch.randn(130, 260) * torch.logspace(-3, 3, 260)
    values, scales = encode_fp8(w)
    assert scales.shape == (2, 3)
    back = decode_fp8(values, scales)
    largest = torch.nn.functional.pad(w, (0, 124, 0, 126)).view(2, 128, 3, 128).abs().amax((1, 3))
    bound = largest.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :260]
    assert ((back - w).abs() <= torch.maximum(w.abs() * 2**-4, bound * 2**-18)).all()
    again = encode_fp8(back)
    assert torch.equal(decode_fp8(*again), back)
    assert torch.equal(decode_fp8(*encode_fp8(torch.zeros(3, 3))), torch.zeros(3, 3))


def test_mxfp4_is_what_transformers_decodes() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    g = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 2, 16), generator=g, dtype=torch.uint8)
    scales = torch.randint(120, 131, (2, 6, 2), generator=g, dtype=torch.uint8)
    want = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.float32)
    got = torch.stack([decode_mxfp4(b, s).T for b, s in zip(blocks, scales, strict=True)])
    assert torch.equal(got, want)
