"""One member of a network's symmetry group, and how it moves the entries of each tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lr.arch.symmetry import Axis, Factor, SymmetrySpec, section_size
from mergekit_lr.errors import CheckpointError

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Member:
    """``permutations[g]``: int64 ``[n]``, or ``[parent's size, n]`` for a group with a parent; place i holds what was
    at p[i]. ``signs[g]``: int8 of the same shape, +1 or -1, for signed groups."""

    permutations: Mapping[str, Tensor]
    signs: Mapping[str, Tensor]

    def with_group(self, group: str, permutation: Tensor, signs: Tensor | None = None) -> Member:
        """A copy with another permutation (and signs) of one group."""
        new_signs = dict(self.signs)
        if signs is not None and group in new_signs:
            new_signs[group] = signs.to(torch.int8)
        return Member({**self.permutations, group: permutation}, new_signs)

    def moved(self) -> dict[str, int]:
        """group -> how many of its parts are not where (or not of the sign) they were; only groups where any moved."""
        found = {}
        for group, p in self.permutations.items():
            off = p != torch.arange(p.shape[-1])
            if group in self.signs:
                off = off | (self.signs[group] < 0)
            if bool(off.any()):
                found[group] = int(off.sum())
        return found


def identity(spec: SymmetrySpec) -> Member:
    """The member that moves nothing."""
    shapes = {g: (*spec.outer(g), group.size) for g, group in spec.groups.items()}
    permutations = {g: torch.arange(s[-1]).expand(s).contiguous() for g, s in shapes.items()}
    signs = {g: torch.ones(s, dtype=torch.int8) for g, s in shapes.items() if spec.groups[g].signed}
    return Member(permutations, signs)


def random_member(spec: SymmetrySpec, seed: int) -> Member:
    """A member drawn uniformly; the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    permutations, signs = {}, {}
    for name in sorted(spec.groups):
        shape = (*spec.outer(name), spec.groups[name].size)
        rows = [torch.randperm(shape[-1], generator=g) for _ in range(shape[0] if len(shape) > 1 else 1)]
        permutations[name] = torch.stack(rows) if len(shape) > 1 else rows[0]
        if spec.groups[name].signed:
            signs[name] = (torch.randint(2, shape, generator=g) * 2 - 1).to(torch.int8)
    return Member(permutations, signs)


def compose(spec: SymmetrySpec, first: Member, then: Member) -> Member:
    """The member that does what ``first`` and after it ``then`` do.

    Place i takes what ``then`` takes from place t[i], which ``first`` took from f[t[i]]; a group with a parent counts
    within the parent's places, which ``then`` has moved too.
    """
    permutations, signs = {}, {}
    for name, group in spec.groups.items():
        t, f = then.permutations[name], first.permutations[name]
        s = first.signs.get(name)
        if group.parent is not None:
            rows = then.permutations[group.parent]
            f, s = f[rows], None if s is None else s[rows]
        permutations[name] = f.gather(-1, t)
        if s is not None:
            signs[name] = s.gather(-1, t) * then.signs[name]
    return Member(permutations, signs)


def inverse(spec: SymmetrySpec, member: Member) -> Member:
    """The member that undoes this one."""
    permutations, signs = {}, {}
    for name, group in spec.groups.items():
        p = member.permutations[name]
        back = torch.argsort(p, dim=-1)
        s = member.signs.get(name)
        s = None if s is None else s.gather(-1, back)
        if group.parent is not None:
            rows = torch.argsort(member.permutations[group.parent])
            back, s = back[rows], None if s is None else s[rows]
        permutations[name] = back
        if s is not None:
            signs[name] = s
    return Member(permutations, signs)


@dataclass(frozen=True)
class Place:
    """Where one tensor's entries come from: a tensor's name, and for each axis indices and signs (None: as is)."""

    source: str
    index: tuple[Tensor | None, ...]
    signs: tuple[Tensor | None, ...]

    @property
    def is_copy(self) -> bool:
        return all(i is None for i in self.index) and all(s is None for s in self.signs)


def place(
    spec: SymmetrySpec,
    member: Member,
    name: str,
    *,
    still: Collection[str] = (),
    still_axis: tuple[str, int] | None = None,
) -> Place:
    """How ``member`` fills the tensor ``name``. Groups in ``still`` do not move; ``still_axis = (group, axis)`` holds
    one group still on one axis only.

    Raises:
        CheckpointError: the spec does not cover the tensor.
    """
    if name not in spec.of_tensor:
        raise CheckpointError(f"the permutation spec {spec.family} does not cover the tensor {name}")
    entry, number = spec.of_tensor[name]
    outer = {}
    source = name
    if entry.stack is not None:
        outer[entry.stack] = number
        if entry.stack not in still:
            source = entry.names[int(member.permutations[entry.stack][number])]
    index, signs = [], []
    for a, axis in enumerate(entry.axes):
        held = {*still, still_axis[0]} if still_axis and still_axis[1] == a else still
        i, s = _along(spec, axis, member, outer, held)
        index.append(i)
        signs.append(s)
    return Place(source, tuple(index), tuple(signs))


def _along(
    spec: SymmetrySpec, axis: Axis, member: Member, outer: Mapping[str, int], still: Collection[str]
) -> tuple[Tensor | None, Tensor | None]:
    """Source indices and signs of one axis; None where it stays as it is."""
    indices, signs, offset = [], [], 0
    for section in axis:
        index, sign = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int8)
        at = {g: torch.tensor([i]) for g, i in outer.items()}  # of each place so far: its number within each group
        for factor in section:
            n, count = factor.size, len(index)
            moved, flipped = _rows(spec, factor, count, member, at, still)
            index = (index[:, None] * n + moved).reshape(-1)
            sign = (sign[:, None] * flipped).reshape(-1)
            at = {g: numbers.repeat_interleave(n) for g, numbers in at.items()}
            if factor.group is not None:
                at[factor.group] = torch.arange(n).repeat(count)
        indices.append(index + offset)
        signs.append(sign)
        offset += section_size(section)
    whole, sign = torch.cat(indices), torch.cat(signs)
    stays = bool((whole == torch.arange(len(whole))).all())
    return None if stays else whole, None if bool((sign > 0).all()) else sign


