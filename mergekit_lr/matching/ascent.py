"""Weight matching: the member of B's symmetry group that brings B nearest to A, by coordinate ascent.

Maximises ``L(pi) = sum_T <A_T, pi(B)_T>`` over permutations and signs, which minimises ``||A - pi(B)||^2`` since norms
do not change. Each step is a linear assignment, exact for its group; a step counts only if L itself rises.

Source: Ainsworth, Hayase, Srinivasa, "Git Re-Basin", arXiv 2209.04836, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from mergekit_lr.arch.symmetry import SymmetrySpec
from mergekit_lr.errors import UsageError
from mergekit_lr.linalg.assignment import one_thread
from mergekit_lr.matching.member import Member, Read, apply, identity
from mergekit_lr.matching.steps import inner_product, step_alone, step_with_children

PROGRESS = 1e-9
"""A step counts if L rises by more than this fraction of what the tensors it moves could give at most."""
Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Matching:
    """``objective``: L at ``member``; ``start``: L before; ``history``: L after every accepted step; ``sweeps`` done.

    ``norms = (||A||, ||B||)``, so the distance is ``sqrt(||A||^2 + ||B||^2 - 2 L)``.
    """

    member: Member
    start: float
    objective: float
    history: tuple[float, ...]
    sweeps: int
    restart: int
    norms: tuple[float, float]

    def distance(self, objective: float | None = None) -> float:
        a, b = self.norms
        square = a * a + b * b - 2 * (self.objective if objective is None else objective)
        return float(max(square, 0.0) ** 0.5)


def match_weights(
    spec: SymmetrySpec,
    read_a: Read,
    read_b: Read,
    *,
    seed: int = 0,
    restarts: int = 1,
    only: Sequence[str] = (),
    max_sweeps: int = 100,
    threads: int = 1,
    start: Member | None = None,
    tell: Tell | None = None,
) -> Matching:
    """Match B to A. ``only``: patterns (``ffn.*``) of the groups that may move; all by default.

    Restarts differ in the order in which groups are visited, drawn from ``seed`` (PCG64); the best L is kept, the
    earlier one on ties. One sweep is enough, and is all that is done, where no two groups share a tensor. The result
    does not depend on ``threads``.

    Raises:
        UsageError: a pattern fits no group.
        LinalgError: weights are not finite.
    """
    first = start or identity(spec)
    groups = chosen_groups(spec, only)
    neighbours = _neighbours(spec)
    with one_thread():
        base = {t.names: _objective(spec, t.names, read_a, read_b, first) for t in spec.tensors}
        norms = (_norm(spec, read_a), _norm(spec, read_b))
        best: Matching | None = None
        for r in range(max(1, restarts)):
            random = np.random.Generator(np.random.PCG64([seed, r]))
            found = _climb(
                spec, groups, neighbours, read_a, read_b, first, base, norms, random, r, max_sweeps, threads, tell
            )
            if best is None or found.objective > best.objective + PROGRESS * norms[0] * norms[1]:
                best = found
            independent = not any(neighbours[g] & set(groups) for g in groups)
            if independent or best.objective >= (1 - 1e-12) * norms[0] * norms[1]:
                break  # the order does not matter, or nothing is left to gain
    assert best is not None
    return best


def chosen_groups(spec: SymmetrySpec, only: Sequence[str]) -> list[str]:
    """The groups whose steps are taken, by name; those within a part that is matched go with it."""
    for pattern in only:
        if not any(fnmatchcase(g, pattern) for g in spec.groups):
            raise UsageError(
                f"no group fits {pattern!r}", why=f"the spec {spec.family} has {', '.join(sorted(spec.groups)[:8])} ..."
            )
    named = {g for g in spec.groups if not only or any(fnmatchcase(g, p) for p in only)}
    return sorted(g for g in named if spec.groups[g].parent not in named)


def _neighbours(spec: SymmetrySpec) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {g: set() for g in spec.groups}
    for t in spec.tensors:
        for g in t.groups():
            found[g] |= t.groups() - {g}
    return found


def _is_on_two_axes(spec: SymmetrySpec, group: str) -> bool:
    """Whether some tensor has the group on two axes, so that its step is only a linearisation."""
    axes = [
        {a for a, axis in enumerate(t.axes) if any(f.group == group for s in axis for f in s)} for t in spec.tensors
    ]
    return any(len(a) > 1 for a in axes)


def _objective(spec: SymmetrySpec, names: Iterable[str], read_a: Read, read_b: Read, member: Member) -> float:
    return sum(inner_product(read_a(n), apply(spec, member, read_b, n)) for n in names)


def _norm(spec: SymmetrySpec, read: Read) -> float:
    return float(sum(inner_product(t, t) for e in spec.tensors for t in map(read, e.names)) ** 0.5)


def _climb(
    spec: SymmetrySpec,
    groups: list[str],
    neighbours: dict[str, set[str]],
    read_a: Read,
    read_b: Read,
    member: Member,
    base: dict[tuple[str, ...], float],
    norms: tuple[float, float],
    random: np.random.Generator,
    restart: int,
    max_sweeps: int,
    threads: int,
    tell: Tell | None,
) -> Matching:
    known = dict(base)
    start = sum(known.values())
    history: list[float] = []
    due = set(groups)  # groups that something near has moved since they were last matched
    sweeps = 0
    while due and sweeps < max_sweeps:
        sweeps += 1
        for n, at in enumerate(random.permutation(len(groups))):
            group = groups[int(at)]
            if tell is not None:
                tell(n, len(groups), f"matching {group}, sweep {sweeps}")
            if group not in due:
                continue
            due.discard(group)
            family = {group, *(c.name for c in spec.children(group))}
            take = step_with_children if len(family) > 1 else step_alone
            moved = take(spec, group, read_a, read_b, member, threads)
            involved = list(dict.fromkeys(t for g in family for t in spec.of_group[g]))
            before = {t.names: known[t.names] for t in involved}
            after = {t.names: _objective(spec, t.names, read_a, read_b, moved) for t in involved}
            rise = sum(after.values()) - sum(before.values())
            if rise > PROGRESS * sum(map(abs, (*before.values(), *after.values()))):
                member, known = moved, {**known, **after}
                history.append(sum(known.values()))
                due |= {g for g in groups if g != group and family & neighbours[g]}
                due |= {group} if len(family) > 1 or _is_on_two_axes(spec, group) else set()
    return Matching(member, start, sum(known.values()), tuple(history), sweeps, restart, norms)
