"""Says which input spoiled a tensor: model, tensor, first index, how many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_lr.checkpoint.dtypes import OVERFLOWS_AT
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.engine.job import Inputs
from mergekit_lr.errors import NonFiniteError
from mergekit_lr.graph.nodes import Sink, Source
from mergekit_lr.lazy import torch
from mergekit_lr.method import Companion
from mergekit_lr.pieces import element_count

if TYPE_CHECKING:
    from torch import Tensor

STEP = 1 << 20


@dataclass(frozen=True)
class NonFinite:
    """The four parts of the error or warning."""

    what: str
    where: str
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what} ({self.why})"


def complain(job: Inputs, sources: Sequence[Source], name: str, method: str, sink: Sink | None, largest: float) -> None:
    """Say that a value is not finite, in the way that the recipe wants it said.

    Raises:
        NonFiniteError: the recipe says ``nonfinite: error``, or nothing.
    """
    if job.nonfinite == "allow":
        return
    found = explain_nonfinite(job.checkpoints, sources, name, method, sink, largest)
    if job.nonfinite == "warn":
        job.warn(str(found))
        return
    raise NonFiniteError(found.what, where=found.where, why=found.why, fix=found.fix)


def explain_nonfinite(
    checkpoints: Sequence[Checkpoint],
    sources: Sequence[Source],
    name: str,
    method: str,
    sink: Sink | None,
    largest: float,
) -> NonFinite:
    """Read the inputs of an operation again and find the first value that is not finite.

    Where all inputs are finite, the fault is the merge's: an overflow in the cast, or in the arithmetic.
    """
    for source in sources:
        checkpoint = checkpoints[source.model]
        first, count = None, 0
        n = element_count(checkpoint.tensors[source.tensor].shape)
        for start in range(0, n, STEP):
            bad = ~torch.isfinite(checkpoint.read(source.tensor, start, min(n, start + STEP)).float())
            here = int(bad.sum())
            if here and first is None:
                first = start + int(bad.to(torch.uint8).argmax())
            count += here
        if first is not None:
            return NonFinite(
                f"tensor {source.tensor!r} holds {count} values that are NaN or infinite",
                checkpoint.reference,
                f"the first is at flat index {first} of {n}",
                "use a sound checkpoint, or set `nonfinite: warn` or `allow` in the recipe",
            )
    if sink is not None and math.isfinite(largest):
        return NonFinite(
            f"merged values reach {largest:.6g}",
            f"tensor {sink.name!r}",
            f"{sink.dtype} becomes infinite from {OVERFLOWS_AT[sink.dtype]:.6g}",
            "set out_dtype: bfloat16 or float32",
        )
    return NonFinite(
        "the merge gave values that are not finite",
        f"tensor {name!r}",
        f"{method} overflowed fp32 on finite inputs",
        "look at the weights and lambda in the recipe",
    )


def check_companion(values: Tensor, companion: Companion, file: str, name: str) -> None:
    """Refuse NaN and infinity in a companion, and negative values where there can be none.

    Raises:
        NonFiniteError: says which file and entry.
    """
    if not values.numel():
        return
    low, high = (float(x) for x in torch.aminmax(values))
    finite = math.isfinite(low) and math.isfinite(high)
    if finite and not (companion.nonnegative and low < 0):
        return
    raise NonFiniteError(
        f"the entry of {name!r} holds " + (f"{low:.3g}" if finite else "NaN or infinity"),
        where=f"{companion.parameter} {file}",
        why="squared gradients are never negative" if finite else "the training run diverged, or the file is damaged",
        fix=companion.make,
    )
