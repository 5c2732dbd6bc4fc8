"""Puts an extracted adapter together from its finished parts, with its configuration and its report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint.adapter import tied_embedding
from mergekit_lr.checkpoint.dtypes import ITEM_BYTES, dtype_code
from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.layout import lay_out_file
from mergekit_lr.checkpoint.model import Checkpoint, open_file
from mergekit_lr.checkpoint.writer import Entry, FileWriter
from mergekit_lr.engine.workspace import Workspace
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch
from mergekit_lr.lowrank.adapters import read_whole
from mergekit_lr.lowrank.peft import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Described,
    adapter_config,
    architectures_of,
    config_bytes,
    factor_names,
    is_embedding,
)
from mergekit_lr.lowrank.sorting import BIAS, SAVED, stored_transposed

if TYPE_CHECKING:
    from mergekit_lr.lowrank.ranks import RankRule

REPORT = "merge_report.json"


@dataclass
class Extraction:
    """One extraction: what is read, and how."""

    model: Checkpoint
    base: Checkpoint
    rule: RankRule
    rules: dict[str, str]
    dtype: str
    device: str
    warnings: list[str]

    def names(self, rule: str) -> list[str]:
        return [n for n, r in self.rules.items() if r == rule]


def differs(work: Extraction, name: str) -> bool:
    """Whether a tensor holds other numbers than the base's; a new or resized one does."""
    old = work.base.tensors.get(name)
    return old is None or old.shape != work.model.tensors[name].shape or not same_tensor(work.model, work.base, name)


