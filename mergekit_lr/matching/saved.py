"""Members of a symmetry group as a safetensors file, to look at and to use again.

Tensors ``<model>.<group>`` (int32, ``[n]`` or ``[parent's size, n]``: place i holds what was at this place),
``<model>.<group>.signs`` (int8) and, where neurons were mixed, ``<model>.<group>.plan`` (fp64, ``[n, m]``). Metadata:
``permutations`` (what the recipe said), ``family``, ``models`` (JSON list; the first is the one that the others were
aligned to and has no tensors) and ``format``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mergekit_lr.arch.symmetry import SymmetrySpec
from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.model import Checkpoint, open_file
from mergekit_lr.checkpoint.writer import write_safetensors
from mergekit_lr.errors import CheckpointError
from mergekit_lr.matching.member import Member, identity

FORMAT = "mergekit_lr.permutations.1"


def save_members(
    path: Path,
    members: Sequence[Member],
    models: Sequence[str],
    *,
    family: str,
    permutations: str,
    plans: Sequence[Mapping[str, Tensor]] = (),
) -> None:
    """Write the members, and plans, of all models but the first, atomically."""
    tensors: dict[str, Tensor] = {}
    for i, member in enumerate(members[1:], 1):
        for group, p in member.permutations.items():
            tensors[f"{i}.{group}"] = p.to(torch.int32)
        for group, s in member.signs.items():
            tensors[f"{i}.{group}.signs"] = s
        for group, plan in (plans[i] if plans else {}).items():
            tensors[f"{i}.{group}.plan"] = plan
    said = {"format": FORMAT, "permutations": permutations, "family": family, "models": json.dumps(list(models))}
    write_safetensors(path, tensors, said)


def saved_choice(path: Path) -> str:
    """What ``permutations`` was when a file was written: it decides the spec that the file belongs to.

    Raises:
        CheckpointError: the file is none of ours.
    """
    choice = _metadata(path).get("permutations")
    if choice is None:
        raise CheckpointError("the file does not say what was permuted", where=str(path), fix="match the models again")
    return choice


def _metadata(path: Path) -> dict[str, str]:
    metadata = dict(read_header(path).metadata)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            "this file holds no permutations",
            where=str(path),
            why="its metadata does not say so",
            fix="give the permutations.safetensors of an earlier weight_matching",
        )
    return metadata


def load_members(
    path: Path, specs: Sequence[SymmetrySpec], *, mixed: bool = False
) -> tuple[list[Member], list[dict[str, Tensor]]]:
    """The members of as many models as there are specs, the identity first, and where ``mixed`` their plans.

    Raises:
        CheckpointError: the file is for another number of models, its permutations do not fit the specs, or it holds
            plans and none are wanted, or the other way round.
    """
    try:
        models = json.loads(_metadata(path)["models"])
    except (KeyError, ValueError, RecursionError):
        models = None
    if not isinstance(models, list):
        raise CheckpointError("the file does not say which models it is for", where=str(path), fix="match them again")
    if len(models) != len(specs):
        raise CheckpointError(
            f"the permutations are for {len(models)} models and the recipe has {len(specs)}", where=str(path)
        )
    with open_file(path, str(path)) as file:
        has_plans = any(n.endswith(".plan") for n in file.tensors)
        if has_plans is not mixed:
            what = "holds plans of optimal transport" if has_plans else "holds no plans of optimal transport"
            fix = f"set `matching: {'transport' if has_plans else 'permutation'}`, or permutations to another file"
            raise CheckpointError(f"the file {what}", where=str(path), fix=fix)
        members, plans = [identity(specs[0])], [dict[str, Tensor]()]
        for i, spec in enumerate(specs[1:], 1):
            members.append(_member(file, path, spec, i))
            plans.append(_plans(file, path, specs[0], spec, i))
    return members, plans


def _member(file: Checkpoint, path: Path, spec: SymmetrySpec, i: int) -> Member:
    permutations, signs = {}, {}
    for name, group in spec.groups.items():
        shape = (*spec.outer(name), group.size)
        p = _read(file, path, f"{i}.{name}", shape).to(torch.int64)
        if not bool((p.sort(dim=-1).values == torch.arange(group.size)).all()):
            raise CheckpointError(f"{i}.{name} is no permutation", where=str(path))
        permutations[name] = p
        if group.signed:
            signs[name] = _read(file, path, f"{i}.{name}.signs", shape).to(torch.int8)
            if not bool((signs[name].abs() == 1).all()):
                raise CheckpointError(f"{i}.{name}.signs are not all +1 or -1", where=str(path))
    return Member(permutations, signs)


def _plans(file: Checkpoint, path: Path, first: SymmetrySpec, spec: SymmetrySpec, i: int) -> dict[str, Tensor]:
    found = {}
    for name, group in spec.groups.items():
        if f"{i}.{name}.plan" in file.tensors:
            plan = _read(file, path, f"{i}.{name}.plan", (first.groups[name].size, group.size)).double()
            if not bool(((plan >= 0) & (plan <= 1)).all()):
                raise CheckpointError(f"{i}.{name}.plan is no plan of transport", where=str(path))
            found[name] = plan
    return found


def _read(file: Checkpoint, path: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    info = file.tensors.get(name)
    if info is None or info.shape != shape:
        found = "none" if info is None else f"one of shape {list(info.shape)}"
        raise CheckpointError(
            f"the permutations do not fit: {name} should have shape {list(shape)}, there is {found}", where=str(path)
        )
    return file.read(name, 0, info.numel).reshape(shape)
