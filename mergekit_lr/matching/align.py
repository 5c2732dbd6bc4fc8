"""Aligning the models of a recipe: before its output is laid out, once, kept in files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lr.arch.spec import spec_for
from mergekit_lr.arch.symmetry import SymmetrySpec
from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.dtypes import AVERAGED
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.writer import write_safetensors
from mergekit_lr.errors import CheckpointError, join_problems
from mergekit_lr.matching.activations import Cost, widened, with_activations
from mergekit_lr.matching.ascent import Matching, Tell, match_weights
from mergekit_lr.matching.diagnose import agreements, mean_agreement
from mergekit_lr.matching.many import match_many
from mergekit_lr.matching.member import Member, Read, apply, identity, place
from mergekit_lr.matching.saved import load_members, save_members, saved_choice
from mergekit_lr.matching.vocabulary import ROWS, row_map, take_rows

PERMUTATIONS = "permutations.safetensors"
AXES = "axes.safetensors"
REPORT = "report.json"
DIAGNOSED = 1024
"""Order up to which matrices are diagnosed during a merge; `mergekit-lr barrier` has no such limit."""
LOW = 0.5
"""Mean weighted agreement after matching below which a barrier is to be expected."""


def spec_of(permutations: str | None, model: Checkpoint) -> SymmetrySpec:
    """The spec that a recipe asks for, for its first model."""
    choice = permutations or "auto"
    if choice.endswith(".safetensors"):
        choice = saved_choice(Path(choice))
    shapes = {n: t.shape for n, t in model.tensors.items()}
    return spec_for(choice, shapes, model.config, model.reference)


def check_inputs(spec: SymmetrySpec, models: Sequence[Checkpoint]) -> None:
    """Every model must have the first one's tensors, in its shapes, and numbers that can be averaged.

    Raises:
        CheckpointError: with every misfit.
    """
    problems = []
    first = models[0]
    for model in models:
        for name in sorted(set(first.tensors) ^ set(model.tensors)):
            problems.append(f"{model.reference}: tensor {name!r} is in only one of it and {first.reference}")
        for name, info in first.tensors.items():
            found = model.tensors.get(name)
            rows = name in ROWS and model is not first and row_map(first, model) is not None
            shape = info.shape[rows:], None if found is None else found.shape[rows:]
            if found is not None and shape[0] != shape[1]:
                problems.append(
                    f"{model.reference}: tensor {name!r} has shape {list(found.shape)} where {first.reference} has "
                    f"{list(info.shape)}; permutations need equal widths and depths, other widths need optimal "
                    "transport (mergekit_lr.matching.soft)"
                )
            elif found is not None and found.dtype not in AVERAGED and spec.of_tensor[name][0].groups():
                problems.append(
                    f"{model.reference}: tensor {name!r} is stored as {found.dtype} and cannot be matched; "
                    "convert the checkpoint to float16, bfloat16 or float32 first"
                )
    if problems:
        raise join_problems(CheckpointError, problems[:50])


def reader(model: Checkpoint, keep: int, rows: Tensor | None = None) -> Read:
    """Whole tensors in their stored dtype; all of them are kept once read if the model has at most ``keep`` bytes.

    ``rows``: take token rows in this order, see `vocabulary.row_map`.
    """
    total = sum(t.nbytes for t in model.tensors.values())
    kept: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name in kept:
            return kept[name]
        shape = model.tensors[name].shape
        n = 1
        for d in shape:
            n *= d
        tensor = model.read(name, 0, n).reshape(shape)
        if rows is not None and name in ROWS:
            tensor = take_rows(tensor, rows)
        if total <= keep:
            kept[name] = tensor
        return tensor

    return read


def align(
    models: Sequence[Checkpoint],
    permutations: str | None,
    *,
    seed: int,
    restarts: int,
    only: Sequence[str],
    to_first: bool,
    keep: int,
    threads: int,
    tell: Tell | None = None,
    cost: Cost = "weights",
    record: Callable[[Checkpoint, SymmetrySpec], Mapping[str, Tensor]] | None = None,
) -> tuple[SymmetrySpec, list[Member], dict[str, Any]]:
    """Spec, members (the identity first) and a report. ``to_first``: align each to the first alone, even if many.

    ``record`` gives a model's activations where ``cost`` is not ``weights``; see `mergekit_lr.matching.activations`.

    Raises:
        CheckpointError: the models do not fit each other or the spec.
        LinalgError: weights are not finite.
    """
    spec = spec_of(permutations, models[0])
    check_inputs(spec, models)
    rows = [None, *(row_map(models[0], m) for m in models[1:])]
    reads = [reader(m, keep // len(models), r) for m, r in zip(models, rows, strict=True)]
    found: list[Matching] = []
    if permutations and permutations.endswith(".safetensors"):
        members = load_members(Path(permutations), spec, len(models))
    elif len(models) == 2 or to_first or cost != "weights":
        seen = [record(m, spec) for m in models] if record is not None and cost != "weights" else None
        for i, read in enumerate(reads[1:], 1):
            used = (spec, reads[0], read)
            if seen is not None:
                used = with_activations(spec, (reads[0], read), (seen[0], seen[i]), cost)
            found.append(match_weights(*used, seed=seed, restarts=restarts, only=only, threads=threads, tell=tell))
        members = [identity(spec), *(widened(spec, f.member) for f in found)]
    else:
        members = list(match_many(spec, reads, seed=seed, only=only, threads=threads, tell=tell).members)
    return spec, members, _report(spec, models, reads, members, found)


def _report(
    spec: SymmetrySpec,
    models: Sequence[Checkpoint],
    reads: Sequence[Read],
    members: Sequence[Member],
    found: list[Matching],
) -> dict[str, Any]:
    matrices = [
        n
        for n, t in models[0].tensors.items()
        if len(t.shape) > 1 and spec.of_tensor[n][0].groups() and _small(t.shape)
    ]
    rows = []
    for i in range(1, len(models)):
        before = agreements(matrices, reads[0], reads[i])
        after = agreements(matrices, reads[0], _moved(spec, members[i], reads[i]))
        row: dict[str, Any] = {
            "model": models[i].reference,
            "moved": members[i].moved(),
            "agreement_before": mean_agreement(before).get("weighted"),
            "agreement_after": mean_agreement(after).get("weighted"),
        }
        if found:
            m = found[i - 1]
            row |= {
                "objective_before": m.start,
                "objective_after": m.objective,
                "objective_at_most": m.norms[0] * m.norms[1],
                "sweeps": m.sweeps,
                "restart": m.restart,
            }
        rows.append(row)
    return {"family": spec.family, "groups": len(spec.groups), "aligned_to": models[0].reference, "models": rows}


def _small(shape: tuple[int, ...]) -> bool:
    rest = 1
    for d in shape[1:]:
        rest *= d
    return min(shape[0], rest) <= DIAGNOSED


def _moved(spec: SymmetrySpec, member: Member, read: Read) -> Read:
    return lambda name: apply(spec, member, read, name)


def warnings_of(report: Mapping[str, Any]) -> list[str]:
    """What a user should know of an alignment."""
    found = []
    for row in report["models"]:
        if not row["moved"]:
            found.append(
                f"{row['model']} is aligned with {report['aligned_to']} as it is: nothing was permuted. Fine-tunes of "
                "one base are; for those, methods such as ties or task_arithmetic do better than weight_matching"
            )
        elif row["agreement_after"] is not None and row["agreement_after"] < LOW:
            found.append(
                f"{row['model']} agrees little with {report['aligned_to']} even after matching (mean weighted "
                f"agreement {row['agreement_after']:.2f}): expect a loss barrier; `mergekit-lr barrier` measures it"
            )
    return found


def write_alignment(
    folder: Path,
    spec: SymmetrySpec,
    members: Sequence[Member],
    report: Mapping[str, Any],
    models: Sequence[Checkpoint],
    choice: str,
) -> None:
    """Permutations, what they mean for each axis of each tensor, and the report, which comes last.

    An axis is int32: ``sign * (index + 1)`` of what each place takes, 0 for a token that the model does not have. Equal
    axes are stored once.
    """
    save_members(folder / PERMUTATIONS, spec, members, [m.reference for m in models], choice)
    axes: dict[str, Tensor] = {}
    uses: dict[str, dict[str, Any]] = {}
    known: dict[bytes, str] = {}
    for i, member in enumerate(members[1:], 1):
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
            if named or found.source != name:
                uses[f"{i}.{name}"] = {"source": found.source, "axes": named}
    write_safetensors(folder / AXES, axes or {"axis.none": torch.zeros(1, dtype=torch.int32)})
    text = json.dumps({**report, "uses": uses}, indent=1)
    partial = folder / f"{REPORT}.partial"
    fs.write_file(partial, text.encode())
    fs.rename(partial, folder / REPORT)


def _code(index: Tensor | None, sign: Tensor | None) -> Tensor:
    if index is None:
        assert sign is not None
        index = torch.arange(len(sign))
    code = (index + 1).to(torch.int32)
    return code if sign is None else code * sign.to(torch.int32)


def decoded(tensor: Tensor, axis: int, code: Tensor, first: Tensor) -> Tensor:
    """A tensor whose axis is filled as ``code`` says; rows that it does not have are those of ``first``."""
    index = code.long().abs() - 1
    out = tensor.index_select(axis, index.clamp_min(0))
    if bool((index < 0).any()):
        absent = (index < 0).reshape([-1 if a == axis else 1 for a in range(tensor.ndim)])
        return torch.where(absent, first, out)
    if bool((code < 0).any()):
        shape = [1] * tensor.ndim
        shape[axis] = -1
        out = out * code.sign().to(out.dtype).reshape(shape)
    return out
