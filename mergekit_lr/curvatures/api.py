"""The public ``curvature``: a statistics file of second moments or Fisher diagonals under the weights' names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergekit_lr.checkpoint.companion import COLUMN, ROW
from mergekit_lr.checkpoint.writer import Entry, FileWriter
from mergekit_lr.curvatures.moments import Moment, Moments, is_factorable, sums_of
from mergekit_lr.errors import CheckpointError, NonFiniteError, UsageError
from mergekit_lr.lazy import torch
from mergekit_lr.preconditioned import bias_correction

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["full", "rank1"]
SUFFIX = {"text": ".fisher"}


@dataclass(frozen=True)
class Written:
    """What a call wrote: the file, how many tensors, in which form, from which kind of source."""

    out: Path
    tensors: int
    nbytes: int
    metadata: dict[str, str]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "metadata": self.metadata,
            "warnings": list(self.warnings),
        }


def curvature(
    checkpoint: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    names: str | Path | None = None,
    form: Form = "full",
    dtype: Literal["float32", "bfloat16"] = "float32",
    text: Sequence[str | Path] | None = None,
    samples: int = 256,
    sequence_length: int = 256,
    labels: Literal["sampled", "text"] = "sampled",
    seed: int = 0,
    device: str = "auto",
    max_memory: str | int | None = None,
    overwrite: bool = False,
) -> Written:
    """Write the curvature of a trained model to a safetensors file, for `ota` and `fisher`.

    Without ``text`` the second moments of a training checkpoint are taken: see `sources.read_moments` for the kinds
    that are read. They are divided by ``1 - beta2^step`` where both are known. With ``text`` the diagonal Fisher
    information of the model ``checkpoint`` is estimated: see `estimate.fisher_diagonal`.

    Args:
        model: folder of the model that was trained, where ``checkpoint`` does not hold its config.
        names: JSON list of parameter names in the optimizer's order, where no model tells it.
        form: ``full``, or ``rank1``: row and column sums of every matrix (vectors stay whole).
        dtype: of full entries; sums are always fp32.
        text, samples, sequence_length, labels, seed, device, max_memory: of the estimate.

    Raises:
        CheckpointError: the checkpoint is missing, refused, damaged, or does not fit its model.
        NonFiniteError: a second moment is NaN, infinite or negative.
        UsageError: ``out`` exists, or a number is out of range.
        ResourceError: the estimate does not fit ``max_memory``; the file system refuses.
    """
    target = Path(out)
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists", fix="give another path, or overwrite it with --overwrite")
    if target.suffix != ".safetensors":
        raise UsageError(f"{target} does not end in .safetensors", fix="name the file OUT.safetensors")
    if form not in ("full", "rank1") or dtype not in ("float32", "bfloat16") or labels not in ("sampled", "text"):
        raise UsageError("an unknown form, dtype or kind of labels", fix="see mergekit-lr curvature --help")
    if text:
        from mergekit_lr.curvatures.estimate import fisher_diagonal
        from mergekit_lr.engine.plan import choose_device

        moments = fisher_diagonal(
            checkpoint, text, form=form, samples=samples, sequence_length=sequence_length, labels=labels, seed=seed,
            device=choose_device(device), max_memory=max_memory,
        )  # fmt: skip
    else:
        from mergekit_lr.curvatures.sources import read_moments

        where = None if model is None else Path(model)
        moments = read_moments(Path(checkpoint), where, None if names is None else Path(names))
    try:
        return _write(moments, target, form, "BF16" if dtype == "bfloat16" else "F32")
    finally:
        moments.close()


def _write(moments: Moments, target: Path, form: Form, dtype: str) -> Written:
    known = [m.unbiased or (m.step is not None and m.beta2 is not None) for m in moments.entries.values()]
    corrected = all(known)
    warnings = list(moments.warnings)
    if not corrected:
        warnings.append("step or beta2 is not known for every tensor, so Adam's bias is not corrected")
    suffix = SUFFIX.get(moments.source, ".exp_avg_sq")
    entries: list[Entry] = []
    for name, m in sorted(moments.entries.items()):
        if m.factored or (form == "rank1" and is_factorable(m.shape)):
            entries += [Entry(name + suffix + ROW, "F32", m.shape[:-1])]
            entries += [Entry(name + suffix + COLUMN, "F32", (*m.shape[:-2], m.shape[-1]))]
        else:
            entries.append(Entry(name + suffix, dtype, m.shape))
    metadata = _metadata(moments, corrected, form)
    with FileWriter(target, entries, metadata) as writer:
        for name, m in sorted(moments.entries.items()):
            _write_one(writer, name + suffix, m, form, dtype, corrected)
    return Written(target, len(moments.entries), target.stat().st_size, metadata, tuple(warnings))


def _write_one(writer: FileWriter, name: str, m: Moment, form: Form, dtype: str, corrected: bool) -> None:
    found = m.read()
    factor = 1.0
    if corrected and not m.unbiased:
        factor = bias_correction({"step": str(m.step), "beta2": str(m.beta2)})
    parts = list(found) if isinstance(found, tuple) else [found]
    for part in parts:
        _check(part, name)
    if len(parts) == 1 and form == "rank1" and is_factorable(m.shape):
        parts = list(sums_of(parts[0]))
    scaled = [p * factor if factor != 1 else p for p in parts]
    if len(scaled) == 2:
        writer.write(name + ROW, scaled[0].float())
        writer.write(name + COLUMN, scaled[1].float())
    else:
        writer.write(name, scaled[0].to(torch.bfloat16 if dtype == "BF16" else torch.float32))


def _check(values: Tensor, name: str) -> None:
    if not values.numel():
        return
    low, high = (float(x) for x in torch.aminmax(values))
    if math.isfinite(low) and math.isfinite(high) and low >= 0:
        return
    raise NonFiniteError(
        f"the second moments of {name!r} hold " + ("a negative value" if low < 0 else "NaN or infinity"),
        why="squared gradients are neither",
        fix="the state is damaged or the run diverged: take an earlier checkpoint, or estimate from text",
    )


def _metadata(moments: Moments, corrected: bool, form: Form) -> dict[str, str]:
    steps = {m.step for m in moments.entries.values() if m.step is not None}
    betas = {m.beta2 for m in moments.entries.values() if m.beta2 is not None}
    found = {"kind": "curvature", "form": form, "bias_corrected": str(corrected).lower(), **moments.facts}
    found["source"] = moments.source
    if len(steps) == 1:
        found["step"] = f"{steps.pop():g}"
    if len(betas) == 1:
        found["beta2"] = repr(betas.pop())
    if not moments.entries:
        raise CheckpointError("there are no second moments to write")
    return found
