"""Soft matching: each neuron of A is a mixture of neurons of B, by optimal transport; widths may differ.

For neuron counts n and m a plan ``T [n, m]`` has rows that sum to 1/n and columns that sum to 1/m. Along an axis where
values are written, place i becomes the average ``n sum_j T_ij b_j``; along an axis where they are read,
``m sum_j T_ij b_j``: what was read from neuron j is read from the neurons that stand for it. For a permutation
(T = P / n) both are the permutation itself. Sources: Singh and Jaggi, "Model Fusion via Optimal Transport", arXiv
1910.05653; entropic plans: Cuturi, "Sinkhorn Distances", arXiv 1306.0895.

Only groups without parts within (neurons, channels, the residual stream) are softened; heads and experts keep the
permutation they were given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from mergekit_lr.arch.symmetry import Axis, SymmetrySpec
from mergekit_lr.errors import CheckpointError, LinalgError, UsageError
from mergekit_lr.linalg.assignment import assign, cross_gram, one_thread
from mergekit_lr.matching.occurrences import unfold

REPLICAS = 4096
"""Largest number of equal shares into which both sides are cut before an exact plan is left to POT."""
Plans = Mapping[str, Tensor]


def transport(gain: Tensor, regularization: float = 0.0, iterations: int = 500) -> Tensor:
    """The plan ``[n, m]`` with uniform marginals that maximises ``sum T gain - regularization * scale * KL``, fp64.

    Exact for 0: an assignment where n = m; else both sides are cut into lcm(n, m) equal shares, if that is at most
    `REPLICAS`, and the shares assigned (an exact optimum, since some optimal plan moves whole shares); else by POT's
    network simplex, the extra ``ot``. Above 0: Sinkhorn's iterations in the log domain, ``scale`` the mean |gain|.

    Raises:
        UsageError: POT is needed and not installed, or regularization is negative.
        LinalgError: gains are not finite.
    """
    if regularization < 0:
        raise UsageError(f"regularization is {regularization}", fix="give 0 or more")
    gain = gain.double()
    if not bool(torch.isfinite(gain).all()):
        raise LinalgError("no transport for gains that are not finite")
    n, m = gain.shape
    if regularization > 0:
        return _sinkhorn(gain, regularization, iterations)
    shares = math.lcm(n, m)
    if shares <= REPLICAS:
        rows, columns = shares // n, shares // m
        wide = gain.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        p = assign(wide)
        plan = torch.zeros(n, m, dtype=torch.float64)
        plan.index_put_(
            (torch.arange(shares) // rows, p // columns), torch.ones((), dtype=torch.float64), accumulate=True
        )
        return plan / shares
    try:
        import ot
    except ImportError as e:
        raise UsageError(
            f"an exact plan between {n} and {m} neurons needs POT",
            why=f"their least common multiple is {shares}, above {REPLICAS}",
            fix="pip install 'mergekit-lr[ot]', or give a regularization above 0",
        ) from e
    a, b = torch.full((n,), 1 / n, dtype=torch.float64), torch.full((m,), 1 / m, dtype=torch.float64)
    return torch.from_numpy(ot.emd(a.numpy(), b.numpy(), (gain.max() - gain).numpy()))


def _sinkhorn(gain: Tensor, regularization: float, iterations: int) -> Tensor:
    n, m = gain.shape
    scale = float(gain.abs().mean()) or 1.0
    kernel = gain / (regularization * scale)
    u, v = torch.zeros(n, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
    with one_thread():
        for _ in range(iterations):
            u = -math.log(n) - torch.logsumexp(kernel + v, dim=1)
            v = -math.log(m) - torch.logsumexp(kernel + u[:, None], dim=0)
        return (kernel + u[:, None] + v).exp()


def soft_match(
    spec_a: SymmetrySpec,
    spec_b: SymmetrySpec,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    *,
    regularization: float = 0.0,
    sweeps: int = 3,
    threads: int = 1,
    only: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Plans of all groups that are softened. For equal widths give a ``b`` that is already permuted.

    ``only``: patterns (``ffn.*``) of the groups to soften, where they are equally wide; the others stay as they are.

    The first sweep goes from the inputs on, each plan using the tensors whose other axes are fixed or planned; later
    sweeps use all tensors.

    Raises:
        CheckpointError: other widths differ than those of groups that can be softened.
    """
    soft = [g for g in spec_a.groups if _is_soft(spec_a, g)]
    check_widths(spec_a, spec_b)
    soft = [g for g in soft if not only or _named(g, only) or spec_a.groups[g].size != spec_b.groups[g].size]
    plans: dict[str, Tensor] = {}
    for _ in range(sweeps):
        waiting = list(soft)
        while waiting:
            gains = {g: _gain(spec_a, spec_b, g, a, b, plans, soft, threads) for g in waiting}
            ready = {g: gain for g, gain in gains.items() if gain is not None}
            if not ready:
                raise CheckpointError("no path from the inputs plans every group", why=f"{waiting[0]} is cut off")
            for g, gain in ready.items():
                plans[g] = transport(gain, regularization)
                waiting.remove(g)
    return plans


