"""The small files of an output folder: report, card, recipe, config, index."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

from mergekit_lr.bundle.manifest import FILE as BUNDLE
from mergekit_lr.engine.code_files import code_section
from mergekit_lr.engine.digest import ALGORITHM, combine
from mergekit_lr.engine.job import Job
from mergekit_lr.engine.output import add_counts
from mergekit_lr.engine.plan import Plan
from mergekit_lr.graph.nodes import Result
from mergekit_lr.rewrite import Rewrite


def make_report(plan: Plan, job: Job, fingerprint: str, seconds: float) -> dict[str, Any]:
    from mergekit_lr import __version__

    chunks: dict[str, list[tuple[int, list[str]]]] = {}
    largest: dict[str, float] = {}
    notes: dict[str, Any] = {}
    counts: dict[str, dict[str, int]] = {}
    total: dict[str, int] = {}
    for unit in plan.units:
        record = job.journal.done[unit.key(plan.graph)]
        name = plan.graph.sinks[unit.sink].name
        chunks.setdefault(name, []).append((unit.start, record["chunks"]))
        if "max_abs" in record:
            largest[name] = max(largest.get(name, 0.0), record["max_abs"])
        value = plan.graph.sinks[unit.sink].value
        if "notes" in record and isinstance(value, Result):
            notes[plan.graph.tasks[value.task].key] = record["notes"]
        add_counts(counts.setdefault(name, {}), record.get("counts", {}))
        add_counts(total, record.get("counts", {}))
    digests = {n: combine(c for _, part in sorted(parts) for c in part) for n, parts in chunks.items()}
    tensors = [
        {
            "name": s.name,
            "rule": s.rule,
            "dtype": s.dtype,
            "shape": list(s.shape),
            "digest": digests[s.name],
            **({"max_abs": largest[s.name]} if s.name in largest else {}),
            **({"counts": counts[s.name]} if counts[s.name] else {}),
        }
        for s in plan.graph.sinks
    ]
    return {
        "mergekit_lr": __version__,
        "merge_method": plan.recipe.merge_method,
        "recipe_digest": plan.recipe.digest(),
        "fingerprint": fingerprint,
        "inputs": [_input(plan, m) for m in plan.graph.files],
        **({"stages": [_stage(name, inner) for name, inner in plan.stages]} if plan.stages else {}),
        "rules": plan.graph.rules(),
        "dropped": [{"model": m, "tensor": t, "rule": r} for m, t, r in plan.graph.dropped],
        "warnings": plan.warnings + job.warnings,
        **({"tokens": plan.tokens.to_dict()} if plan.tokens else {}),
        **({"counts": total} if total else {}),
        **({"code": [c.to_dict() for c in plan.code]} if plan.code else {}),
        "digest_algorithm": ALGORITHM,
        "tensors": tensors,
        **({"details": plan.outline.details} if plan.outline and plan.outline.details else {}),
        **({"notes": {key: notes[key] for key in sorted(notes)}} if notes else {}),
        "run": {
            "device": plan.device,
            "threads": plan.budget.threads,
            "seconds": round(seconds, 3),
            "planned_peak_bytes": plan.budget.peak,
            "process_peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
    }


def _stage(name: str, plan: Plan) -> dict[str, Any]:
    """Of a stage: what was asked for, how it came about, what it read."""
    return {
        "name": name,
        "merge_method": plan.recipe.merge_method,
        "how": plan.how,
        "recipe_digest": plan.recipe.digest(),
        "inputs": [_input(plan, m) for m in plan.graph.files],
    }


def _input(plan: Plan, model: str) -> dict[str, Any]:
    checkpoint = plan.inputs[model]
    files = [{"file": Path(s.path).name, "bytes": s.size, "header_sha256": s.header} for s in checkpoint.stamps]
    return {"model": model, "revision": checkpoint.revision, "files": files}


def small_files(plan: Plan, report: dict[str, Any]) -> dict[str, bytes]:
    from mergekit_lr.report.card import model_card

    files = dict(plan.files)
    if plan.config is not None:
        files["config.json" if plan.kind == "model" else "shared/config.json"] = plan.config
    index = plan.layout.index(plan.parameters)
    if index is not None:
        files[plan.layout.index_file] = index
    files["mergekit_lr.yml"] = _pinned(plan).encode()
    extra = plan.outline.extra if plan.outline else {}
    opened = {m: plan.inputs[m] for m in plan.graph.models if m not in extra}
    for _, stage in plan.stages:
        opened |= {m: stage.inputs[m] for m in stage.graph.models if m in stage.inputs}
    card = model_card(plan.recipe, list(opened.values()))
    files["README.md"] = (card + (plan.outline.card if plan.outline else "") + code_section(plan.code)).encode()
    method = plan.recipe.method
    if isinstance(method, Rewrite):
        files |= method.files(plan.recipe, report)
    if plan.outline is not None and plan.outline.bundle is not None:
        digests = {t["name"]: t["digest"] for t in report["tensors"]}
        files[BUNDLE] = plan.outline.bundle.complete(plan.layout.shards, digests, ALGORITHM).to_bytes()
    files["merge_report.json"] = (json.dumps(report, indent=1) + "\n").encode()
    return files


def _pinned(plan: Plan) -> str:
    """The recipe as it was written, and below it the commit at which each Hub model was taken."""
    revisions = [(m, plan.inputs[m].revision) for m in plan.graph.models]
    notes = [f"# {model} was taken at commit {commit}\n" for model, commit in revisions if commit]
    text = plan.recipe.text
    return text + ("" if text.endswith("\n") else "\n") + "".join(notes)