def _rows(
    spec: SymmetrySpec, factor: Factor, count: int, member: Member, at: Mapping[str, Tensor], still: Collection[str]
) -> tuple[Tensor, Tensor]:
    """For each of ``count`` outer places: what stands at the factor's n places, and its signs; ``[count, n]`` both."""
    shape = (count, factor.size)
    no_signs = torch.ones(shape, dtype=torch.int8)
    if factor.group is None or factor.group in still:
        return torch.arange(factor.size).expand(shape), no_signs
    p = member.permutations[factor.group]
    s = member.signs[factor.group] if factor.signed else None
    parent = spec.groups[factor.group].parent
    if parent is not None:
        p, s = p[at[parent]], None if s is None else s[at[parent]]
    return p.expand(shape), no_signs if s is None else s.expand(shape)


def apply(
    spec: SymmetrySpec,
    member: Member,
    read: Read,
    name: str,
    *,
    still: Collection[str] = (),
    still_axis: tuple[str, int] | None = None,
) -> Tensor:
    """The tensor ``name`` after ``member`` moved the model that ``read`` gives tensors of."""
    found = place(spec, member, name, still=still, still_axis=still_axis)
    return moved(read(found.source), found)


def moved(tensor: Tensor, found: Place) -> Tensor:
    """Pick and flip the entries of one tensor, axis by axis; its own dtype."""
    for axis, (index, sign) in enumerate(zip(found.index, found.signs, strict=True)):
        if index is not None:
            tensor = tensor.index_select(axis, index.to(tensor.device))
        if sign is not None:
            shape = [1] * tensor.ndim
            shape[axis] = -1
            tensor = tensor * sign.to(tensor.device, tensor.dtype).reshape(shape)
    return tensor


def apply_all(
    spec: SymmetrySpec, member: Member, tensors: Mapping[str, Tensor], names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Every tensor of a state dict after ``member`` moved it."""
    return {n: apply(spec, member, tensors.__getitem__, n) for n in (names or tensors)}
