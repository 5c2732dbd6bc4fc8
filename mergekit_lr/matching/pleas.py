"""PLeaS: merge the neurons that match, keep the others of both models, then refit every linear layer by least squares.

Source: Nasery, Hayase, Koh, Oh, "PLeaS: Merging Models with Permutations and Least Squares", arXiv 2407.02447.

With a *budget* r in [1, 2] a group of n neurons becomes ``round(r n)``: the ``2 n - round(r n)`` best matched pairs
are merged into one neuron each, the rest of A's and of B's are kept, in this order. Every layer ``y = x W^T + b`` is
then the minimiser of

    sum over samples of ||W x + b - y||^2 + ridge * mean(diag X^T X) * ||W - W_0||^2

where x holds, for a merged neuron, the mean of what the two models have there, and for a kept one its own model's
value; y likewise; W_0 is the mean (or the kept rows) that weight matching alone would give.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergekit_lr.arch.symmetry import Axis, SymmetrySpec
from mergekit_lr.errors import CheckpointError, UsageError
from mergekit_lr.linalg.assignment import one_thread
from mergekit_lr.matching.occurrences import occurrences
from mergekit_lr.matching.running import Batch, run

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Split:
    """``merged``: neurons that become one; ``kept``: those that each model keeps. Numbers after alignment, sorted."""

    merged: Tensor
    kept: Tensor

    @property
    def width(self) -> int:
        return len(self.merged) + 2 * len(self.kept)


def split(spec: SymmetrySpec, group: str, a: Tensors, b: Tensors, budget: float) -> Split:
    """Which neurons of an aligned pair to merge: those of the highest cosine over all that belongs to them.

    Raises:
        UsageError: the budget is outside 1 .. 2.
    """
    if not 1 <= budget <= 2:
        raise UsageError(f"a budget of {budget}", fix="give 1 (merge every neuron) to 2 (keep all of both)")
    n = spec.groups[group].size
    keep = round(budget * n) - n
    dot, left, right = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
    for o in occurrences(spec, group):
        for name in o.entry.names:
            x, y = o.unfold(a[name]).double(), o.unfold(b[name]).double()
            dot, left, right = dot + (x * y).sum(1), left + (x * x).sum(1), right + (y * y).sum(1)
    cosine = dot / (left * right).sqrt().clamp_min(1e-300)
    order = torch.argsort(cosine, stable=True)
    return Split(order[keep:].sort().values, order[:keep].sort().values)


def pleas(
    spec: SymmetrySpec,
    a: nn.Module,
    b: nn.Module,
    batches: Sequence[Batch],
    *,
    budgets: Mapping[str, float] | None = None,
    ridge: float = 1e-3,
) -> dict[str, Tensor]:
    """State dict of the merged network, in fp64. ``b`` holds weights that are already aligned to ``a``'s.

    Every ``nn.Linear`` of the networks is refitted from what goes in and comes out of it on ``batches``; other tensors
    are averaged. ``budgets[group]`` widens groups of plain neurons (1 where none is given); the caller builds a network
    of the new widths around the result.

    Raises:
        CheckpointError: a group that is to be widened is not a plain axis everywhere.
        UsageError: a budget is outside 1 .. 2.
    """
    tensors = _covered(spec, a), _covered(spec, b)
    splits = {g: split(spec, g, *tensors, budget) for g, budget in (budgets or {}).items()}
    out = {n: _averaged(spec, splits, n, x, tensors[1][n]) for n, x in tensors[0].items()}
    with one_thread():
        for name, sums in _normal_equations(spec, splits, a, b, batches).items():
            weight, bias = f"{name}.weight", f"{name}.bias"
            out[weight], shift = sums.solve(out[weight], out.get(bias), ridge)
            if shift is not None:
                out[bias] = shift
    return out


def _covered(spec: SymmetrySpec, model: nn.Module) -> dict[str, Tensor]:
    """A network's tensors; one that is another one by a second name (a tied head) is left out with its second name."""
    return {n: t.detach() for n, t in model.state_dict().items() if n in spec.of_tensor}


