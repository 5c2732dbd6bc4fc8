"""What the operating system will count for a run: tensors, and the processes that hold them.

The budget is about tensors. Beside them there is what Python and its libraries take, once however many workers are
forked; what a forked worker copies of it by touching it; and what the run knows of every tensor. The constants were
measured (`benchmarks/memory.py`); the page cache is not counted, because the system takes it back when it is short.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mergekit_lr.checkpoint.lora import AdaptedCheckpoint
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.engine import portion, processes
from mergekit_lr.engine.stages import searches

if TYPE_CHECKING:
    from mergekit_lr.engine.plan import Plan

INTERPRETER = 160 << 20
"""CPython, torch and all that a merge imports, after the first operation."""
FORKED = 8 << 20
"""Pages of the parent's that a forked worker comes to own: counting references writes to them."""
SEARCH = 4 << 20
"""What one input's magnitudes take where a threshold is looked for: up to 2^20 of them, in four bytes each."""
PER_TENSOR = 6 << 10
"""Headers, graph, units, journal and report, for each output tensor."""


def process_memory(plan: Plan) -> int | None:
    """Anonymous memory of a run's processes at its peak, in bytes; None on a GPU, whose driver has its own share.

    ``INTERPRETER + libraries + PER_TENSOR n + w (tensors + search + adapters + FORKED)``, for n output tensors and w
    workers; ``FORKED`` only where workers are processes, ``search`` only for methods that look before they merge:
    the magnitudes of every input, and four times one input's to sort and count them. What a method
    runs on text before it merges has a budget of its own.
    """
    if plan.device != "cpu":
        return None
    budget = plan.budget
    workers = min(budget.threads, max(len(plan.units), 1))
    forks = processes.worth_it(plan.device, workers, portion.total_bytes(plan, plan.units))
    adapters = sum(a.bytes_held for a in adapted(plan.inputs.values()))
    each = budget.peak // budget.threads + _search_bytes(plan) + (FORKED if forks else 0)
    own = adapters * (workers if forks else 1)  # threads share the factors
    libraries = plan.outline.libraries if plan.outline is not None else 0
    tensors = len(plan.graph.sinks) + sum(len(stage.graph.sinks) for _, stage in plan.stages)
    return INTERPRETER + libraries + PER_TENSOR * tensors + workers * each + own


def _search_bytes(plan: Plan) -> int:
    most = max((len(o.inputs) for o in plan.graph.operations), default=0)
    return SEARCH * (most + 4) if most and searches(plan.graph) else 0


def adapted(checkpoints: Iterable[Checkpoint]) -> list[AdaptedCheckpoint]:
    """Every model with an adapter on it, of these and of those that they are views of."""
    found = []
    for checkpoint in checkpoints:
        found += [checkpoint] if isinstance(checkpoint, AdaptedCheckpoint) else []
        found += adapted(checkpoint.beneath)
    return found
