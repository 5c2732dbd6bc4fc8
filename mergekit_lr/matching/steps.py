"""One step of coordinate ascent: the best permutation of one group while all others stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lr.arch.symmetry import SymmetrySpec
from mergekit_lr.linalg.assignment import assign, cross_gram
from mergekit_lr.linalg.random_signs import rademacher
from mergekit_lr.matching.member import Member, Read
from mergekit_lr.matching.occurrences import Part, parts_of, unfolded_pairs

EVERY_PAIR = 10**10
"""All pairs of parts are tried while (parts)^2 times the cube of what moves within them stays below this."""
CANDIDATES = 4
"""Parts of B that are tried for each of A beyond that: the nearest by what no permutation within them changes."""
ROUNDS = 2
"""Passes over the groups within a part, where there are several."""


@dataclass
class _Gain:
    """What a place is worth to a part: ``plain`` whatever its sign, ``signed`` times its sign."""

    plain: Tensor
    signed: Tensor | None

    def best(self) -> Tensor:
        """The gain with the better sign. Takes the place of ``plain``: these are the largest tables of a matching."""
        if self.signed is not None:
            for start in range(0, len(self.plain), 1024):
                self.plain[start : start + 1024] += self.signed[start : start + 1024].abs()
        return self.plain


def step_alone(spec: SymmetrySpec, group: str, read_a: Read, read_b: Read, member: Member, threads: int = 1) -> Member:
    """The best permutation (and signs) of a group without children; exact unless it is on two axes of one tensor."""
    n, outer = spec.groups[group].size, spec.outer(group)
    is_signed = spec.groups[group].signed
    count = outer[0] if outer else 1
    plain = torch.zeros(count, n, n, dtype=torch.float64)
    signed = torch.zeros(count, n, n, dtype=torch.float64) if is_signed else None
    for k, flips, x, y in unfolded_pairs(spec, group, read_a, read_b, member):
        target = signed if flips and signed is not None else plain
        cross_gram([(x, y)], threads=threads, out=target[k or 0])
    rows, signs = [], []
    for k in range(count):
        keep = member.permutations[group][k] if outer else member.permutations[group]
        gain = _Gain(plain[k], None if signed is None else signed[k])
        p = assign(gain.best(), keep)
        rows.append(p)
        signs.append(_signs(gain, p))
    new_signs = torch.stack(signs) if outer else signs[0]
    return member.with_group(group, torch.stack(rows) if outer else rows[0], new_signs if is_signed else None)


def _signs(gain: _Gain, permutation: Tensor) -> Tensor:
    if gain.signed is None:
        return torch.ones(len(permutation), dtype=torch.int8)
    chosen = gain.signed.gather(1, permutation[:, None])[:, 0]
    return torch.where(chosen < 0, -1, 1).to(torch.int8)


Inner = dict[str, tuple[Tensor, Tensor]]
"""child group -> its permutation and signs within one pair of parts."""


def step_with_children(
    spec: SymmetrySpec, group: str, read_a: Read, read_b: Read, member: Member, threads: int = 1
) -> Member:
    """A group and the groups within its parts, together: every pair of parts is matched within, then the parts.

    With one child group the inner matchings are exact; with several they take turns, `ROUNDS` times.
    """
    n = spec.groups[group].size
    children = [c.name for c in spec.children(group)]
    parts = parts_of(spec, group, read_a, read_b, member)
    now = member.permutations[group]
    tried = _candidates(spec, group, children, parts, now)
    value = torch.full((n, n), -torch.inf, dtype=torch.float64)
    inner: dict[tuple[int, int], Inner] = {}
    for i in range(n):
        for j in tried[i]:
            start = _start(spec, children, member, i) if int(now[i]) == j else _start(spec, children, None, i)
            inner[i, j] = _match_within(children, parts, i, j, start, threads)
            value[i, j] = _value(parts, i, j, inner[i, j])
    p = assign(_finite(value), now)
    result = member.with_group(group, p)
    for c in children:
        rows = [inner[i, int(p[i])][c] if (i, int(p[i])) in inner else _start(spec, [c], None, i)[c] for i in range(n)]
        result = result.with_group(c, torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows]))
    return result


def _start(spec: SymmetrySpec, children: Sequence[str], member: Member | None, i: int) -> Inner:
    found = {}
    for c in children:
        size = spec.groups[c].size
        ones = torch.ones(size, dtype=torch.int8)
        if member is None:
            found[c] = (torch.arange(size), ones)
        else:
            found[c] = (member.permutations[c][i], member.signs[c][i] if c in member.signs else ones)
    return found


def _finite(value: Tensor) -> Tensor:
    """Pairs that were not tried, so low that none is chosen where another assignment is possible."""
    known = value[torch.isfinite(value)]
    span = float(known.max() - known.min()) + 1.0
    return torch.where(torch.isfinite(value), value, float(known.min()) - span * len(value))


def _match_within(children: list[str], parts: list[Part], i: int, j: int, start: Inner, threads: int) -> Inner:
    inner = dict(start)
    for _ in range(ROUNDS if len(children) > 1 else 1):
        before = dict(inner)
        for c in children:
            gain = _gain_within(c, parts, i, j, inner, threads)
            p = assign(gain.best(), inner[c][0])
            inner[c] = (p, _signs(gain, p))
        if all(torch.equal(before[c][0], inner[c][0]) and torch.equal(before[c][1], inner[c][1]) for c in children):
            break
    return inner


def _gain_within(child: str, parts: list[Part], i: int, j: int, inner: Inner, threads: int) -> _Gain:
    plain: list[tuple[Tensor, Tensor]] = []
    signed: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        if child in part.children:
            axis, flips = part.children[child]
            others = {c: v for c, v in inner.items() if c != child}
            x, y = part.a[i], _inside(part, j, others)
            (signed if flips else plain).append((_rows(x, axis), _rows(y, axis)))
    n = len(inner[child][0])
    zero = torch.zeros(n, n, dtype=torch.float64)
    return _Gain(
        cross_gram(plain, threads=threads).cpu() if plain else zero,
        cross_gram(signed, threads=threads).cpu() if signed else None,
    )


def _rows(x: Tensor, axis: int) -> Tensor:
    return x.movedim(axis, 0).reshape(x.shape[axis], -1)


def _inside(part: Part, j: int, inner: Inner) -> Tensor:
    """B's j-th part, its insides permuted."""
    y = part.b[j]
    for c, (p, s) in inner.items():
        if c in part.children:
            axis, flips = part.children[c]
            y = y.index_select(axis, p)
            if flips and bool((s < 0).any()):
                shape = [1] * y.ndim
                shape[axis] = -1
                y = y * s.to(y.dtype).reshape(shape)
    return y


