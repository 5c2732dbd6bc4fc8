"""Swapping a task's weights into a live torch module.

Every swap computes ``W_task`` from what the bundle stores, never ``W_now - something``: subtracting in bf16 what an
earlier swap added would not give back what was there. So a swap does not depend on what the module holds, and any
number of them leaves exactly the bits that `Bundle.materialize` writes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_lr.bundle.codes import get_code
from mergekit_lr.bundle.manifest import Recovered
from mergekit_lr.bundle.memory import STEP, MemoryDesk, Part
from mergekit_lr.checkpoint.dtypes import ITEM_BYTES, torch_dtype
from mergekit_lr.engine.memory import available_cpus
from mergekit_lr.errors import CheckpointError, join_problems
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergekit_lr.bundle.open import Bundle

RUN = 1 << 24  # elements of a tensor that one thread does at a time


@dataclass(frozen=True)
class Swap:
    """What a swap took. ``bytes``: stored bytes read and weight bytes written."""

    task: str
    tensors: int
    bytes: int
    seconds: float

    @property
    def gigabytes_per_second(self) -> float:
        """10^9 bytes a second."""
        return self.bytes / max(self.seconds, 1e-9) / 1e9


def load_into(bundle: Bundle, module: nn.Module, task: str, *, threads: int | None = None) -> Swap:
    """Write the task's weights into the module's parameters and buffers, in place.

    ``threads``: at most so many, by default the machine's cores. Keep the bundle in memory with `Bundle.hold` where
    tasks are swapped often; otherwise the stored tensors are read from their files.

    Raises:
        CheckpointError: a tensor has no place in the module, another shape or a narrower dtype there, or a tensor
            of the module would keep its old value. Nothing was changed then.
        UsageError: the bundle has no such task.
    """
    wanted = bundle.tensors(task)
    places = _places(module, wanted)
    jobs = [(wanted[n], place, span) for n, place in places.items() for span in _runs(wanted[n])]
    _synchronize(places)
    began = time.perf_counter()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with ThreadPoolExecutor(threads or available_cpus()) as pool:
            for _ in pool.map(lambda job: _do(bundle, *job), jobs):
                pass
    finally:
        torch.set_num_threads(before)
    _synchronize(places)
    seconds = time.perf_counter() - began
    read = sum(_stored_bytes(bundle.part(p)) for w in wanted.values() for p in w.parts)
    written = sum(p.numel() * p.element_size() for p in places.values())
    return Swap(task, len(places), read + written, seconds)


def _places(module: nn.Module, wanted: Mapping[str, Recovered]) -> dict[str, Tensor]:
    """For each tensor of the task the module's own, checked before any is touched."""
    state = module.state_dict(keep_vars=True)
    problems = []
    for name, w in wanted.items():
        found = state.get(name)
        if found is None:
            problems.append(f"tensor {name!r} has no place in the module; build the module from the task's own config")
        elif tuple(found.shape) != w.shape:
            problems.append(f"tensor {name!r} is {list(w.shape)} in the bundle and {list(found.shape)} in the module")
        elif not _holds(found.dtype, torch_dtype(w.dtype)):
            problems.append(
                f"tensor {name!r} is {w.dtype} in the bundle and {found.dtype} in the module, which rounds it"
            )
    covered = {t.data_ptr() for n, t in state.items() if n in wanted}
    kept = [n for n, t in state.items() if n not in wanted and t.data_ptr() not in covered and t.numel()]
    problems += [f"tensor {n!r} of the module is not in the bundle and would keep its value" for n in kept]
    if problems:
        raise join_problems(CheckpointError, problems)
    return {n: state[n].detach() for n in wanted}


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of one dtype is one of the other."""
    return wide == narrow or (wide in (torch.float32, torch.float64) and torch.promote_types(wide, narrow) == wide)


def _runs(wanted: Recovered) -> Iterator[tuple[int, int] | None]:
    """Parts of a tensor that one thread does; None for a tensor that its code must hold whole."""
    if get_code(wanted.code).whole or wanted.numel <= RUN:
        yield None
        return
    for start in range(0, wanted.numel, RUN):
        yield start, min(wanted.numel, start + RUN)


def _do(bundle: Bundle, wanted: Recovered, place: Tensor, span: tuple[int, int] | None) -> None:
    with torch.inference_mode():
        direct = place.is_contiguous()
        out = place if direct else torch.empty(place.shape, dtype=place.dtype, device=place.device)
        desk = MemoryDesk([bundle.part(p) for p in wanted.parts], out, wanted.dtype, STEP)
        get_code(wanted.code).decode(wanted, desk, *(span or ()))
        if not direct:
            place.copy_(out)


def _stored_bytes(part: Part) -> int:
    return math.prod(part.shape) * ITEM_BYTES[part.dtype]


def _synchronize(places: Mapping[str, Tensor]) -> None:
    for device in {p.device for p in places.values() if p.device.type == "cuda"}:
        torch.cuda.synchronize(device)
