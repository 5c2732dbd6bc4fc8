"""PLeaS on two checkpoints: both as running networks, the result with the names of the first one's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError
from mergekit_lr.matching.align import Aligned
from mergekit_lr.matching.pleas import linear_layers, pleas
from mergekit_lr.matching.running import Samples, loaded


def refitted(
    models: Sequence[Checkpoint],
    aligned: Aligned,
    samples: Samples,
    budgets: Mapping[str, float],
    ridge: float,
    activation: str,
) -> tuple[dict[str, Tensor], list[str]]:
    """The merged tensors, fp32, integers left out; and the names of the layers that were refitted.

    Raises:
        CheckpointError: the networks have BatchNorm, no linear layer, or parameters by other names than the tensors.
    """
    where = models[0].reference
    spec = aligned.specs[0]
    tables = [{n: aligned.read(i)(n).contiguous() for n in models[0].tensors} for i in (0, 1)]
    networks = [loaded(models[0], t, activation) for t in tables]
    layers = linear_layers(spec, networks[0])
    if any(isinstance(m, _BatchNorm) for m in networks[0].modules()):
        raise CheckpointError(
            "networks with BatchNorm are not refitted",
            where=where,
            fix="use weight_matching with `reset_statistics: true`",
        )
    lacking = sorted(set(models[0].tensors) - set(networks[0].state_dict()))
    if lacking or not layers:
        raise CheckpointError(
            "the model cannot be refitted",
            where=where,
            why=f"the running network calls {lacking[0]} by another name" if lacking else "it has no linear layer",
            fix="use weight_matching",
        )
    merged = pleas(spec, networks[0], networks[1], samples.batches, budgets=budgets, ridge=ridge)
    return {n: merged[n].float() for n, t in tables[0].items() if t.is_floating_point()}, layers
