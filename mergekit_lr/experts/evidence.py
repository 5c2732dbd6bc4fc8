"""What is known of a model's mixtures before experts are chosen: statistics of calibration text, Grams of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lr.arch.moe import FP8_BLOCK, MoeLayer, Stored
from mergekit_lr.checkpoint.dtypes import torch_dtype
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError
from mergekit_lr.experts.deciding import Evidence
from mergekit_lr.experts.quantised import decode_fp8, decode_mxfp4
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lr.calibration.statistics import Statistics
    from mergekit_lr.rewrite import Preparation

STATISTICS = "statistics.safetensors"


def statistics_for(
    work: Preparation, checkpoint: Checkpoint, *, grams: Sequence[str], similarity_tokens: int, seed: int
) -> Statistics:
    """The statistics that a recipe names, or those of its calibration text, made once in the prepared folder."""
    from mergekit_lr.calibration.statistics import open_statistics

    calibration = work.recipe.calibration
    assert calibration is not None  # the recipe was checked for it
    if calibration.statistics is not None:
        return open_statistics(calibration.statistics, checkpoint)
    path = work.folder / STATISTICS
    if not path.exists():
        _calibrate(work, checkpoint, path, grams, similarity_tokens, seed)
    return open_statistics(path)


def _calibrate(
    work: Preparation, checkpoint: Checkpoint, path: Path, grams: Sequence[str], similarity_tokens: int, seed: int
) -> None:
    from mergekit_lr.calibration.calibrate import calibrate
    from mergekit_lr.engine.progress import ProgressEvent

    calibration = work.recipe.calibration
    assert calibration is not None

    def progress(event: ProgressEvent) -> None:
        work.tell(event.done_bytes, event.total_bytes, event.stage)

    calibrate(
        checkpoint.reference,
        path,
        [*calibration.text, *([calibration.dataset] if calibration.dataset else [])],
        samples=calibration.samples,
        sequence_length=calibration.sequence_length,
        grams=grams,
        similarity_tokens=similarity_tokens,
        device=work.device,
        max_memory=work.limit,
        seed=seed,
        progress=progress,
    )


def evidence_of(
    layers: Sequence[MoeLayer],
    statistics: Statistics,
    entries: frozenset[str],
    checkpoint: Checkpoint,
    grams: Sequence[str] = (),
) -> list[Evidence]:
    """The entries of every layer that transformers runs, in order; ``grams`` must be there too, but are not read.

    Raises:
        CheckpointError: the statistics lack an entry, or are of another number of experts.
    """
    found = []
    for layer in layers:
        if layer.extra:
            continue
        mixture = statistics.mixture(layer.index)
        sums = {entry: mixture[entry] for entry in sorted(entries)}
        for entry in grams:
            if entry not in mixture:
                raise CheckpointError(
                    f"there is no {entry} of {layer.block}",
                    where=str(statistics.path),
                    why="whitening needs the Grams of what enters the experts and their down projections",
                    fix="calibrate with --grams input --grams hidden, or leave out whiten",
                )
        if len(sums["routing_count"]) != layer.experts:
            raise CheckpointError(
                f"the statistics are of {len(sums['routing_count'])} experts",
                where=str(statistics.path),
                why=f"{layer.block} has {layer.experts}",
                fix="calibrate this model",
            )
        found.append(Evidence(layer.block, sums, weight_gram(layer, checkpoint)))
    return found


def weight_gram(layer: MoeLayer, checkpoint: Checkpoint, *, step: int = 1 << 22) -> Callable[[], Tensor]:
    """A function that gives inner products between experts' gate and up weights, fp64 ``[E, E]``, read once.

    Rows of all experts together take about ``step`` elements of memory at a time.
    """

    def compute() -> Tensor:
        gram = torch.zeros(layer.experts, layer.experts, dtype=torch.float64)
        for stored in layer.stored:
            if stored.slot.bias or "down" in stored.slot.holds or stored.suffix not in ("", "_blocks"):
                continue
            rows = stored.shape[0]
            size = stored.numel // rows * (2 if stored.suffix else 1)
            each = max(1, step // (layer.experts * size) // FP8_BLOCK) * FP8_BLOCK
            read = partial(_rows, layer, checkpoint, stored)
            for start in range(0, rows, each):
                x = torch.stack([read(e, start, min(rows, start + each)).reshape(-1) for e in range(layer.experts)])
                gram += x.double() @ x.double().T
        return gram

    return compute


def _rows(layer: MoeLayer, checkpoint: Checkpoint, stored: Stored, e: int, start: int, stop: int) -> Tensor:
    """Rows of one expert's part as it is stored, as floating point."""
    raw = _part(checkpoint, stored, e, start, stop)
    suffix = "_scale_inv" if stored.suffix == "" else "_scales"
    scales = next((s for s in layer.stored if s.slot.name == stored.slot.name and s.suffix == suffix), None)
    if scales is None:
        return raw.float()
    if stored.suffix == "_blocks":
        return decode_mxfp4(raw, _part(checkpoint, scales, e, start, stop))
    return decode_fp8(raw, _part(checkpoint, scales, e, start // FP8_BLOCK, -(-stop // FP8_BLOCK)))


def _part(checkpoint: Checkpoint, stored: Stored, e: int, start: int, stop: int) -> Tensor:
    slab, row = stored.slab(e), stored.numel // stored.shape[0]
    flat = checkpoint.read(slab.tensor, slab.start + start * row, slab.start + stop * row)
    return flat.view(torch_dtype(stored.dtype)).view(stop - start, *stored.shape[1:])