def soft_apply(spec_a: SymmetrySpec, plans: Plans, name: str, tensor: Tensor) -> Tensor:
    """B's tensor brought to A's neurons, fp64."""
    out = tensor.double() if tensor.is_floating_point() else tensor
    for m in mixed_axes(spec_a, plans, name) if out.is_floating_point() else ():
        out = mix(out, m.axis, plans[m.group], m.block, m.reads)
    return out


@dataclass(frozen=True)
class Mixed:
    """An axis that a plan mixes; it counts through the group, then through ``block`` places that stay together."""

    axis: int
    group: str
    block: int
    reads: bool


def mixed_axes(spec: SymmetrySpec, plans: Plans, name: str) -> list[Mixed]:
    """The axes of a tensor that plans mix, in order."""
    entry, _ = spec.of_tensor[name]
    found = []
    for axis, what in enumerate(entry.axes):
        group = _soft_group(what)
        if group is not None and group in plans:
            block = what[0][1].size if len(what[0]) > 1 else 1
            found.append(Mixed(axis, group, block, axis in entry.reads))
    return found


def mix(x: Tensor, axis: int, plan: Tensor, block: int, reads: bool) -> Tensor:
    """One axis of an fp64 tensor through a plan ``[n, m]``: ``m * block`` places become ``n * block``."""
    n, m = plan.shape
    weights = plan * (m if reads else n)
    x = unfold(x, axis, (m, block)).movedim(axis, 0)
    mixed: Tensor = torch.tensordot(weights, x, dims=([1], [0]))
    back = mixed.movedim(0, axis)
    return back.reshape(*back.shape[:axis], n * block, *back.shape[axis + 2 :])


def _soft_group(axis: Axis) -> str | None:
    """The group of an axis that is nothing but this group, perhaps times fixed places."""
    if len(axis) != 1 or any(f.group is not None for f in axis[0][1:]):
        return None
    return axis[0][0].group if len(axis[0]) <= 2 else None


def _is_soft(spec: SymmetrySpec, group: str) -> bool:
    if spec.groups[group].parent is not None or spec.children(group):
        return False
    alone = all(
        _soft_group(axis) == group
        for t in spec.of_group[group]
        for axis in t.axes
        if any(f.group == group for s in axis for f in s)
    )
    return alone and all(t.stack is None or t.stack != group for t in spec.of_group[group])


def _gain(
    spec_a: SymmetrySpec, spec_b: SymmetrySpec, group: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor],
    plans: Plans, soft: Sequence[str], threads: int,
) -> Tensor | None:  # fmt: skip
    """Inner products of neurons over the tensors whose other axes fit; None where there is no such tensor yet."""
    others = {g: p for g, p in plans.items() if g != group}
    pairs = []
    for entry in spec_a.of_group[group]:
        for name in entry.names:
            if not a[name].is_floating_point():
                continue
            for axis, what in enumerate(entry.axes):
                if _soft_group(what) != group:
                    continue
                open_axes = [
                    g for i, w in enumerate(entry.axes)
                    if i != axis and (g := _soft_group(w)) in soft and g not in others
                ]  # fmt: skip
                if open_axes:
                    continue
                n, m = spec_a.groups[group].size, spec_b.groups[group].size
                moved = soft_apply(spec_a, others, name, b[name])
                pairs.append((_rows(a[name], axis, n), _rows(moved, axis, m)))
    return cross_gram(pairs, threads=threads) if pairs else None


def _rows(x: Tensor, axis: int, n: int) -> Tensor:
    return unfold(x, axis, (n, -1)).movedim(axis, 0).reshape(n, -1)


def check_widths(a: SymmetrySpec, b: SymmetrySpec, where: str = "") -> None:
    """Two models may differ in the widths of groups that can be softened, and in nothing else.

    Raises:
        CheckpointError: they do.
    """
    if set(a.groups) != set(b.groups):
        odd = min(set(a.groups) ^ set(b.groups))
        raise CheckpointError(f"only one of the models has the group {odd}", where=where, why="their depths differ")
    for g in a.groups:
        if not _is_soft(a, g) and a.groups[g].size != b.groups[g].size:
            raise CheckpointError(
                f"{g} has {a.groups[g].size} parts in one model and {b.groups[g].size} in the other",
                where=where,
                why="heads and experts are not mixed",
            )


def _named(group: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(group, p) for p in patterns)
