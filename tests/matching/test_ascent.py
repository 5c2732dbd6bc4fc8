"""Weight matching: planted members come back exactly, L only rises, and nothing depends on threads."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from networks import FAMILIES, FAMILY_CASES, Example, shapes_of

from mergekit_lr.arch.spec import spec_for
from mergekit_lr.arch.symmetry import Draft, SymmetrySpec
from mergekit_lr.errors import LinalgError, UsageError
from mergekit_lr.matching.ascent import Matching, match_weights
from mergekit_lr.matching.member import apply_all, identity, random_member


def prepared(name: str) -> tuple[Example, SymmetrySpec]:
    example = FAMILIES[name]()
    return example, spec_for(example.permutations, shapes_of(example.tensors), example.config, name)


def matched(spec: SymmetrySpec, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **more: object) -> Matching:
    return match_weights(spec, a.__getitem__, b.__getitem__, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_a_planted_member_is_undone_exactly(name: str) -> None:
    example, spec = prepared(name)
    b = apply_all(spec, random_member(spec, 5), example.tensors)
    found = matched(spec, example.tensors, b, restarts=5)
    back = apply_all(spec, found.member, b)
    assert [n for n in back if not torch.equal(back[n], example.tensors[n])] == []
    assert found.distance() < 1e-6 * found.norms[0] + 1e-9 * found.norms[0]
    assert found.distance(found.start) > 0.1 * found.norms[0]


@pytest.mark.parametrize("name", ["mlp", "llama", "resnet20", "qwen3_moe"])
def test_a_noisy_copy_is_found_too_and_the_objective_only_rises(name: str) -> None:
    example, spec = prepared(name)
    g = torch.Generator().manual_seed(0)
    noisy = {
        n: t + 0.01 * torch.randn(t.shape, generator=g) if t.is_floating_point() else t
        for n, t in example.tensors.items()
    }
    planted = random_member(spec, 6)
    found = matched(spec, example.tensors, apply_all(spec, planted, noisy), restarts=5)
    assert list(found.history) == sorted(found.history)
    assert found.history[0] > found.start
    back = apply_all(spec, found.member, apply_all(spec, planted, noisy))
    assert all(torch.equal(back[n], noisy[n]) for n in noisy)


@pytest.mark.parametrize("name", ["mlp", "gpt2", "t5"])
def test_a_model_and_itself_stay_as_they_are(name: str) -> None:
    example, spec = prepared(name)
    found = matched(spec, example.tensors, example.tensors)
    assert found.member.moved() == {}
    assert found.history == ()


def test_dead_and_duplicate_neurons_keep_their_place() -> None:
    """Any order of them is as good; what one has must not depend on which was found first."""
    example, spec = prepared("mlp")
    b = {n: t.clone() for n, t in example.tensors.items()}
    for dead in (1, 4):
        b["0.weight"][dead], b["0.bias"][dead], b["2.weight"][:, dead] = 0.0, 0.0, 0.0
    b["0.weight"][5], b["0.bias"][5], b["2.weight"][:, 5] = b["0.weight"][2], b["0.bias"][2], b["2.weight"][:, 2]
    assert matched(spec, b, b, restarts=3).member.moved() == {}
    swapped = apply_all(spec, identity(spec).with_group("hidden.0", torch.tensor([3, 1, 2, 0, 4, 5, 6])), b)
    found = matched(spec, b, swapped, restarts=3)
    assert found.member.moved() == {"hidden.0": 2}
    assert all(torch.equal(t, b[n]) for n, t in apply_all(spec, found.member, swapped).items())


def test_one_hidden_layer_is_solved_exactly() -> None:
    g = torch.Generator().manual_seed(2)
    shapes = {"a.0.weight": (5, 4), "a.0.bias": (5,), "a.1.weight": (3, 5)}
    a, b = ({n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in shapes.items()} for _ in range(2))
    spec = spec_for("auto", shapes, None, "hand")
    [group] = spec.groups

    def value(p: tuple[int, ...]) -> float:
        moved = apply_all(spec, identity(spec).with_group(group, torch.tensor(p)), b)
        return sum(float((a[n] * moved[n]).sum()) for n in a)

    best = max(permutations(range(5)), key=value)
    found = matched(spec, a, b)
    assert tuple(found.member.permutations[group].tolist()) == best
    assert found.objective == pytest.approx(value(best), abs=1e-12)
    assert found.sweeps == 1


def test_two_axes_of_one_tensor_rise_too() -> None:
    """``W`` with one group on both axes makes the step a linearisation: L must still never fall."""
    draft = Draft("loop")
    draft.add(["w"], (6, 6), ["h", "h"])
    draft.add(["v"], (6, 2), ["h", None])
    spec = draft.finish()
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        a, b = ({"w": torch.randn(6, 6, generator=g), "v": torch.randn(6, 2, generator=g)} for _ in range(2))
        found = matched(spec, a, b, restarts=2)
        moved = apply_all(spec, found.member, b)
        total = sum(float((a[n].double() * moved[n].double()).sum()) for n in a)
        assert found.objective == pytest.approx(total, abs=1e-9)
        assert list(found.history) == sorted(found.history)
        assert found.objective >= found.start


@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_the_same_seed_gives_the_same_member_on_any_number_of_threads(name: str) -> None:
    a, spec = prepared(name)
    g = torch.Generator().manual_seed(9)
    b = {n: torch.randn(t.shape, generator=g, dtype=torch.float64) for n, t in a.tensors.items()}
    one, two = (matched(spec, a.tensors, b, seed=3, restarts=2, threads=t) for t in (1, 3))
    torch.set_num_threads(3)
    three = matched(spec, a.tensors, b, seed=3, restarts=2)
    torch.set_num_threads(1)
    for other in (two, three):
        assert other.objective == one.objective
        assert all(torch.equal(one.member.permutations[g], other.member.permutations[g]) for g in spec.groups)


def test_only_the_groups_that_were_named_move() -> None:
    a, spec = prepared("llama")
    b = apply_all(spec, random_member(spec, 1), a.tensors)
    found = matched(spec, a.tensors, b, only=["ffn.*"])
    assert set(found.member.moved()) <= {"ffn.0", "ffn.1"}
    assert found.sweeps == 1
    with pytest.raises(UsageError, match="no group fits 'fnn"):
        matched(spec, a.tensors, b, only=["fnn.*"])


def test_weights_that_are_not_finite_are_an_error() -> None:
    a, spec = prepared("mlp")
    b = {n: t.clone() for n, t in a.tensors.items()}
    b["0.weight"][0, 0] = float("inf")
    with pytest.raises(LinalgError, match="not finite"):
        matched(spec, a.tensors, b)
