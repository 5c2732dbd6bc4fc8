"""Every family's spec against the model itself: a random member changes nothing, and broken specs do."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from networks import FAMILIES, FAMILY_CASES, Example, shapes_of

from mergekit_lr.arch.spec import spec_for
from mergekit_lr.arch.symmetry import SymmetrySpec
from mergekit_lr.matching.member import apply_all, compose, identity, inverse, random_member

EXACT = 1e-10


def spec_of(example: Example) -> SymmetrySpec:
    return spec_for(example.permutations, shapes_of(example.tensors), example.config, example.name)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_random_member_leaves_the_function_unchanged(name: str) -> None:
    example = FAMILIES[name]()
    spec = spec_of(example)
    assert {n for t in spec.tensors for n in t.names} == set(example.tensors)
    member = random_member(spec, 1)
    assert set(member.moved()) >= {g for g in spec.groups if spec.groups[g].size > 4}
    before = example.outputs(example.tensors)
    after = example.outputs(apply_all(spec, member, example.tensors))
    assert before.abs().max() > 1e-3
    assert (before - after).abs().max() <= EXACT * max(1.0, float(before.abs().max()))


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_every_group_alone_is_a_symmetry_and_breaking_one_of_its_tensors_is_not(name: str) -> None:
    example = FAMILIES[name]()
    spec = spec_of(example)
    before = example.outputs(example.tensors)
    one = identity(spec)
    for group in example.sample_groups(spec):
        drawn = next(m for m in map(partial(random_member, spec), range(2, 99)) if group in m.moved())
        member = one.with_group(group, drawn.permutations[group], drawn.signs.get(group))
        moved = apply_all(spec, member, example.tensors)
        assert (before - example.outputs(moved)).abs().max() <= EXACT * max(1.0, float(before.abs().max())), group
        changed = [n for n in moved if not torch.equal(moved[n], example.tensors[n])]
        weights = [n for n in changed if example.tensors[n].ndim > 1]
        left_out = max(weights, key=lambda n: example.tensors[n].numel())
        broken = example.outputs({**moved, left_out: example.tensors[left_out]})
        assert (before - broken).abs().max() > 1e-6, (group, left_out)


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_members_form_a_group(name: str) -> None:
    example = FAMILIES[name]()
    spec = spec_of(example)
    a, b = random_member(spec, 3), random_member(spec, 4)
    both = apply_all(spec, compose(spec, a, b), example.tensors)
    one_by_one = apply_all(spec, b, apply_all(spec, a, example.tensors))
    undone = apply_all(spec, inverse(spec, a), apply_all(spec, a, example.tensors))
    assert all(torch.equal(both[n], one_by_one[n]) for n in both)
    assert all(torch.equal(undone[n], example.tensors[n]) for n in undone)
