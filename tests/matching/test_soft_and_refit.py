"""Optimal transport, PLeaS, BatchNorm repair and the diagnostic, each against what can be worked out."""

from __future__ import annotations

import copy
import sys
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import cnn, shapes_of
from torch import nn

from mergekit_lr.arch.spec import spec_for
from mergekit_lr.errors import CheckpointError, UsageError
from mergekit_lr.linalg.exact import singular_values
from mergekit_lr.matching.activations import record, with_activations
from mergekit_lr.matching.ascent import match_weights
from mergekit_lr.matching.batch_norm import repair, reset
from mergekit_lr.matching.diagnose import top_agreement, weighted_agreement
from mergekit_lr.matching.many import match_many, mean_model
from mergekit_lr.matching.member import apply_all, random_member
from mergekit_lr.matching.pleas import pleas, split
from mergekit_lr.matching.soft import soft_apply, soft_match, transport


def perceptron(widths: tuple[int, ...] = (6, 8, 7, 3), seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [nn.Linear(a, b)] + ([nn.ReLU()] if i < len(widths) - 2 else [])
    return nn.Sequential(*layers).double()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def spec_of(model: nn.Module):  # type: ignore[no-untyped-def]
    return spec_for("auto", shapes_of(state(model)), None, "net")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.sampled_from([(4, 4), (2, 4), (4, 6), (3, 5)]))
def test_an_exact_plan_is_the_linear_programme_of_scipy(seed: int, shape: tuple[int, int]) -> None:
    from scipy.optimize import linprog

    n, m = shape
    gain = torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plan = transport(gain)
    assert torch.allclose(plan.sum(1), torch.full((n,), 1 / n, dtype=torch.float64))
    assert torch.allclose(plan.sum(0), torch.full((m,), 1 / m, dtype=torch.float64))
    rows = [np.kron(np.eye(n)[i], np.ones(m)) for i in range(n)] + [np.kron(np.ones(n), np.eye(m)[j]) for j in range(m)]
    best = linprog(-gain.numpy().ravel(), A_eq=np.stack(rows), b_eq=[1 / n] * n + [1 / m] * m)
    assert float((plan * gain).sum()) == pytest.approx(-best.fun, abs=1e-9)


def test_a_soft_plan_has_its_marginals_and_hardens_to_the_exact_one() -> None:
    gain = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    soft = transport(gain, 0.5)
    assert (soft.sum(1) - 1 / 5).abs().max() < 1e-9
    assert (soft.sum(0) - 1 / 8).abs().max() < 1e-12
    assert float((transport(gain, 0.01, 5000) - transport(gain)).abs().max()) < 1e-3
    with pytest.raises(UsageError, match="regularization"):
        transport(gain, -1.0)


def test_what_needs_pot_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(UsageError, match=r"pip install 'mergekit-lr\[ot\]'"):
        transport(torch.zeros(97, 101))


def test_a_network_with_every_neuron_twice_is_brought_to_half_its_width_exactly() -> None:
    small = perceptron()
    a, spec = state(small), spec_of(small)
    double = {}
    for name, t in a.items():
        rows = t if name.startswith("4.") else t.repeat_interleave(2, 0)
        reads = t.ndim > 1 and not name.startswith("0.")
        double[name] = rows.repeat_interleave(2, 1) / 2 if reads else rows
    mixed = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    double["2.weight"], double["2.bias"] = double["2.weight"][mixed], double["2.bias"][mixed]
    double["4.weight"] = double["4.weight"][:, mixed]
    wide_spec = spec_for("auto", shapes_of(double), None, "wide")
    plans = soft_match(spec, wide_spec, a, double)
    for name, t in double.items():
        assert (soft_apply(spec, plans, name, t) - a[name]).abs().max() < 1e-12, name


def test_other_depths_are_refused_by_transport_too() -> None:
    a, b = perceptron(), perceptron((6, 8, 3))
    with pytest.raises(CheckpointError, match="depths differ"):
        soft_match(spec_of(a), spec_of(b), state(a), state(b))


