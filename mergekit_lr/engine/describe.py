"""A plan as plain data, and in words: what it reads and writes, and what that costs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.remote import RemoteCheckpoint
from mergekit_lr.sizes import format_duration, format_size
from mergekit_lr.tokenizer.align import token_lines

if TYPE_CHECKING:
    from mergekit_lr.engine.plan import Plan

SPARE = 1.02
"""A file system wants a little more than the bytes of its files."""


def describe(plan: Plan) -> dict[str, Any]:
    """Plain data, as ``plan --json`` prints it. Sizes in bytes, times in seconds."""
    from mergekit_lr.engine.footprint import process_memory

    graph, budget = plan.graph, plan.budget
    bytes_in, bytes_out = plan.bytes_in, plan.layout.file_bytes
    seconds = (bytes_in + bytes_out) / plan.bandwidth if plan.bandwidth else None
    inputs = [*plan.inputs.values(), *(c for _, stage in plan.stages for c in stage.inputs.values())]
    fetched = missing_files(inputs)
    return {
        "merge_method": plan.recipe.merge_method,
        "models": list(graph.models),
        "companions": list(graph.companions),
        "tensors": len(graph.sinks),
        "parameters": plan.parameters,
        "rules": graph.rules(),
        "dropped": [{"model": m, "tensor": t, "rule": r} for m, t, r in graph.dropped],
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
        "shards": [{"file": s.file, "bytes": s.size} for s in plan.layout.shards],
        "units": len(plan.units),
        "threads": budget.threads,
        "piece_elements": budget.piece,
        "memory_limit": budget.limit,
        "peak_memory": budget.peak,
        "peak_process_memory": process_memory(plan),
        "device": plan.device,
        "dtypes": sorted({s.dtype for s in graph.sinks}),
        "files": sorted(plan.files),
        "download": sum(fetched.values()),
        "least_disk_budget": _least_budget(plan, fetched, releases=False),
        "least_disk_budget_pushed": _least_budget(plan, fetched, releases=True),
        "disk_needed": int(SPARE * bytes_out),
        "disk_free": free_here(),
        "bandwidth": plan.bandwidth,
        "transfer_seconds": None if seconds is None else round(seconds, 3),
        "layers": [block.to_dict() for block in plan.blocks],
        "warnings": plan.warnings,
        **({"tokens": plan.tokens.to_dict()} if plan.tokens else {}),
        **({"stages": [_stage(name, stage) for name, stage in plan.stages]} if plan.stages else {}),
    }


def _stage(name: str, plan: Plan) -> dict[str, Any]:
    """One stage as plain data; those under it stand beside it."""
    found = describe(plan)
    found.pop("stages", None)
    return {"name": name, "how": plan.how, **found}


def _stage_in_words(stage: dict[str, Any]) -> str:
    size = "" if stage["how"] == "streamed" else f", {_exact(stage['bytes_out'])}"
    models = ", ".join(stage["models"])
    return f"stage {stage['name']}: {stage['merge_method']} of {models}; {stage['how']}{size}"


def in_words(d: dict[str, Any]) -> list[str]:
    """What `describe` says, in lines for a person."""
    files = len(d["shards"])
    lines = [
        *(_stage_in_words(stage) for stage in d.get("stages", [])),
        f"{d['merge_method']} of {len(d['models'])} models: {', '.join(d['models'])}",
        *(f"beside them {file}" for file in d["companions"]),
        f"{d['tensors']} tensors, {d['parameters']:,} parameters, as {', '.join(d['dtypes'])}",
        f"reads {_exact(d['bytes_in'])}, writes {_exact(d['bytes_out'])} in {files} file{'s' if files > 1 else ''}",
        f"{d['units']} units of work, {d['threads']} threads on {d['device']}, "
        f"about {d['peak_memory'] / 2**20:,.0f} MiB of tensors in memory",
        *_processes_in_words(d["peak_process_memory"]),
        f"needs {format_size(d['disk_needed'])} of disk for the output; {format_size(d['disk_free'])} are free here",
    ]
    if d["download"]:
        lines.append(
            f"downloads {format_size(d['download'])} from the Hub (for this plan: headers only); with --disk-budget at "
            f"least {format_size(d['least_disk_budget'])}, {format_size(d['least_disk_budget_pushed'])} with --push"
        )
    if d["transfer_seconds"] is not None:
        rate = f"{format_size(d['bandwidth'])}/s"
        lines.append(f"at {rate} the bytes alone take {format_duration(d['transfer_seconds'])}, each input read once")
    lines += [f"{count} tensors {rule}" for rule, count in d["rules"].items()]
    lines += token_lines(d["tokens"]) if "tokens" in d else []
    return lines + [f"warning: {w}" for w in d["warnings"]]


def _processes_in_words(nbytes: int | None) -> list[str]:
    return [] if nbytes is None else [f"about {nbytes / 2**20:,.0f} MiB of memory, the processes themselves included"]


def picture(plan: Plan) -> str:
    """The graph, summarised by layer, as SVG."""
    from mergekit_lr.graph.draw import draw

    blocks = plan.blocks
    read = {name: sum(b.models[i] for b in blocks) for i, name in enumerate(plan.graph.files)}
    files = len(plan.layout.shards)
    output = [
        plan.kind,
        format_size(plan.layout.file_bytes),
        f"{files} file{'s' if files > 1 else ''}",
        f"{len(plan.graph.sinks):,} tensors",
        f"{len(plan.units):,} units of work",
    ]
    title = f"{plan.recipe.merge_method}: {plan.parameters:,} parameters out"
    return draw(title, read, blocks, output)


def _least_budget(plan: Plan, sizes: Mapping[Path, int], *, releases: bool) -> int | None:
    """The smallest ``--disk-budget``, without ``--push`` or with it; None where nothing would be fetched."""
    from mergekit_lr.engine.batches import Needs, least

    return sum(least(plan, Needs(plan, sizes), sizes, releases=releases)) if sizes else None


def missing_files(checkpoints: Iterable[Checkpoint]) -> dict[Path, int]:
    """Bytes of the Hub's files that are not here, of models and of those that they are views of."""
    found: dict[Path, int] = {}
    for checkpoint in checkpoints:
        if isinstance(checkpoint, RemoteCheckpoint):
            found |= checkpoint.missing
        found |= missing_files(checkpoint.beneath)
    return found


def free_here() -> int:
    """Bytes free where the command runs."""
    stat = os.statvfs(Path.cwd())
    return stat.f_bavail * stat.f_frsize


def _exact(nbytes: int) -> str:
    """Binary megabytes where they can be read, else decimal terabytes."""
    return f"{nbytes / 2**20:,.1f} MiB" if nbytes < 10**12 else format_size(nbytes)
