"""The position-wise problem against worked examples, a full SVD, and brute identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.errors import NonFiniteError
from mergekit_lr.lowrank.positions import count, most, pack, spectrum, unpack


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def restored(x: torch.Tensor, p: int, group: int = 1) -> torch.Tensor:
    packed = pack(x, p, group)
    return torch.stack([unpack(packed, t) for t in range(x.shape[0])])


def reference(x: torch.Tensor, p: int, group: int) -> torch.Tensor:
    """Group by group with numpy's SVD of the centred matrix."""
    out = np.empty(tuple(x.shape))
    for start in range(0, x.shape[1], group):
        block = x[:, start : start + group].numpy()
        flat = block.reshape(len(block), -1)
        mean = flat.mean(0)
        u, s, vh = np.linalg.svd(flat - mean, full_matrices=False)
        out[:, start : start + group] = (mean + (u[:, :p] * s[:p]) @ vh[:p]).reshape(block.shape)
    return torch.from_numpy(out)


def test_three_points_on_a_line() -> None:
    """(1, 2) + c (.6, .8) for c = -5, 0, 5: one direction is exact, with the coefficients read off by hand."""
    x = torch.tensor([[[-2.0, -2.0]], [[1.0, 2.0]], [[4.0, 6.0]]], dtype=torch.float64)
    packed = pack(x, 1)
    assert packed.mean.tolist() == [[1.0, 2.0]]
    sign = packed.basis[0, 0, 0].sign()
    torch.testing.assert_close(packed.basis[0, 0] * sign, torch.tensor([0.6, 0.8], dtype=torch.float64))
    torch.testing.assert_close(
        packed.coef[0, :, 0] * sign, torch.tensor([-5.0, 0.0, 5.0], dtype=torch.float64), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(restored(x, 1), x)
    assert spectrum(x) == (pytest.approx(torch.tensor([50.0, 0.0])), 65.0)


@pytest.mark.parametrize("group", [1, 3, 4, 10])
@pytest.mark.parametrize("tasks,r", [(2, 4), (4, 4), (7, 3), (5, 8)])
def test_it_is_the_truncated_svd_of_each_group(tasks: int, r: int, group: int) -> None:
    x = normal(tasks, 10, r, seed=tasks * r)
    for p in range(most(r, tasks, group) + 1):
        torch.testing.assert_close(restored(x, p, group), reference(x, p, group), atol=1e-9, rtol=0)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 6), st.integers(1, 9), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_error_is_the_tail_of_the_spectrum_and_ends_at_zero(tasks, positions, r, group, seed) -> None:
    x = normal(tasks, positions, r, seed=seed) * 10 ** float(seed % 7 - 3)
    tail, energy = spectrum(x, group)
    assert energy == pytest.approx(float(x.square().sum()))
    assert tail.numel() == most(r, tasks, min(group, positions))
    for p in range(tail.numel() + 1):
        error = float((restored(x, p, group) - x).square().sum())
        assert error == pytest.approx(float(tail[p:].sum()), abs=1e-12 * energy)
    assert error <= 1e-14 * energy


def test_numbers_stored_are_those_of_the_formula() -> None:
    """r = 16, n = 8: p = 1, 2, 3 store .3125, .5, .6875 of the adapters; whole tensors tend to (p + 1) / n."""
    for p, share in ((1, 0.3125), (2, 0.5), (3, 0.6875)):
        assert count(4096, 16, 8, p, 1) / (4096 * 16 * 8) == share
        assert pack(normal(8, 6, 16), p).numbers == count(6, 16, 8, p, 1)
    assert count(4096, 16, 8, 1, 4096) / (4096 * 16 * 8) == pytest.approx(2 / 8, rel=1e-4)
    assert pack(normal(3, 7, 2), 1, 3).numbers == 7 * 2 * 2 + 3 * 3  # groups of 3, 3 and 1 positions


