"""Members of a symmetry group as a safetensors file, to look at and to use again.

Tensors ``<model>.<group>`` (int32, ``[n]`` or ``[parent's size, n]``: place i holds what was at this place) and
``<model>.<group>.signs`` (int8). Metadata: ``permutations`` (what the recipe said), ``family``, ``models`` (JSON list;
the first is the one that the others were aligned to and has no tensors) and ``format``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mergekit_lr.arch.symmetry import SymmetrySpec
from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.model import open_file
from mergekit_lr.checkpoint.writer import write_safetensors
from mergekit_lr.errors import CheckpointError
from mergekit_lr.matching.member import Member, identity

FORMAT = "mergekit_lr.permutations.1"


def save_members(
    path: Path, spec: SymmetrySpec, members: Sequence[Member], models: Sequence[str], permutations: str
) -> None:
    """Write the members of all models but the first, atomically."""
    tensors: dict[str, Tensor] = {}
    for i, member in enumerate(members[1:], 1):
        for group, p in member.permutations.items():
            tensors[f"{i}.{group}"] = p.to(torch.int32)
        for group, s in member.signs.items():
            tensors[f"{i}.{group}.signs"] = s
    said = {"format": FORMAT, "permutations": permutations, "family": spec.family, "models": json.dumps(list(models))}
    write_safetensors(path, tensors, said)


def saved_choice(path: Path) -> str:
    """What ``permutations`` was when a file was written: it decides the spec that the file belongs to.

    Raises:
        CheckpointError: the file is none of ours.
    """
    return _metadata(path)["permutations"]


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


def load_members(path: Path, spec: SymmetrySpec, count: int) -> list[Member]:
    """The members of ``count`` models, the identity first.

    Raises:
        CheckpointError: the file is for another number of models, or its permutations do not fit the spec.
    """
    models = json.loads(_metadata(path)["models"])
    if len(models) != count:
        raise CheckpointError(
            f"the permutations are for {len(models)} models and the recipe has {count}", where=str(path)
        )
    with open_file(path, str(path)) as file:

        def read(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            info = file.tensors.get(name)
            if info is None or info.shape != shape:
                found = "none" if info is None else f"one of shape {list(info.shape)}"
                raise CheckpointError(
                    f"the permutations do not fit: {name} should have shape {list(shape)}, there is {found}",
                    where=str(path),
                )
            n = int(torch.tensor(shape).prod())
            return file.read(name, 0, n).reshape(shape).to(dtype)

        members = [identity(spec)]
        for i in range(1, count):
            permutations, signs = {}, {}
            for name, group in spec.groups.items():
                shape = (*spec.outer(name), group.size)
                p = read(f"{i}.{name}", shape, torch.int64)
                if not bool((p.sort(dim=-1).values == torch.arange(group.size)).all()):
                    raise CheckpointError(f"{i}.{name} is no permutation", where=str(path))
                permutations[name] = p
                if group.signed:
                    signs[name] = read(f"{i}.{name}.signs", shape, torch.int8)
                    if not bool((signs[name].abs() == 1).all()):
                        raise CheckpointError(f"{i}.{name}.signs are not all +1 or -1", where=str(path))
            members.append(Member(permutations, signs))
    return members
