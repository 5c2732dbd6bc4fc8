"""What an adapter changes, module by module, in PEFT's orientation, read from an adapted checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_lr.checkpoint.lora import AdaptedCheckpoint
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError, join_problems
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lr.linalg.lowrank import Pair

_SUFFIXES = (".lora_A", ".lora_embedding_A")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Module:
    """One adapted weight.

    ``weight``: its name in the base. ``path``: the module's name in the adapter. ``a``, ``b``: the adapter's tensors,
    ``[r, in]`` and ``[out, r]``; the weight changes by ``scale B A``, or by its transpose where ``transposed`` (the base
    stores ``[in, out]``: embeddings, Conv1D). ``magnitude``: DoRA's vector, or None.
    """

    weight: str
    path: str
    a: str
    b: str
    rows: int
    columns: int
    rank: int
    scale: float
    transposed: bool
    embedding: bool
    dtype: str
    magnitude: str | None = None


@dataclass(frozen=True)
class Changes:
    """All that an adapter changes: ``modules`` by base weight; ``saved``: base tensor -> the adapter's whole copy of it;
    ``biases``: base bias -> (the adapter's vector added to it, its scale)."""

    modules: dict[str, Module]
    saved: dict[str, str]
    biases: dict[str, tuple[str, float]]


def changes(checkpoint: AdaptedCheckpoint) -> Changes:
    """Everything that ``checkpoint``'s adapter changes.

    Raises:
        CheckpointError: a module is both replaced as a whole and adapted, which is not one pair of factors.
    """
    modules: dict[str, Module] = {}
    saved: dict[str, str] = {}
    biases: dict[str, tuple[str, float]] = {}
    for weight, update in checkpoint.updates.items():
        if update.added is not None:
            biases[weight] = (update.added, update.scale)
        if update.replaced is not None and (update.a is not None or update.added is not None):
            raise CheckpointError(
                f"{weight!r} is both saved as a whole and adapted",
                where=checkpoint.reference,
                fix="merge this adapter into its base first, and extract one anew",
            )
        if update.replaced is not None:
            saved[weight] = update.replaced
        if update.a is None or update.b is None:
            continue
        a, b = checkpoint.adapter.tensors[update.a], checkpoint.adapter.tensors[update.b]
        path, suffix = _module_path(update.a)
        modules[weight] = Module(
            weight=weight,
            path=path,
            a=update.a,
            b=update.b,
            rows=b.shape[0],
            columns=a.shape[1],
            rank=a.shape[0],
            scale=update.scale,
            transposed=update.transposed,
            embedding=suffix == _SUFFIXES[1],
            dtype=a.dtype if a.dtype == b.dtype else "F32",
            magnitude=update.magnitude,
        )
    return Changes(modules, saved, biases)


def _module_path(a: str) -> tuple[str, str]:
    for suffix in _SUFFIXES:
        path, found, _ = a.removeprefix(_PREFIX).rpartition(suffix)
        if found:
            return path, suffix
    raise CheckpointError(f"adapter tensor {a!r} is not a factor")


def read_whole(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor in its own shape and the dtype that it reads in."""
    info = checkpoint.tensors[name]
    return checkpoint.read(name, 0, info.numel).view(info.shape)


def read_pair(checkpoint: AdaptedCheckpoint, module: Module) -> Pair:
    """``(B, A)`` in fp64, without the scale.

    Raises:
        CheckpointError: NaN or infinity in a factor.
    """
    b, a = (read_whole(checkpoint.adapter, n).double() for n in (module.b, module.a))
    for name, factor in ((module.b, b), (module.a, a)):
        if not bool(torch.isfinite(factor).all()):
            raise CheckpointError(f"adapter tensor {name!r} holds NaN or infinity", where=checkpoint.reference)
    return b, a


def check_same_base(checkpoints: Sequence[Checkpoint], base: Checkpoint | None = None) -> list[str]:
    """Adapters of one merge must sit on one base: same files by name, size and header, unless the references say so.

    Returns the warnings about adapters whose configuration names another base than the one they are put on.

    Raises:
        CheckpointError: a model is no adapter on a base, or two sit on different bases.
    """
    problems: list[str] = []
    warnings: list[str] = []
    reference = base.identity() if base is not None else None
    for checkpoint in checkpoints:
        if not isinstance(checkpoint, AdaptedCheckpoint):
            problems.append(f"{checkpoint.reference}: no adapter; write it as BASE_MODEL+ADAPTER")
            continue
        own = _content(checkpoint.base)
        if reference is None:
            reference = checkpoint.base.identity()
        if own != [entry[1:2] + entry[3:] for entry in reference]:
            problems.append(
                f"{checkpoint.reference}: its base is not the others' (other files or headers); "
                "put all adapters on the base that they were trained on"
            )
    if problems:
        raise join_problems(CheckpointError, problems)
    return warnings


def _content(checkpoint: Checkpoint) -> list[list[object]]:
    return [entry[1:2] + entry[3:] for entry in checkpoint.identity()]