def _value(parts: list[Part], i: int, j: int, inner: Inner) -> float:
    return sum(inner_product(p.a[i], _inside(p, j, inner)) for p in parts)


def inner_product(a: Tensor, b: Tensor) -> float:
    """``<a, b>`` over all entries, in fp64 and in a fixed order; 0 for counters and other integers."""
    if not a.is_floating_point():
        return 0.0
    x, y = a.reshape(-1), b.reshape(-1)
    step = 1 << 20
    return float(sum(float(x[k : k + step].double() @ y[k : k + step].double()) for k in range(0, len(x), step)))


def _candidates(spec: SymmetrySpec, group: str, children: list[str], parts: list[Part], now: Tensor) -> list[list[int]]:
    """Parts of B to try for each part of A: all, or the nearest by signature, and always the present one."""
    n = spec.groups[group].size
    work = n * n * sum(spec.groups[c].size ** 3 for c in children)
    if work <= EVERY_PAIR or n <= CANDIDATES:
        return [list(range(n))] * n
    likeness = torch.zeros(n, n, dtype=torch.float64)
    for side_a, side_b in _signatures(children, parts):
        likeness += _unit(side_a) @ _unit(side_b).T
    nearest = assign(likeness, now)
    order = torch.argsort(likeness, dim=1, descending=True, stable=True)[:, :CANDIDATES]
    return [sorted({*map(int, order[i]), int(now[i]), int(nearest[i])}) for i in range(n)]


def _unit(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / norm.masked_fill(norm == 0, 1.0)


def _signatures(children: list[str], parts: list[Part]) -> list[tuple[Tensor, Tensor]]:
    """What no permutation within a part changes: entries without children, and sketches of ``M^T M`` over each child.

    M has the child's parts as rows. Tensors whose signs flip and those whose signs do not have an M each.
    """
    found = []
    for part in parts:
        if not part.children:
            found.append((part.a.flatten(1).double(), part.b.flatten(1).double()))
    for c in children:
        for flips in (False, True):
            own = [p for p in parts if set(p.children) == {c} and p.children[c][1] == flips]
            if own:
                found.append((_sketch(own, c, first=True), _sketch(own, c, first=False)))
    return found


def _sketch(parts: list[Part], child: str, *, first: bool) -> Tensor:
    sides = [p.a if first else p.b for p in parts]
    rows = []
    for i in range(len(sides[0])):
        m = torch.cat([_rows(s[i], p.children[child][0]) for s, p in zip(sides, parts, strict=True)], 1)
        m = m.double()
        rows.append((m.T @ (m @ rademacher(m.shape[1], 8, name="parts", dtype=torch.float64))).flatten())
    return torch.stack(rows)
