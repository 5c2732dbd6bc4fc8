"""The exact symmetries of a network as data: which axes of which tensors move together.

A *group* is a set of interchangeable parts of a network: channels, neurons, heads, experts. Each axis of each
tensor is fixed or is a product of groups (heads times dimensions), or several such products one after the other (q, k
and v in one tensor). Putting part ``p[i]`` of every group at place i, in all tensors at once, leaves the function
unchanged; so does flipping the sign of a part of a *signed* group. A group with a *parent* has a permutation of its own
within each part of the parent: the query heads within a key-value group, the neurons within an expert.

The axis language of specs (YAML and code):

    ~               nothing moves along this axis
    res             the group "res"
    abs(res)        the same, but a flipped sign does not reach this axis (a gain, a gate)
    kv * q * 64     the axis counts through kv, then q, then 64 fixed places: index = (kv * |q| + q) * 64 + place
    h * 64 | h * 64 two such stretches, one after the other

Nothing here knows torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mergekit_lr.errors import CheckpointError

_FACTOR = re.compile(r"^(abs\()?([\w.\-\[\]]+)\)?$")


@dataclass(frozen=True)
class Group:
    """Interchangeable parts. ``parent``: each of its parts has a permutation of this; ``signed``: signs may flip."""

    name: str
    size: int
    parent: str | None = None
    signed: bool = False


@dataclass(frozen=True)
class Factor:
    """One index of an axis: of a group, or of ``size`` places that stay (group None)."""

    group: str | None
    size: int
    signed: bool = False


Section = tuple[Factor, ...]
Axis = tuple[Section, ...]


def section_size(section: Section) -> int:
    n = 1
    for factor in section:
        n *= factor.size
    return n


@dataclass(frozen=True)
class TensorSpec:
    """The axes of one tensor, or of tensors alike that are one part each of the group ``stack`` (experts).

    ``names`` are in the order of the parts. ``reads``: the axes along which values come in (the columns of a linear
    layer); the others are where values go out. Only soft matching, where the two differ, asks for it.
    """

    names: tuple[str, ...]
    axes: tuple[Axis, ...]
    stack: str | None = None
    reads: tuple[int, ...] = ()

    def groups(self) -> set[str]:
        found = {f.group for axis in self.axes for section in axis for f in section if f.group}
        return found | ({self.stack} if self.stack else set())


@dataclass(frozen=True)
class SymmetrySpec:
    """All groups of a model, and the axes of all its tensors."""

    family: str
    groups: Mapping[str, Group]
    tensors: tuple[TensorSpec, ...]

    @cached_property
    def of_tensor(self) -> dict[str, tuple[TensorSpec, int]]:
        """name -> (its entry, its place in the stack)."""
        return {name: (t, i) for t in self.tensors for i, name in enumerate(t.names)}

    @cached_property
    def of_group(self) -> dict[str, tuple[TensorSpec, ...]]:
        """group -> the entries that it moves."""
        return {g: tuple(t for t in self.tensors if g in t.groups()) for g in self.groups}

    def children(self, group: str) -> list[Group]:
        return [g for g in self.groups.values() if g.parent == group]

    def outer(self, group: str) -> tuple[int, ...]:
        """Shape before the last axis of a group's permutations: ``(parent's size,)`` or ``()``."""
        parent = self.groups[group].parent
        return () if parent is None else (self.groups[parent].size,)


Entry = tuple[tuple[str, ...], tuple[int, ...], list[str | None], str | None, tuple[int, ...] | None]
"""Names, shape, axes as text, stack, reads."""
Parsed = list[list[tuple[str | None, int | None, bool]]]
"""Of one axis: per stretch, (group, fixed size, with sign) of each factor."""


@dataclass
class Draft:
    """A spec in the making: declarations and sizes of groups, named constants, and the axes of every tensor as text."""

    family: str
    declared: dict[str, dict[str, object]] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)

    def add(
        self,
        names: Sequence[str],
        shape: Sequence[int],
        axes: Sequence[str | None],
        stack: str | None = None,
        reads: Sequence[int] | None = None,
    ) -> None:
        """Say how the axes of a tensor (or of a stack of tensors) move."""
        if len(axes) != len(shape):
            raise CheckpointError(
                f"the permutation spec {self.family} names {len(axes)} axes of a tensor that has {len(shape)}",
                where=names[0],
                fix="give one entry for each axis, ~ where nothing moves",
            )
        own = None if reads is None else tuple(reads)
        self.entries.append((tuple(names), tuple(shape), list(axes), self._one(stack), own))

    def _one(self, group: str | None) -> str | None:
        seen: set[str] = set()
        while group is not None and group in self.same and group not in seen:
            seen.add(group)
            group = self.same[group]
        return group

    def finish(self) -> SymmetrySpec:
        """Find every size from the shapes, check all of them, and freeze.

        Raises:
            CheckpointError: sizes contradict each other, a size cannot be found, or a parent is not on the way.
        """
        self._sizes_of_stacks()
        parsed = [[self._sections(a) for a in axes] for _, _, axes, _, _ in self.entries]
        while self._learn(parsed):
            pass
        tensors = []
        for (names, shape, _, stack, reads), axes in zip(self.entries, parsed, strict=True):
            built = tuple(self._axis(names[0], sections, shape[i]) for i, sections in enumerate(axes))
            own = reads if reads is not None else ((1,) if len(shape) > 1 else ())
            tensors.append(TensorSpec(names, built, stack, own))
        used = {g for t in tensors for g in t.groups()}
        groups = {g: self._group(g, used) for g in sorted(used)}
        spec = SymmetrySpec(self.family, groups, tuple(tensors))
        _check_parents(spec)
        return spec

    def _sizes_of_stacks(self) -> None:
        for names, _, _, stack, _ in self.entries:
            if stack is not None and self.sizes.setdefault(stack, len(names)) != len(names):
                raise self._conflict(names[0], stack, len(names))

    def _conflict(self, where: str, group: str, size: int) -> CheckpointError:
        return CheckpointError(
            f"the permutation spec {self.family} does not fit",
            where=where,
            why=f"{group} has {self.sizes[group]} parts elsewhere and {size} here",
            fix="write a spec of your own in YAML, or name the right family",
        )

    def _sections(self, axis: str | None) -> Parsed:
        if axis is None:
            return []
        found = []
        for stretch in axis.split("|"):
            factors: list[tuple[str | None, int | None, bool]] = []
            for text in stretch.split("*"):
                m = _FACTOR.match(text.strip())
                if m is None:
                    raise CheckpointError(f"cannot read {axis!r} in the permutation spec {self.family}", why=text)
                word = m.group(2)
                if word.isdigit():
                    factors.append((None, int(word), False))
                elif word in self.constants:
                    factors.append((None, self.constants[word], False))
                else:
                    group = self._one(word)
                    signed = bool(self.declared.get(str(group), {}).get("signed")) and not m.group(1)
                    factors.append((group, None, signed))
            found.append(factors)
        return found

    def _learn(self, parsed: list[list[Parsed]]) -> bool:
        """Derive one size that an axis leaves open; False when there is nothing more to learn."""
        for (names, shape, _, _, _), axes in zip(self.entries, parsed, strict=True):
            for length, sections in zip(shape, axes, strict=True):
                unknown = {g for s in sections for g, _, _ in s if g is not None and g not in self.sizes}
                if len(unknown) != 1:
                    continue
                [group] = unknown
                known, factor = 0, 0
                for s in sections:
                    n = 1
                    for g, size, _ in s:
                        n *= 1 if g == group else (size if size is not None else self.sizes[str(g)])
                    if any(g == group for g, _, _ in s):
                        factor += n
                    else:
                        known += n
                size, rest = divmod(length - known, factor)
                if rest or size < 1:
                    raise CheckpointError(
                        f"the permutation spec {self.family} does not fit",
                        where=names[0],
                        why=f"an axis of {length} is no multiple of {factor} for {group}",
                    )
                self.sizes[group] = size
                return True
        return False

    def _axis(self, name: str, sections: Parsed, length: int) -> Axis:
        if not sections:
            return ((Factor(None, length),),)
        axis = []
        for s in sections:
            factors = []
            for group, size, signed in s:
                n = size if size is not None else self.sizes.get(str(group), 0)
                if n < 1:
                    raise CheckpointError(
                        f"the permutation spec {self.family} does not say how large {group} is",
                        where=name,
                        fix=f"add `groups: {{{group}: {{size: N}}}}`",
                    )
                factors.append(Factor(group, n, signed))
            axis.append(tuple(factors))
        total = sum(map(section_size, axis))
        if total != length:
            text = " | ".join(" * ".join(f"{f.group or 'fixed'} ({f.size})" for f in s) for s in axis)
            raise CheckpointError(
                f"the permutation spec {self.family} does not fit",
                where=name,
                why=f"an axis has {length} entries, and {text} are {total}",
                fix="write a spec of your own in YAML, or name the right family",
            )
        return tuple(axis)

    def _group(self, name: str, used: set[str]) -> Group:
        said = self.declared.get(name, {})
        parent = said.get("parent")
        one = self._one(str(parent)) if parent is not None else None
        if one is not None and one not in used:
            raise CheckpointError(
                f"the permutation spec {self.family} gives {name} the parent {one}", why="no tensor has that group"
            )
        return Group(name, self.sizes[name], one, bool(said.get("signed")))


def _check_parents(spec: SymmetrySpec) -> None:
    """A group with a parent is only found behind that parent: earlier in the same stretch, or in its stack."""
    for t in spec.tensors:
        for axis in t.axes:
            for section in axis:
                seen = {t.stack}
                for factor in section:
                    group = spec.groups[factor.group] if factor.group else None
                    if group is not None and group.parent is not None and group.parent not in seen:
                        raise CheckpointError(
                            f"the permutation spec {spec.family} has {group.name} without its parent {group.parent}",
                            where=t.names[0],
                            fix="put the parent before it in the same stretch of the axis",
                        )
                    if group is not None and group.parent == t.stack is not None and len(axis) > 1:
                        raise CheckpointError(
                            f"the permutation spec {spec.family} has {group.name} in one of several stretches",
                            where=t.names[0],
                            fix="within a stack, give a group with that parent an axis of its own",
                        )
                    seen.add(factor.group)
    for group in spec.groups.values():
        parent = spec.groups[group.parent] if group.parent else None
        if parent is not None and (parent.parent is not None or parent.signed):
            why = "a parent has a parent itself" if parent.parent else "a parent is signed"
            raise CheckpointError(f"the permutation spec {spec.family} cannot have {group.name} in it", why=why)
