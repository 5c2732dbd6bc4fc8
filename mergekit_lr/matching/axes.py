"""What an alignment means for each axis of each tensor: kept in a file, read back while merging."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.writer import write_safetensors
from mergekit_lr.matching.align import Aligned
from mergekit_lr.matching.member import place
from mergekit_lr.matching.saved import save_members
from mergekit_lr.matching.soft import mix, mixed_axes
from mergekit_lr.matching.vocabulary import ROWS, row_map

PERMUTATIONS = "permutations.safetensors"
AXES = "axes.safetensors"
REPORT = "report.json"


def write_alignment(folder: Path, aligned: Aligned, models: Sequence[Checkpoint], choice: str) -> None:
    """Permutations and plans, what they mean for each axis of each tensor, and the report, which comes last.

    An axis is int32: ``sign * (index + 1)`` of what each place takes, 0 for a token that the model does not have. Equal
    axes are stored once. Along a mixed axis a plan is applied after that, see `mergekit_lr.matching.soft`.
    """
    save_members(
        folder / PERMUTATIONS, aligned.members, [m.reference for m in models], family=aligned.specs[0].family,
        permutations=choice, plans=aligned.plans,
    )  # fmt: skip
    axes: dict[str, Tensor] = {}
    uses: dict[str, dict[str, Any]] = {}
    known: dict[bytes, str] = {}
    for i in range(1, len(models)):
        spec, member, plans = aligned.specs[i], aligned.members[i], aligned.plans[i]
        axes |= {f"{i}.plan.{g}": p for g, p in plans.items()}
        for name in spec.of_tensor:
            found = place(spec, member, name)
            named: dict[str, str] = {}
            for axis, (index, sign) in enumerate(zip(found.index, found.signs, strict=True)):
                tokens = row_map(models[0], models[i]) if axis == 0 and name in ROWS else None
                if index is None and sign is None and tokens is None:
                    continue
                code = _code(index, sign) if tokens is None else (tokens + 1).to(torch.int32)
                key = known.setdefault(code.numpy().tobytes(), f"axis.{len(known)}")
                axes[key] = code
                named[str(axis)] = key
            mixed = {
                str(m.axis): [f"{i}.plan.{m.group}", m.block, m.reads]
                for m in mixed_axes(aligned.specs[0], plans, name)
            }
            if named or mixed or found.source != name:
                uses[f"{i}.{name}"] = {"source": found.source, "axes": named, "mixed": mixed}
    write_safetensors(folder / AXES, axes or {"axis.none": torch.zeros(1, dtype=torch.int32)})
    text = json.dumps({**aligned.report, "uses": uses}, indent=1)
    partial = folder / f"{REPORT}.partial"
    fs.write_file(partial, text.encode())
    fs.rename(partial, folder / REPORT)


def _code(index: Tensor | None, sign: Tensor | None) -> Tensor:
    if index is None:
        assert sign is not None
        index = torch.arange(len(sign))
    code = (index + 1).to(torch.int32)
    return code if sign is None else code * sign.to(torch.int32)


def placed(
    tensor: Tensor, codes: Mapping[int, Tensor], plans: Mapping[int, tuple[Tensor, int, bool]], first: Tensor
) -> Tensor:
    """A tensor brought to the first model's places: axes filled as ``codes`` say, then mixed by ``plans``.

    ``plans[axis] = (plan, block, reads)``. Token rows that the tensor does not have are those of ``first``.
    """
    absent = None
    for axis, code in codes.items():
        index = code.long().abs() - 1
        tensor = tensor.index_select(axis, index.clamp_min(0))
        if bool((index < 0).any()):
            absent = (index < 0).reshape([-1 if a == axis else 1 for a in range(tensor.ndim)])
        elif bool((code < 0).any()):
            shape = [1] * tensor.ndim
            shape[axis] = -1
            tensor = tensor * code.sign().to(tensor.dtype).reshape(shape)
    if plans:
        wide = tensor.double()
        for axis, (plan, block, reads) in plans.items():
            wide = mix(wide, axis, plan, block, reads)
        tensor = wide.to(tensor.dtype)
    return tensor if absent is None else torch.where(absent, first, tensor)
