"""Second moments by weight name, whatever optimizer kept them, read one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Factors = tuple["Tensor", "Tensor"]
"""Row sums ``shape[:-1]`` and column sums ``shape[:-2] + shape[-1:]``, fp32."""

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
BLOCKS = (256, 2048, 4096, 128, 64, 512, 1024)


@dataclass(frozen=True)
class Moment:
    """One weight's second moments: fp32 ``shape``, or the sums of its rows and columns.

    ``step`` and ``beta2`` are None where they are not known, or where no bias is left to correct.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor | Factors]
    factored: bool = False
    step: float | None = None
    beta2: float | None = None
    unbiased: bool = False


@dataclass
class Moments:
    """All of them; ``source`` says where from. ``close`` releases what they are read from."""

    source: str
    entries: dict[str, Moment]
    facts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    close: Callable[[], None] = lambda: None


def bare_name(name: str) -> str:
    """A weight's name without what torch.compile, FSDP and DDP put before or into it."""
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper).replace("." + wrapper, ".")
    return name


def moment_of(
    state: Checkpoint, parts: Mapping[str, str], step: float | None, beta2: float | None, where: str
) -> Moment:
    """The moment that the ``parts`` (last name of a state's tensor -> its entry) of one parameter make up.

    Raises:
        CheckpointError: they are none that an optimizer with second moments leaves.
    """
    info = {part: state.tensors[entry] for part, entry in parts.items()}

    def whole(part: str) -> Tensor:
        return state.read(parts[part], 0, info[part].numel).to(torch.float32).reshape(info[part].shape)

    full = next((p for p in ("exp_avg_sq", "variance") if p in parts), None)
    if full is not None and not {"exp_avg_sq_row", "row_var"} & set(parts):
        return Moment(info[full].shape, lambda: whole(full), step=step, beta2=beta2, unbiased=full == "variance")
    if {"exp_avg_sq_row", "exp_avg_sq_col"} <= set(parts):
        return _adafactor(info["exp_avg_sq_row"].shape, info["exp_avg_sq_col"].shape, whole, "exp_avg_sq_row", where)
    if {"row_var", "col_var"} <= set(parts):
        rows, columns = info["row_var"].shape[:-1], (*info["col_var"].shape[:-2], info["col_var"].shape[-1])
        return _adafactor(rows, columns, whole, "row_var", where)
    if "state2" in parts:
        return _eight_bit(state, parts, info, step, beta2, where)
    raise CheckpointError(
        f"the state of {where!r} holds no second moments",
        where=state.reference,
        why="SGD, Lion, Muon and SignSGD keep none",
        fix="estimate them from text: mergekit-lr curvature MODEL OUT --text FILE",
    )


def _adafactor(
    rows: tuple[int, ...], columns: tuple[int, ...], whole: Callable[[str], Tensor], first: str, where: str
) -> Moment:
    """Adafactor's row and column *means* as sums. Its averages start unbiased (the first decay is zero)."""
    if rows[:-1] != columns[:-1]:
        raise CheckpointError(f"the rows and columns of {where!r} do not fit", why=f"{list(rows)}, {list(columns)}")
    shape = (*rows, columns[-1])
    second = first.replace("row", "col")

    def read() -> Factors:
        return whole(first).reshape(rows) * shape[-1], whole(second).reshape(columns) * shape[-2]

    return Moment(shape, read, factored=True, unbiased=True)


def _eight_bit(
    state: Checkpoint,
    parts: Mapping[str, str],
    info: Mapping[str, TensorInfo],
    step: float | None,
    beta2: float | None,
    where: str,
) -> Moment:
    """bitsandbytes: ``v[j] = qmap2[state2[j]] * absmax2[j // block]``; small tensors are kept in fp32."""
    stored = info["state2"]
    if stored.dtype in ("F32", "BF16", "F16"):
        return moment_of(state, {"exp_avg_sq": parts["state2"]}, step, beta2, where)
    scale = "absmax2" if "absmax2" in parts else "max2"
    if stored.dtype != "U8" or "qmap2" not in parts or scale not in parts or info["qmap2"].numel != 256:
        raise CheckpointError(f"the 8-bit state of {where!r} is incomplete", where=state.reference)
    n, blocks = stored.numel, info[scale].numel
    block = n if scale == "max2" else next((b for b in BLOCKS if -(-n // b) == blocks), 0)
    if not block:
        raise CheckpointError(
            f"the 8-bit state of {where!r} has {blocks} scales for {n} values",
            where=state.reference,
            why="no block size of bitsandbytes fits",
        )

    def read() -> Tensor:
        codes = state.read(parts["state2"], 0, n).to(torch.int64)
        values = state.read(parts["qmap2"], 0, 256).to(torch.float32)[codes]
        scales = state.read(parts[scale], 0, blocks).to(torch.float32)
        return (values * scales.repeat_interleave(block)[:n]).reshape(stored.shape)

    return Moment(stored.shape, read, step=step, beta2=beta2)


def sums_of(v: Tensor) -> Factors:
    """Row and column sums of a matrix (or of each matrix of a stack), added in fp64."""
    wide = v.double()
    return wide.sum(-1).float(), wide.sum(-2).float()


def is_factorable(shape: tuple[int, ...]) -> bool:
    """Whether row and column sums are smaller than the tensor: matrices, and stacks of them."""
    return len(shape) >= 2 and math.prod(shape[-2:]) > sum(shape[-2:])