def test_every_direction_is_reported_not_only_those_of_some_positions() -> None:
    """With n > r a position has r directions; the spectrum has min(group r, n - 1) of them."""
    assert most(2, 5, 1) == 2 and most(2, 5, 2) == 4 and most(2, 5, 100) == 4 and most(8, 5, 1) == 4


def test_equal_tasks_and_zero_tasks_divide_by_nothing() -> None:
    same = normal(1, 5, 3).expand(4, 5, 3)
    packed = pack(same, 2)
    assert torch.equal(packed.basis, torch.zeros_like(packed.basis))
    assert torch.equal(packed.coef, torch.zeros_like(packed.coef))
    torch.testing.assert_close(unpack(packed, 3), same[3])
    assert torch.equal(restored(torch.zeros(3, 5, 2), 2), torch.zeros(3, 5, 2).double())
    tail, energy = spectrum(torch.zeros(3, 5, 2))
    assert energy == 0.0 and not tail.any()


def test_one_task_is_its_own_mean() -> None:
    x = normal(1, 4, 3)
    assert torch.equal(restored(x, 0), x) and most(3, 1, 1) == 0


def test_small_directions_survive_a_large_mean() -> None:
    """Directions 1e-6 of the mean: an fp32 Gram would return noise for them."""
    x = 1.0 + 1e-6 * normal(4, 20, 8)
    error = (restored(x, 3) - x).abs().max()
    assert error < 1e-12


def test_shifts_and_rotations_of_the_tasks_go_through() -> None:
    """Adding one vector to all tasks moves the mean only; an orthogonal change of coordinates rotates the result."""
    x = normal(5, 6, 4)
    shift = normal(6, 4, seed=1)
    torch.testing.assert_close(restored(x + shift, 2), restored(x, 2) + shift, atol=1e-9, rtol=0)
    q = torch.linalg.qr(normal(4, 4, seed=2))[0]
    torch.testing.assert_close(restored(x @ q, 2), restored(x, 2) @ q, atol=1e-9, rtol=0)
    order = [3, 0, 4, 1, 2]
    torch.testing.assert_close(restored(x[order], 2), restored(x, 2)[order], atol=1e-9, rtol=0)


def test_cutting_positions_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_lr.lowrank import positions

    x = normal(4, 23, 3)
    whole = [pack(x, 2, g) for g in (1, 5)]
    monkeypatch.setattr(positions, "CHUNK", 60)
    for before, g in zip(whole, (1, 5), strict=True):
        after = pack(x, 2, g)
        torch.testing.assert_close(unpack(after, 1), unpack(before, 1), atol=1e-12, rtol=0)


def test_no_nan_gets_in() -> None:
    x = normal(3, 4, 2)
    x[1, 2, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        pack(x, 1)


@pytest.mark.parametrize("shared", [False, True])
def test_whole_tensors_win_where_tasks_share_structure(shared: bool) -> None:
    """The spec's measurement (n = 8, r = 16, 256 positions): unrelated tasks favour positions, shared ones tensors."""
    if shared:
        x = torch.einsum("tk,kpr->tpr", normal(8, 2, seed=3), normal(2, 256, 16, seed=4)) + 0.01 * normal(8, 256, 16)
    else:
        x = normal(8, 256, 16)

    def left(p: int, group: int) -> float:
        tail, energy = spectrum(x, group)
        return float(tail[p:].sum()) / energy

    cost = {(p, g): count(256, 16, 8, p, g) / x.numel() for p, g in ((1, 1), (2, 1), (3, 256), (2, 256))}
    assert cost[2, 256] < cost[2, 1] == 0.5
    if shared:
        assert left(2, 256) < 0.001 and left(2, 1) < 0.001
    else:
        assert left(1, 1) == pytest.approx(0.6, abs=0.02) and left(2, 1) == pytest.approx(0.4, abs=0.02)
        assert left(3, 256) == pytest.approx(0.49, abs=0.02) and left(3, 256) > left(2, 1)
