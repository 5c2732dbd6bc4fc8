"""Statistics of a merged network, measured anew on data while a recipe is prepared: BatchNorm's, or every unit's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError
from mergekit_lr.linalg.assignment import one_thread
from mergekit_lr.matching.after import How
from mergekit_lr.matching.align import Aligned
from mergekit_lr.matching.batch_norm import repair_from, reset
from mergekit_lr.matching.running import Samples, loaded

MENDED = "mended.safetensors"


def mended(
    models: Sequence[Checkpoint],
    aligned: Aligned,
    hows: Mapping[str, How],
    samples: Samples,
    *,
    activation: str,
    repair: bool,
) -> dict[str, Tensor]:
    """The tensors of the merged network that new statistics change, fp32.

    Without ``repair``: running means and variances of BatchNorm, over all samples. With it: weights and biases of
    linear layers and convolutions, see `mergekit_lr.matching.batch_norm.repair_from`. ``hows``: how each tensor is
    merged.

    Raises:
        CheckpointError: there is nothing to measure, or nowhere to put it.
    """
    where = models[0].reference
    network = loaded(models[0], _merged(models[0], aligned, hows), activation)
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = {n: t.clone() for n, t in network.state_dict().items()}
    with one_thread():
        if repair:
            _check(network, norms, set(models[0].tensors), where)
            how = next(iter(hows.values()))
            others = [loaded(models[0], _table(models[0], aligned, i), activation) for i in _inputs(how, len(models))]
            repair_from(network, others, how.shares(), samples.batches)
        elif not norms:
            raise CheckpointError(
                "the model has no BatchNorm statistics to reset", where=where, fix="leave `reset_statistics` out"
            )
        else:
            reset(network, samples.batches)
    after = {n: t for n, t in network.state_dict().items() if t.is_floating_point()}
    changed = {n: t.detach().float() for n, t in after.items() if n not in before or not t.equal(before[n])}
    renamed = sorted(set(changed) - set(models[0].tensors))
    if renamed:
        raise CheckpointError(
            "its statistics cannot be written back",
            where=where,
            why=f"the running network calls a tensor {renamed[0]}, and no tensor of the checkpoint has that name",
        )
    return changed


def _inputs(how: How, count: int) -> range:
    return range(how.base, count)


def _table(model: Checkpoint, aligned: Aligned, i: int) -> dict[str, Tensor]:
    read = aligned.read(i)
    return {n: read(n).contiguous() for n in model.tensors}


def _merged(model: Checkpoint, aligned: Aligned, hows: Mapping[str, How]) -> dict[str, Tensor]:
    out = {}
    for name in model.tensors:
        first = aligned.reads[0](name)
        if name not in hows:
            out[name] = first
            continue
        others = [aligned.read(i)(name).float() for i in range(1, len(aligned.members))]
        out[name] = hows[name].merged([first.float(), *others], name).contiguous()
    return out


def _check(network: nn.Module, norms: Sequence[nn.Module], names: set[str], where: str) -> None:
    if norms:
        raise CheckpointError(
            "a network with BatchNorm is not repaired but gets new statistics",
            where=where,
            fix="set `reset_statistics: true` instead of `repair: true`",
        )
    layers = [n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)][:-1]
    lacking = [n for n in layers if f"{n}.bias" not in names]
    if lacking or not layers:
        raise CheckpointError(
            "the network cannot be repaired",
            where=where,
            why=f"{lacking[0]} has no bias that could take the shift" if lacking else "it has no hidden layer",
        )
