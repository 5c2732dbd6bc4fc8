"""What an adapter changes, module by module, in PEFT's orientation, read from an adapted checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_lr.checkpoint.lora import AdaptedCheckpoint
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.small_files import read_json
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
    ``[r, in]`` and ``[out, r]``; the weight changes by ``scale B A``, or by its transpose where ``transposed`` (the
    base stores ``[in, out]``: embeddings, Conv1D). ``magnitude``: DoRA's vector, or None.
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
    """All that an adapter changes.

    ``modules``: by base weight. ``saved``: base tensor -> the adapter's whole copy of it. ``biases``: base bias -> (the
    adapter's vector added to it, its scale).
    """

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


def check_bases(checkpoints: Sequence[Checkpoint], base: Checkpoint, *, different: bool = False) -> list[str]:
    """Task models must come from one base: the adapters' own folders may not name different revisions of it.

    Adapters sit on whatever base the recipe puts them on, so it is their configurations that tell. Returns warnings
    where names differ (a path here and a Hub id there may be one model).

    Args:
        different: accept different revisions, with a warning.

    Raises:
        CheckpointError: an adapter is put on another base than ``base``, or two were trained on different revisions.
    """
    problems: list[str] = []
    named: dict[tuple[str | None, str | None], str] = {}
    for checkpoint in checkpoints:
        if not isinstance(checkpoint, AdaptedCheckpoint):
            continue
        if _content(checkpoint.base) != _content(base):
            problems.append(
                f"{checkpoint.reference}: its base is not {base.reference} (other files, sizes or headers); "
                "put every adapter on the base that it was trained on"
            )
        raw = read_json(checkpoint.adapter_folder / "adapter_config.json")
        name, revision = raw.get("base_model_name_or_path"), raw.get("revision")
        named.setdefault((_text(name), _text(revision)), checkpoint.reference)
    if problems:
        raise join_problems(CheckpointError, problems)
    if len(named) < 2:
        return []
    told = "; ".join(f"{where} on {n or '?'}{f'@{r}' if r else ''}" for (n, r), where in named.items())
    if len({r for _, r in named}) > 1 and not different:
        raise CheckpointError(
            "the adapters were trained on different revisions of the base",
            why=told,
            fix="retrain one, or set different_bases: true where you know that the weights are the same",
        )
    return [f"the adapters' configurations name different bases: {told}"]


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _content(checkpoint: Checkpoint) -> list[list[object]]:
    """Names, sizes and header digests of a model's files."""
    return [[file, size, header] for file, size, _, header in checkpoint.identity()]
