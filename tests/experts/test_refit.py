"""Least-squares refits against numpy's lstsq in float64, and the guard."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mergekit_lr.experts import design
from mergekit_lr.experts.bank import ExpertBank, Routing, layer_output
from mergekit_lr.experts.design import Tokens, joint_normal, own_refit, refit
from mergekit_lr.experts.refit import Normal, guarded_fit, scarcity, solve

E, WIDTH, H, TOKENS = 4, 5, 6, 800


def a_layer(seed: int = 0, experts: int = E) -> tuple[ExpertBank, torch.Tensor, Routing]:
    g = torch.Generator().manual_seed(seed)
    gate, up, down = (
        torch.randn(s, generator=g) for s in ((experts, WIDTH, H), (experts, WIDTH, H), (experts, H, WIDTH))
    )
    inputs = torch.randn(TOKENS, H, generator=g)
    logits = torch.randn(TOKENS, experts, generator=g)
    weights, indices = torch.softmax(logits, -1).topk(2)
    return ExpertBank(gate, up, down), inputs, Routing(indices, weights / weights.sum(-1, keepdim=True))


def dense_features(bank: ExpertBank, inputs: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The design matrix token by token, float64."""
    out = torch.zeros(len(inputs), bank.experts * bank.width, dtype=torch.float64)
    for t, (chosen, gates) in enumerate(zip(routing.indices.tolist(), routing.weights.tolist(), strict=True)):
        for e, g in zip(chosen, gates, strict=True):
            x = inputs[t].double()
            a = bank.gate[e].double() @ x
            h = a / (1 + torch.exp(-a)) * (bank.up[e].double() @ x)
            out[t, e * bank.width : (e + 1) * bank.width] += g * h
    return out


def held_half() -> torch.Tensor:
    return torch.arange(TOKENS) % 2 == 1


def test_the_normal_equations_are_those_of_the_dense_features() -> None:
    bank, inputs, routing = a_layer()
    target = layer_output(bank, inputs, routing)
    phi = dense_features(bank, inputs, routing)
    found = joint_normal(bank, inputs, routing, target)
    torch.testing.assert_close(found.gram, phi.T @ phi, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.cross, phi.T @ target.double(), rtol=1e-5, atol=1e-4)
    start = bank.down.transpose(1, 2).reshape(-1, H).double()
    assert found.error(start) < 1e-6 * found.power


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
def test_a_solution_is_that_of_lstsq_with_the_ridge_as_rows(ridge: float) -> None:
    g = torch.Generator().manual_seed(1)
    phi, y, start = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((50, 7), (50, 3), (7, 3)))
    normal = Normal.of(phi, y)
    damping = ridge * float(normal.gram.diagonal().mean())
    rows = np.concatenate([phi.numpy(), damping**0.5 * np.eye(7)])
    right = np.concatenate([y.numpy(), damping**0.5 * start.numpy()])
    wanted = np.linalg.lstsq(rows, right, rcond=None)[0]
    torch.testing.assert_close(solve(normal, start, ridge), torch.from_numpy(wanted), rtol=1e-9, atol=1e-9)


def test_a_joint_refit_reaches_the_least_squares_error() -> None:
    bank, inputs, routing = a_layer()
    target = layer_output(bank, inputs, routing)
    narrow = bank.keep_neurons(torch.arange(3).expand(E, 3))
    tokens = Tokens(inputs, target, held_half())
    fitted, notes = refit(narrow, routing, tokens, "joint")
    assert notes["accepted"]
    phi = dense_features(narrow, inputs, routing).numpy()
    best = np.linalg.lstsq(phi, target.double().numpy(), rcond=None)[0]
    least = np.square(phi @ best - target.double().numpy()).sum()
    mine = float((layer_output(fitted, inputs, routing) - target).double().square().sum())
    before = float((layer_output(narrow, inputs, routing) - target).double().square().sum())
    # The ridge of the guard, 1e-3 at the least, is what keeps it from the very least.
    assert least <= mine * (1 + 1e-9) and mine - least < 0.1 * (before - least)