def test_pleas_of_a_network_and_its_permuted_self_is_that_network() -> None:
    a = perceptron()
    spec, b = spec_of(a), perceptron(seed=1)
    planted = apply_all(spec, random_member(spec, 3), state(a))
    found = match_weights(spec, state(a).__getitem__, planted.__getitem__, restarts=3)
    b.load_state_dict(apply_all(spec, found.member, planted))
    x = torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    merged = pleas(spec, a, b, [x])
    assert max(float((merged[n] - t).abs().max()) for n, t in state(a).items()) < 1e-9


@pytest.mark.parametrize("budget", [1.0, 1.5, 2.0])
def test_pleas_layers_solve_their_least_squares(budget: float) -> None:
    """Without ridge the gradient of every layer's squared error vanishes; checked on the first layer by lstsq."""
    a, b = perceptron(), perceptron(seed=1)
    spec = spec_of(a)
    x = torch.randn(300, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    budgets = dict.fromkeys(spec.groups, budget) if budget > 1 else {}
    merged = pleas(spec, a, b, [x[:100], x[100:]], budgets=budgets, ridge=0.0)
    s = split(spec, "hidden.0", state(a), state(b), budget)
    assert s.width == round(budget * 8) == merged["0.weight"].shape[0] == merged["2.weight"].shape[1]
    y_a, y_b = a[0](x).detach(), b[0](x).detach()
    target = torch.cat([(y_a[:, s.merged] + y_b[:, s.merged]) / 2, y_a[:, s.kept], y_b[:, s.kept]], 1)
    ones = torch.cat([x, torch.ones(300, 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(ones, target).solution.T
    assert torch.allclose(merged["0.weight"], best[:, :6], atol=1e-9)
    assert torch.allclose(merged["0.bias"], best[:, 6], atol=1e-9)


def test_a_budget_of_two_keeps_both_networks() -> None:
    """With all neurons of both, the widened network computes the mean of the two outputs exactly."""
    a, b = perceptron((6, 8, 3)), perceptron((6, 8, 3), seed=1)
    spec = spec_of(a)
    x = torch.randn(100, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    merged = pleas(spec, a, b, [x], budgets={"hidden.0": 2.0}, ridge=1e-9)
    wide = perceptron((6, 16, 3))
    wide.load_state_dict(merged)
    assert (wide(x) - (a(x) + b(x)) / 2).abs().max() < 1e-5
    with pytest.raises(UsageError, match="budget"):
        pleas(spec, a, b, [x], budgets={"hidden.0": 2.5})


def test_activations_alone_find_a_planted_member() -> None:
    a = perceptron()
    spec, b = spec_of(a), perceptron(seed=1)
    planted = random_member(spec, 3)
    b.load_state_dict(apply_all(spec, planted, state(a)))
    x = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = record(a, spec, [x]), record(b, spec, [x])
    for cost in ("activations", "both"):
        used = with_activations(spec, (state(a).__getitem__, state(b).__getitem__), seen, cost)  # type: ignore[arg-type]
        found = match_weights(*used)
        back = apply_all(spec, found.member, state(b))
        alive = seen[0]["2.weight"].std(0) > 0
        assert torch.equal(back["0.weight"][alive], state(a)["0.weight"][alive]), cost


def test_three_permuted_copies_meet_in_one_model() -> None:
    a = perceptron()
    spec = spec_of(a)
    copies = [state(a), *(apply_all(spec, random_member(spec, s), state(a)) for s in (1, 2))]
    found = match_many(spec, [c.__getitem__ for c in copies])
    assert found.members[0].moved() == {}
    mean = mean_model(spec, copies, list(found.members))
    assert max(float((mean[n] - t).abs().max()) for n, t in copies[0].items()) < 1e-15


def test_reset_statistics_are_those_of_the_data() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5)).double().eval()
    with torch.no_grad():
        model[1].running_mean.fill_(7.0)
    x = torch.randn(8, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert reset(model, [x]) == 1
    y = model[0](x).detach()
    assert torch.allclose(model[1].running_mean, y.mean((0, 2, 3)))
    assert torch.allclose(model[1].running_var, y.var((0, 2, 3)))
    assert not model[1].training
    assert model[1].momentum == 0.1
    with pytest.raises(UsageError, match="no data"):
        reset(model, [])


def test_repair_gives_every_unit_the_mean_moments_of_the_two() -> None:
    a, b = perceptron(), perceptron(seed=1)
    merged = copy.deepcopy(a)
    merged.load_state_dict({n: (t + state(b)[n]) / 2 for n, t in state(a).items()})
    x = torch.randn(500, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert repair(merged, a, b, [x]) == 2

    def hidden(model: nn.Sequential, depth: int) -> torch.Tensor:
        return model[:depth](x).detach()

    for depth in (1, 3):
        want = [
            (f(hidden(a, depth)) + f(hidden(b, depth))) / 2 for f in (lambda h: h.mean(0), lambda h: h.std(0, False))
        ]
        got = hidden(merged, depth)
        assert torch.allclose(got.mean(0), want[0], atol=1e-9)
        alive = got.std(0, False) > 0
        assert torch.allclose(got.std(0, False)[alive], want[1][alive], atol=1e-9)


def test_batch_norm_statistics_move_with_their_channels() -> None:
    example = cnn()
    spec = spec_for("auto", shapes_of(example.tensors), None, "cnn")
    member = random_member(spec, 1)
    moved = apply_all(spec, member, example.tensors)
    p = member.permutations["hidden.0"]
    assert torch.equal(moved["1.running_var"], example.tensors["1.running_var"][p])
    assert torch.equal(moved["1.num_batches_tracked"], example.tensors["1.num_batches_tracked"])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.integers(2, 7), st.integers(2, 7))
def test_the_diagnostic_keeps_its_identities(seed: int, n: int, m: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, m, generator=g, dtype=torch.float64) for _ in range(2))
    p, q = torch.randperm(n, generator=g), torch.randperm(m, generator=g)
    moved = b[p][:, q]
    s, t = singular_values(a), singular_values(moved)
    assert torch.allclose(t, singular_values(b))  # permutations leave singular values alone
    u, _, v = (x for x in torch.linalg.svd(a, full_matrices=False))
    x, _, y = (z for z in torch.linalg.svd(moved, full_matrices=False))
    trace = (s[:, None] * t * (u.T @ x) * (v @ y.T)).sum()
    inner = float((a * moved).sum())
    assert float(trace) == pytest.approx(inner, abs=1e-9)  # trace identity
    assert abs(inner) <= float((s * t).sum()) + 1e-9  # von Neumann
    assert weighted_agreement(a, moved) == pytest.approx(inner / float((s * t).sum()), abs=1e-12)
    assert weighted_agreement(a, 3 * a) == pytest.approx(1.0)
    assert top_agreement(a, a) == pytest.approx(1.0)
    assert -1 - 1e-9 <= top_agreement(a, moved) <= 1 + 1e-9


def test_matching_never_ends_below_the_best_single_layer() -> None:
    """On one hidden layer the assignment is the best of all permutations, by brute force."""
    a, b = perceptron((3, 4, 2)), perceptron((3, 4, 2), seed=1)
    spec = spec_of(a)
    found = match_weights(spec, state(a).__getitem__, state(b).__getitem__)

    def value(p: tuple[int, ...]) -> float:
        index = list(p)
        moved = {"0.weight": state(b)["0.weight"][index], "0.bias": state(b)["0.bias"][index]}
        moved |= {"2.weight": state(b)["2.weight"][:, index], "2.bias": state(b)["2.bias"]}
        return sum(float((state(a)[n] * moved[n]).sum()) for n in moved)

    assert found.objective == pytest.approx(max(map(value, permutations(range(4)))), abs=1e-12)
