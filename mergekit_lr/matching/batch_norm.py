"""BatchNorm after interpolation: its running statistics belong to neither of the two models.

The mean of two networks has activations of too little variance; new statistics mend most of that. `reset` measures
them on data. `repair` (Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair", arXiv
2211.08403) also gives networks without BatchNorm's statistics their variance back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mergekit_lr.errors import UsageError
from mergekit_lr.matching.running import Batch, run


def reset(model: nn.Module, batches: Sequence[Batch]) -> int:
    """Replace all running means and variances by those of ``batches``; returns how many layers had them.

    The mean over all batches, of equal weight (momentum None); layers are measured in one pass, in training mode for
    BatchNorm alone, so dropout stays off.

    Raises:
        UsageError: there is no batch.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not batches:
        raise UsageError("no data to measure statistics on", fix="give at least one batch")
    before = [(m.momentum, m.training) for m in layers]
    was_training = model.training
    model.eval()
    for m in layers:
        m.reset_running_stats()
        m.momentum = None
        m.train()
    try:
        with torch.no_grad():
            for batch in batches:
                run(model, batch)
    finally:
        for m, (momentum, _) in zip(layers, before, strict=True):
            m.momentum = momentum
        model.train(was_training)
        for m, (_, training) in zip(layers, before, strict=True):
            m.train(training)
    return len(layers)


def repair(merged: nn.Module, a: nn.Module, b: nn.Module, batches: Sequence[Batch], t: float = 0.5) -> int:
    """`repair_from` two models, b aligned to a, with shares ``1 - t`` and ``t``."""
    return len(repair_from(merged, [a, b], [1 - t, t], batches))


def repair_from(
    merged: nn.Module, models: Sequence[nn.Module], shares: Sequence[float], batches: Sequence[Batch]
) -> list[str]:
    """Scale and shift the outputs of every ``nn.Linear`` and convolution but the last; returns their names.

    After it, each unit of ``merged`` has mean ``sum_i share_i mu_i`` and standard deviation ``sum_i share_i s_i`` over
    the batches, with the aligned models' own. Layers are mended in order, since each changes what the next sees; one
    without a bias gets one.
    """
    names = [n for n, m in merged.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)][:-1]
    goal = [_moments(model, names, batches) for model in models]
    for n in names:
        mean, deviation = _moments(merged, [n], batches)[n]
        want_mean, want_deviation = (
            torch.stack([s * g[n][i] for s, g in zip(shares, goal, strict=True)]).sum(0) for i in (0, 1)
        )
        scale = torch.where(deviation > 1e-12, want_deviation / deviation.clamp_min(1e-12), 1.0)
        layer = merged.get_submodule(n)
        assert isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)
        with torch.no_grad():
            weight = layer.weight
            weight.mul_(scale.to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1)))
            bias = torch.zeros(len(scale), dtype=weight.dtype) if layer.bias is None else layer.bias
            shift = (bias.double() - mean) * scale + want_mean
            layer.bias = nn.Parameter(shift.to(weight.dtype))
    return names


def _moments(model: nn.Module, names: list[str], batches: Sequence[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of every unit of some layers over all batches, in fp64."""
    sums: dict[str, list[Tensor]] = {}

    def hook(name: str) -> object:
        def add(_: nn.Module, __: object, output: Tensor) -> None:
            units = output.movedim(1, -1) if output.ndim > 2 and not isinstance(_, nn.Linear) else output
            x = units.reshape(-1, units.shape[-1]).double()
            new = [torch.tensor(float(len(x)), dtype=torch.float64), x.sum(0), x.square().sum(0)]
            sums[name] = [p + q for p, q in zip(sums[name], new, strict=True)] if name in sums else new

        return add

    handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in names]  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            for batch in batches:
                run(model, batch)
    finally:
        for h in handles:
            h.remove()
    found = {}
    for n, (count, total, squares) in sums.items():
        mean = total / count
        found[n] = (mean, (squares / count - mean.square()).clamp_min(0).sqrt())
    return found