def _averaged(spec: SymmetrySpec, splits: Mapping[str, Split], name: str, x: Tensor, y: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x.clone()
    entry, _ = spec.of_tensor[name]
    x, y = x.double(), y.double()
    shares = [torch.full([1] * x.ndim, 0.5, dtype=torch.float64)] * 2
    for axis, what in enumerate(entry.axes):
        group = _plain_group(what, splits, name)
        if group is None:
            continue
        s = splits[group]
        x, y = (_spread(t, axis, s, which) for which, t in enumerate((x, y)))
        if axis not in entry.reads:  # rows of a kept neuron are one model's alone
            m, k = len(s.merged), len(s.kept)
            shape = [1] * x.ndim
            shape[axis] = -1
            own = [torch.tensor([0.5] * m + [1.0 - w] * k + [float(w)] * k, dtype=torch.float64) for w in (0, 1)]
            shares = [o.reshape(shape) for o in own]
    return x * shares[0] + y * shares[1]


def _plain_group(axis: Axis, splits: Collection[str], name: str) -> str | None:
    groups = [f.group for s in axis for f in s if f.group in splits]
    if not groups:
        return None
    if len(axis) != 1 or len(axis[0]) != 1:
        raise CheckpointError(f"{groups[0]} cannot be widened", where=name, why="it is only a factor of an axis there")
    return groups[0]


def _spread(x: Tensor, axis: int, s: Split, which: int) -> Tensor:
    """One model's values at the places of the widened axis: merged, kept by A, kept by B; 0 where it has none."""
    merged, kept = x.index_select(axis, s.merged), x.index_select(axis, s.kept)
    empty = torch.zeros_like(kept)
    return torch.cat([merged, empty, kept] if which else [merged, kept, empty], axis)


class _Sums:
    """Normal equations of one layer: ``X^T X`` and ``X^T Y`` in fp64, with a column of ones for the bias."""

    def __init__(self) -> None:
        self.xx: Tensor | None = None
        self.xy: Tensor | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        self.xx = x.T @ x if self.xx is None else self.xx + x.T @ x
        self.xy = x.T @ y if self.xy is None else self.xy + x.T @ y

    def solve(self, weight: Tensor, bias: Tensor | None, ridge: float) -> tuple[Tensor, Tensor | None]:
        assert self.xx is not None and self.xy is not None
        n = weight.shape[1]
        start = torch.cat(
            [weight, (torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias)[:, None]], 1
        )
        xx, xy = (self.xx[:n, :n], self.xy[:n]) if bias is None else (self.xx, self.xy)
        start = start[:, : len(xx)]
        pull = ridge * float(xx.diagonal().mean()) + 1e-300
        system = xx + pull * torch.eye(len(xx), dtype=xx.dtype)
        found = torch.cholesky_solve(xy + pull * start.T, torch.linalg.cholesky(system)).T
        return found[:, :n], None if bias is None else found[:, n]


def _normal_equations(
    spec: SymmetrySpec, splits: Mapping[str, Split], a: nn.Module, b: nn.Module, batches: Sequence[Batch]
) -> dict[str, _Sums]:
    names = linear_layers(spec, a)
    sums = {n: _Sums() for n in names}
    for batch in batches:
        seen = [_record(model, names, batch) for model in (a, b)]
        for n in names:
            entry, _ = spec.of_tensor[f"{n}.weight"]
            group_out, group_in = (_plain_group(axis, splits, n) for axis in entry.axes)
            (x_a, y_a), (x_b, y_b) = (s[n] for s in seen)
            sums[n].add(_mixed(x_a, x_b, splits, group_in), _mixed(y_a, y_b, splits, group_out))
    return sums


def linear_layers(spec: SymmetrySpec, network: nn.Module) -> list[str]:
    """Names of the layers that are refitted: linear ones whose weight is not another tensor by a second name."""
    return [n for n, m in network.named_modules() if isinstance(m, nn.Linear) and f"{n}.weight" in spec.of_tensor]


def widened_shape(spec: SymmetrySpec, name: str, shape: tuple[int, ...], widths: Mapping[str, int]) -> tuple[int, ...]:
    """A tensor's shape once groups have other ``widths``.

    Raises:
        CheckpointError: such a group is only a factor of an axis.
    """
    axes = spec.of_tensor[name][0].axes
    groups = [_plain_group(axis, widths, name) for axis in axes]
    return tuple(n if g is None else widths[g] for g, n in zip(groups, shape, strict=True))


def _record(model: nn.Module, names: list[str], batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> object:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = (inputs[0].flatten(0, -2).double(), output.flatten(0, -2).double())

        return keep

    handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in names]  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            run(model, batch)
    finally:
        for h in handles:
            h.remove()
    return seen


def _mixed(x: Tensor, y: Tensor, splits: Mapping[str, Split], group: str | None) -> Tensor:
    if group is None:
        return (x + y) / 2
    s = splits[group]
    merged = (x.index_select(1, s.merged) + y.index_select(1, s.merged)) / 2
    return torch.cat([merged, x.index_select(1, s.kept), y.index_select(1, s.kept)], 1)
