"""Where a group moves entries, and the two models' tensors unfolded along it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lr.arch.symmetry import Section, SymmetrySpec, TensorSpec, section_size
from mergekit_lr.matching.member import Member, Read, apply


def unfold(tensor: Tensor, axis: int, sizes: tuple[int, ...]) -> Tensor:
    """One axis as several."""
    return tensor.reshape(*tensor.shape[:axis], *sizes, *tensor.shape[axis + 1 :])


@dataclass(frozen=True)
class Occurrence:
    """A group as one factor of one axis of an entry: the stretch ``offset .. offset + length``, unfolded to ``sizes``.

    ``parent``: position of the group's parent among the factors, -1 where it is the stack, None without one.
    """

    entry: TensorSpec
    axis: int
    offset: int
    length: int
    sizes: tuple[int, ...]
    position: int
    signed: bool
    parent: int | None

    def unfold(self, tensor: Tensor) -> Tensor:
        """``[n, m]``, or ``[parent's size, n, m]`` where the parent is a factor too."""
        part = unfold(tensor.narrow(self.axis, self.offset, self.length), self.axis, self.sizes)
        at = self.axis + self.position
        if self.parent is None or self.parent < 0:
            return part.movedim(at, 0).flatten(1) if part.ndim > 1 else part.reshape(-1, 1)
        return part.movedim((self.axis + self.parent, at), (0, 1)).reshape(
            self.sizes[self.parent], self.sizes[self.position], -1
        )


def occurrences(spec: SymmetrySpec, group: str) -> Iterator[Occurrence]:
    """Every place of a group among the factors of axes (not where it is the stack)."""
    parent = spec.groups[group].parent
    for entry in spec.of_group[group]:
        for a, axis in enumerate(entry.axes):
            offset = 0
            for section in axis:
                length = section_size(section)
                names = [f.group for f in section]
                for i, factor in enumerate(section):
                    if factor.group == group:
                        up = None if parent is None else (names.index(parent) if parent in names else -1)
                        sizes = tuple(f.size for f in section)
                        yield Occurrence(entry, a, offset, length, sizes, i, factor.signed, up)
                offset += length


def unfolded_pairs(
    spec: SymmetrySpec, group: str, read_a: Read, read_b: Read, member: Member
) -> Iterator[tuple[int | None, bool, Tensor, Tensor]]:
    """(parent's part or None, signed, X, Y): rows of X and Y are the group's parts in A and in B.

    B is moved by all of ``member`` but this group (where the group is on both axes of a tensor, by it on the other).
    """
    for o in occurrences(spec, group):
        for number, name in enumerate(o.entry.names):
            x = o.unfold(read_a(name))
            y = o.unfold(apply(spec, member, read_b, name, still_axis=(group, o.axis)))
            if x.ndim == 3:
                yield from ((k, o.signed, x[k], y[k]) for k in range(len(x)))
            else:
                yield (number if o.parent == -1 else None), o.signed, x, y


@dataclass(frozen=True)
class Part:
    """What belongs to each part of a group with children: ``a[i]`` and ``b[j]``, with the axis of each child in them.

    ``children[c] = (axis, signed)``, the axis counted after the group's own.
    """

    a: Tensor
    b: Tensor
    children: dict[str, tuple[int, bool]]


def parts_of(spec: SymmetrySpec, group: str, read_a: Read, read_b: Read, member: Member) -> list[Part]:
    """Every tensor that a group with children moves, by its parts; B is moved by all other groups."""
    children = [c.name for c in spec.children(group)]
    still = {group, *children}
    found = []
    for entry in spec.of_group[group]:
        if entry.stack != group:
            continue
        sides = []
        for read, moves in ((read_a, False), (read_b, True)):
            rows = [apply(spec, member, read, n, still=still) if moves else read(n) for n in entry.names]
            sides.append(torch.stack([_split(r, entry, children) for r in rows]))
        found.append(Part(sides[0], sides[1], _child_axes(entry, children)))
    for o in occurrences(spec, group):
        section = _section(o)
        inside = {f.group: (i, f.signed) for i, f in enumerate(section) if f.group in children}
        for name in o.entry.names:
            sides = []
            for tensor in (read_a(name), apply(spec, member, read_b, name, still=still)):
                part = unfold(tensor.narrow(o.axis, o.offset, o.length), o.axis, o.sizes)
                sides.append(part.movedim(o.axis + o.position, 0))
            axes = {str(c): (o.axis + i - (i > o.position), signed) for c, (i, signed) in inside.items()}
            found.append(Part(sides[0], sides[1], axes))
    return found


def _section(o: Occurrence) -> Section:
    offset = 0
    for section in o.entry.axes[o.axis]:
        if offset == o.offset:
            return section
        offset += section_size(section)
    raise AssertionError("an occurrence lies outside its axis")


def _split(tensor: Tensor, entry: TensorSpec, children: list[str]) -> Tensor:
    """Unfold every axis that a child is a factor of (a spec has those in one stretch)."""
    for a in reversed(range(len(entry.axes))):
        if any(f.group in children for f in entry.axes[a][0]):
            tensor = unfold(tensor, a, tuple(f.size for f in entry.axes[a][0]))
    return tensor


def _child_axes(entry: TensorSpec, children: list[str]) -> dict[str, tuple[int, bool]]:
    """Where each child is once `_split` has unfolded the axes."""
    found, at = {}, 0
    for axis in entry.axes:
        inside = [f for f in axis[0] if f.group in children]
        for i, factor in enumerate(axis[0]):
            if factor.group in children:
                found[str(factor.group)] = (at + i, factor.signed)
        at += len(axis[0]) if inside else 1
    return found