def same_tensor(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Whether two models hold the same numbers under a name, whatever dtypes they store them in."""
    n = one.tensors[name].numel
    if one.tensors[name].shape != other.tensors[name].shape:
        return False
    step = 1 << 22
    for start in range(0, n, step):
        stop = min(n, start + step)
        x, y = one.read(name, start, stop), other.read(name, start, stop)
        if x.dtype != y.dtype:
            x, y = x.double(), y.double()
        if not torch.equal(x, y):
            return False
    return True


def assemble(work: Extraction, space: Workspace, parts: Mapping[str, Path], *, overwrite: bool) -> dict[str, Any]:
    """Put the adapter together from its parts, and commit it."""
    opened = {n: open_file(p, str(p)) for n, p in parts.items()}
    try:
        facts = {n: _facts(c) for n, c in opened.items()}
        pairs = {n: c for n, c in opened.items() if facts[n]}
        saved = {n: _saved_name(work, n, pairs) for n in (*work.names(SAVED), *work.names(BIAS)) if differs(work, n)}
        if not pairs and not saved:
            raise CheckpointError(
                "the model does not differ from its base", where=work.model.reference, fix="check the two references"
            )
        sources: dict[str, tuple[Checkpoint, str]] = {}
        for name, part in pairs.items():
            a, b = factor_names(_path(name), embedding=is_embedding(name))
            sources[a], sources[b] = (part, "a"), (part, "b")
        sources |= {stored: (work.model, name) for name, stored in saved.items()}
        twins = _head_too(work, sources)
        sources |= twins
        turned = {n for n in twins if ".lora_" in n}
        entries = [Entry(n, *_described(c, t, n in turned)) for n, (c, t) in sorted(sources.items())]
        with FileWriter(space.model / WEIGHTS, entries) as writer:
            for name, (checkpoint, tensor) in sorted(sources.items()):
                value = read_whole(checkpoint, tensor)
                writer.write(name, value.T if name in turned else value)
    finally:
        for checkpoint in opened.values():
            checkpoint.close()
    config = adapter_config(_describe(work, facts, saved), work.base.tensors)
    report = _report(work, space, facts, saved, entries)
    files = {CONFIG: config_bytes(config), REPORT: (json.dumps(report, indent=1) + "\n").encode()}
    space.commit(files, lay_out_file(WEIGHTS, entries, {}), overwrite=overwrite)
    return report


def _head_too(work: Extraction, sources: Mapping[str, tuple[Checkpoint, str]]) -> dict[str, tuple[Checkpoint, str]]:
    """The tied head's copy of the embedding's tensors, which PEFT wants beside them.

    A head's A is the embedding's B^T, so of a pair the names change places and each is transposed.
    """
    embedding = tied_embedding(work.base)
    if embedding is None:
        return {}
    head = "embed_out" if (work.base.config or {}).get("model_type") == "gpt_neox" else "lm_head"
    path = _path(embedding)
    (a, b), whole = factor_names(path, embedding=True), f"{PREFIX}{path}.weight"
    head_a, head_b = factor_names(head, embedding=False)
    twins = {whole: f"{PREFIX}{head}.weight", b: head_a, a: head_b}
    return {twins[n]: place for n, place in sources.items() if n in twins and twins[n] not in sources}


def _described(checkpoint: Checkpoint, name: str, turned: bool) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape as the tensor reads: an adapted one reads as fp32."""
    shape = checkpoint.tensors[name].shape
    return dtype_code(checkpoint.read(name, 0, 0).dtype), shape[::-1] if turned else shape


def _bytes(entry: Entry) -> int:
    return math.prod(entry.shape) * ITEM_BYTES[entry.dtype]


def _facts(part: Checkpoint) -> dict[str, Any]:
    found = json.loads(read_header(next(iter(part.files.values()), Path(part.reference))).metadata["report"])
    return found if isinstance(found, dict) else {}


def _path(weight: str) -> str:
    return weight.removesuffix(".weight").removesuffix(".bias")


def _saved_name(work: Extraction, name: str, pairs: Mapping[str, object]) -> str:
    path = _path(name)
    inner = ".base_layer" if name.endswith(".bias") and f"{path}.weight" in pairs else ""
    return f"{PREFIX}{path}{inner}{name[len(path) :]}"


def _describe(work: Extraction, facts: Mapping[str, Mapping[str, Any]], saved: Mapping[str, str]) -> Described:
    embedding = tied_embedding(work.base)
    pairs = {n: f for n, f in facts.items() if f}
    # A bias belongs to a saved module where its weight does, and is saved as a bias elsewhere.
    whole = {_path(n) for n in saved if not n.endswith(".bias") or work.rules.get(f"{_path(n)}.weight") == SAVED}
    return Described(
        ranks={_path(n): f["rank"] for n, f in pairs.items()},
        saved=whole,
        biases=any(_path(n) not in whole for n in saved),
        fan_in_fan_out=any(stored_transposed(n, work.base) and not is_embedding(n) for n in pairs),
        tied=embedding is not None and (embedding in pairs or embedding in saved),
        base=work.base.reference,
        architectures=architectures_of(work.base),
    )


def _report(
    work: Extraction,
    space: Workspace,
    facts: Mapping[str, Mapping[str, Any]],
    saved: Mapping[str, str],
    entries: Sequence[Entry],
) -> dict[str, Any]:
    from mergekit_lr import __version__

    pairs = {n: f for n, f in facts.items() if f}
    cut, whole = (math.sqrt(math.fsum(f[k] ** 2 for f in pairs.values())) for k in ("residual", "norm"))
    dropped = {n: r for n, r in work.rules.items() if r.startswith("dropped") and n in work.base.tensors}
    return {
        "mergekit_lr": __version__,
        "fingerprint": space.digest,
        "command": "extract-lora",
        "model": work.model.reference,
        "base": work.base.reference,
        "rank": work.rule.rank,
        "energy": work.rule.energy,
        "bytes": sum(_bytes(e) for e in entries),
        "bytes_of_model": sum(t.nbytes for t in work.model.tensors.values()),
        "relative_error": cut / whole if whole else 0.0,
        "modules": {
            _path(n): {"rank": f["rank"], "relative_error": f["residual"] / f["norm"], "norm": f["norm"]}
            for n, f in pairs.items()
        },
        "tensors": [{"name": e.name, "dtype": e.dtype, "shape": list(e.shape)} for e in entries],
        "saved": sorted(saved),
        "saved_bytes": sum(work.model.tensors[n].nbytes for n in saved),
        "dropped": {n: r for n, r in sorted(dropped.items()) if differs(work, n)},
        "unchanged": sum(not f for f in facts.values()),
        "warnings": [*work.warnings, *work.base.warnings, *work.model.warnings],
    }
