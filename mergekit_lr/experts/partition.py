"""Which experts of a layer become one: plain data that everything after the decision reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Group:
    """Experts that become one. ``members`` ascending; ``centre`` is the one that stands for them."""

    members: tuple[int, ...]
    centre: int

    @property
    def alone(self) -> bool:
        return len(self.members) == 1


@dataclass(frozen=True, slots=True)
class Partition:
    """The groups of one layer, ordered by their centres: group j becomes expert j. ``dropped``: experts in none."""

    groups: tuple[Group, ...]
    dropped: tuple[int, ...] = ()

    def new_index(self, experts: int) -> list[int]:
        """The new expert of each old one; -1 for a dropped one."""
        out = [-1] * experts
        for j, group in enumerate(self.groups):
            for e in group.members:
                out[e] = j
        return out


def partition(groups: Sequence[Group], experts: int) -> Partition:
    """Groups in the order of their centres, and who is in none of them.

    Raises:
        ValueError: an expert is in two groups, or is none of the layer's.
    """
    members = [e for g in groups for e in g.members]
    if len(set(members)) != len(members) or not set(members) <= set(range(experts)):
        raise ValueError(f"not a partition of {experts} experts: {members}")
    ordered = sorted(groups, key=lambda g: g.centre)
    return Partition(tuple(ordered), tuple(sorted(set(range(experts)) - set(members))))


def joined(parts: Sequence[tuple[Sequence[int], Partition]]) -> Partition:
    """Partitions of parts of the experts as one: ``parts`` are (the experts' numbers in the layer, their partition).

    Parts stay in order, so that a router that chooses among groups of experts finds each group whole.
    """
    groups: list[Group] = []
    dropped: list[int] = []
    for numbers, own in parts:
        groups += [Group(tuple(sorted(numbers[e] for e in g.members)), numbers[g.centre]) for g in own.groups]
        dropped += [numbers[e] for e in own.dropped]
    return Partition(tuple(groups), tuple(sorted(dropped)))
