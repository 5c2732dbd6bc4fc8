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


def reset(model: nn.Module, batches: Sequence[Tensor]) -> int:
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
                model(batch)
    finally:
        for m, (momentum, _) in zip(layers, before, strict=True):
            m.momentum = momentum
        model.train(was_training)
        for m, (_, training) in zip(layers, before, strict=True):
            m.train(training)
    return len(layers)


def repair(merged: nn.Module, a: nn.Module, b: nn.Module, batches: Sequence[Tensor], t: float = 0.5) -> int:
    """Scale and shift the outputs of every ``nn.Linear`` and convolution but the last.

    After it, each unit of ``merged`` has mean ``(1 - t) mu_a + t mu_b`` and standard deviation ``(1 - t) s_a + t s_b``
    over the batches, the two models' own (b aligned to a). Layers are mended in order, since each changes what the next
    sees. Returns the number of layers mended.
    """
    names = [n for n, m in merged.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)][:-1]
    goal = [_moments(model, names, batches) for model in (a, b)]
    for n in names:
        mean, deviation = _moments(merged, [n], batches)[n]
        want_mean, want_deviation = ((1 - t) * goal[0][n][i] + t * goal[1][n][i] for i in (0, 1))
        scale = torch.where(deviation > 1e-12, want_deviation / deviation.clamp_min(1e-12), 1.0)
        layer = merged.get_submodule(n)
        assert isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)
        with torch.no_grad():
            weight = layer.weight
            weight.mul_(scale.to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1)))
            bias = torch.zeros(len(scale), dtype=weight.dtype) if layer.bias is None else layer.bias
            shift = (bias.double() - mean) * scale + want_mean
            layer.bias = nn.Parameter(shift.to(weight.dtype))
    return len(names)


def _moments(model: nn.Module, names: list[str], batches: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
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
                model(batch)
    finally:
        for h in handles:
            h.remove()
    found = {}
    for n, (count, total, squares) in sums.items():
        mean = total / count
        found[n] = (mean, (squares / count - mean.square()).clamp_min(0).sqrt())
    return found