def test_blocks_converge_to_the_joint_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(design, "SWEEPS", 25)
    bank, inputs, routing = a_layer(seed=2)
    target = layer_output(bank, inputs, routing)
    narrow = bank.keep_neurons(torch.arange(3).expand(E, 3))
    tokens = Tokens(inputs, target, held_half())
    joint, _ = refit(narrow, routing, tokens, "joint")
    blocks, notes = refit(narrow, routing, tokens, "blocks")
    assert notes["refit"] == "blocks" and notes["held_out_after"] < notes["held_out_before"]
    errors = [float((layer_output(b, inputs, routing) - target).double().square().sum()) for b in (joint, blocks)]
    assert errors[1] < 1.02 * errors[0]


def test_an_own_refit_solves_each_expert_by_itself() -> None:
    bank, inputs, routing = a_layer(seed=4)
    narrow = bank.keep_neurons(torch.arange(4).expand(E, 4))
    target = layer_output(bank, inputs, routing)
    fitted, notes = own_refit(narrow, bank, list(range(E)), routing, Tokens(inputs, target, held_half()))
    changed = [e for e in range(E) if not torch.equal(fitted.down[e], narrow.down[e])]
    assert len(changed) == notes["accepted"] >= 2
    for e in changed:
        rows, gates = routing.of(e)
        phi = (gates[:, None] * narrow.hidden(e, inputs[rows])).double()
        y = (gates[:, None] * bank.output(e, inputs[rows])).double()
        best = np.linalg.lstsq(phi.numpy(), y.numpy(), rcond=None)[0]
        least = np.square(phi.numpy() @ best - y.numpy()).sum()
        mine, before = (float((phi @ w[e].double().T - y).square().sum()) for w in (fitted.down, narrow.down))
        assert least <= mine * (1 + 1e-9) < before


def test_the_guard_keeps_the_weight_where_a_fit_would_harm() -> None:
    g = torch.Generator().manual_seed(5)
    truth = torch.randn(30, 4, generator=g, dtype=torch.float64)
    fit_phi, held_phi = torch.randn(31, 30, generator=g), torch.randn(500, 30, generator=g)
    noisy = fit_phi.double() @ truth + 20 * torch.randn(31, 4, generator=g)
    fit, held = Normal.of(fit_phi, noisy), Normal.of(held_phi, held_phi.double() @ truth)
    found = guarded_fit(fit, held, truth)
    assert not found.accepted and found.ridge is None
    assert torch.equal(found.weights, truth)
    # Unguarded, the same fit is a disaster: the guard is what holds it back.
    assert held.error(solve(fit, truth, 1e-3)) > 0.5 * held.power


def test_the_guard_accepts_what_helps() -> None:
    g = torch.Generator().manual_seed(6)
    truth, phi = torch.randn(5, 3, generator=g, dtype=torch.float64), torch.randn(400, 5, generator=g)
    y = phi.double() @ truth
    found = guarded_fit(Normal.of(phi[::2], y[::2]), Normal.of(phi[1::2], y[1::2]), torch.zeros(5, 3))
    assert found.accepted and found.after < 1e-4 < found.before
    torch.testing.assert_close(found.weights, truth, rtol=0.01, atol=0.01)


def test_few_tokens_mean_more_ridge() -> None:
    assert scarcity(2000, 100) == 1.0
    assert scarcity(500, 100) == 4.0
    assert scarcity(0, 3) == 60.0


def test_experts_that_no_token_reached_stay() -> None:
    bank, inputs, routing = a_layer(seed=7)
    never = Routing(routing.indices.clamp_max(E - 2), routing.weights)
    narrow = bank.keep_neurons(torch.arange(3).expand(E, 3))
    target = layer_output(bank, inputs, never)
    for kind in ("joint", "blocks"):
        fitted, _ = refit(narrow, never, Tokens(inputs, target, held_half()), kind)
        torch.testing.assert_close(fitted.down[E - 1], narrow.down[E - 1], rtol=1e-6, atol=1e-6)


def test_biases_of_down_are_left_alone_and_taken_off_the_target() -> None:
    bank, inputs, routing = a_layer(seed=8)
    bank = replace(bank, down_bias=torch.randn(E, H, generator=torch.Generator().manual_seed(1)))
    target = layer_output(bank, inputs, routing)
    for kind in ("joint", "blocks"):
        fitted, _ = refit(bank, routing, Tokens(inputs, target, held_half()), kind)
        assert fitted.down_bias is bank.down_bias
        torch.testing.assert_close(fitted.down, bank.down, rtol=1e-3, atol=1e-3)
