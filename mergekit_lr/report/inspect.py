"""What a model is, from its headers and config alone: no weight is read, torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_lr.arch.stack import architectures
from mergekit_lr.arch.tied import EMBEDDINGS, HEADS, config_ties
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.open import open_model
from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.report.bundles import BundleInspection, inspect_bundle, is_bundle
from mergekit_lr.report.consistency import (
    config_problems,
    dtype_bytes,
    expert_count,
    experts_by_layer,
    layer_outliers,
    layers_by_stack,
    main_stack,
    text_config,
    whole,
)


@dataclass(frozen=True)
class Inspection:
    """A model in numbers. ``warnings`` are contradictions between config and tensors, and what was ignored."""

    model: str
    architecture: str | None
    model_type: str | None
    revision: str | None
    tensors: int
    parameters: int
    bytes: int
    bytes_by_dtype: dict[str, int]
    layers: int | None
    stacks: dict[str, int]
    experts: int | None
    experts_per_token: int | None
    hidden_size: int | None
    vocab_size: int | None
    tied: bool
    adapter: dict[str, Any] | None
    files: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    largest: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dict(vars(self))

    def summary_lines(self) -> list[str]:
        """For people: one fact a line."""
        kind = " / ".join(x for x in (self.architecture, self.model_type) if x) or "raw state dict, no config"
        lines = [
            f"model         {self.model}",
            f"architecture  {kind}",
            f"parameters    {self.parameters:,} in {self.tensors:,} tensors, {human_bytes(self.bytes)}",
            "dtypes        " + ", ".join(f"{d} {human_bytes(n)}" for d, n in self.bytes_by_dtype.items()),
        ]
        if self.revision:
            lines.append(f"revision      {self.revision}")
        if self.layers:
            lines.append(f"layers        {self.layers}")
        if self.experts:
            per_token = f", {self.experts_per_token} per token" if self.experts_per_token else ""
            lines.append(f"experts       {self.experts} a layer{per_token}")
        if self.hidden_size:
            lines.append(f"hidden size   {self.hidden_size}")
        if self.vocab_size:
            tied = "tied to the embeddings" if self.tied else "its own tensor"
            lines.append(f"vocabulary    {self.vocab_size:,}; output head is {tied}")
        if self.adapter:
            a = self.adapter
            lines.append(f"adapter       LoRA, rank {a['rank']}, changes {a['changed']} tensors")
        lines.append("files         " + ", ".join(f"{f['file']} ({human_bytes(f['bytes'])})" for f in self.files[:6]))
        if len(self.files) > 6:
            lines[-1] += f" and {len(self.files) - 6} more"
        return lines + [f"warning       {w}" for w in self.warnings]


def inspect(
    path: str | Path | ModelReference, *, allow_pickle: bool = False, cache: Path | None = None
) -> Inspection | BundleInspection:
    """Describe the model that a path, Hub id or ``model+adapter`` names, or a bundle.

    Raises:
        CheckpointError: it cannot be opened.
    """
    reference = path if isinstance(path, ModelReference) else ModelReference.parse(str(path))
    if is_bundle(Path(reference.path)):
        return inspect_bundle(Path(reference.path))
    with open_model(reference, allow_pickle=allow_pickle, cache=cache, headers_only=True) as checkpoint:
        return describe(checkpoint)


def describe(checkpoint: Checkpoint) -> Inspection:
    """The inspection of an opened checkpoint."""
    config: Mapping[str, Any] = checkpoint.config or {}
    text = text_config(config)
    tensors = checkpoint.tensors
    stacks = layers_by_stack(tensors)
    main = main_stack(stacks)
    counts = experts_by_layer(tensors)
    embedding = _embedding_rows(checkpoint)
    warnings = list(checkpoint.warnings)
    if checkpoint.config is not None:
        warnings += config_problems(config, tensors)
    warnings += layer_outliers(tensors)
    classes = architectures(config)
    largest = sorted(tensors.values(), key=lambda t: (-t.nbytes, t.name))[:5]
    return Inspection(
        model=checkpoint.reference,
        architecture=classes[0] if classes else None,
        model_type=str(config["model_type"]) if "model_type" in config else None,
        revision=checkpoint.revision,
        tensors=len(tensors),
        parameters=sum(t.numel for t in tensors.values()),
        bytes=sum(t.nbytes for t in tensors.values()),
        bytes_by_dtype=dtype_bytes(tensors),
        layers=len(stacks[main]) if main else None,
        stacks={s: len(indices) for s, indices in sorted(stacks.items())},
        experts=max(counts.values()) if counts else expert_count(config),
        experts_per_token=whole(text, "num_experts_per_tok", "num_experts_per_token", "moe_top_k"),
        hidden_size=whole(text, "hidden_size", "n_embd", "d_model"),
        vocab_size=embedding or whole(text, "vocab_size"),
        tied=config_ties(checkpoint.config) or (embedding is not None and not any(h in tensors for h in HEADS)),
        adapter=_adapter(checkpoint),
        files=[{"file": Path(s.path).name, "bytes": s.size} for s in checkpoint.stamps],
        warnings=warnings,
        largest=[{"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes} for t in largest],
    )


def _embedding_rows(checkpoint: Checkpoint) -> int | None:
    found = [checkpoint.tensors[n].shape for n in EMBEDDINGS if n in checkpoint.tensors]
    return found[0][0] if found and len(found[0]) == 2 else None


def _adapter(checkpoint: Checkpoint) -> dict[str, Any] | None:
    from mergekit_lr.checkpoint.lora import AdaptedCheckpoint

    if not isinstance(checkpoint, AdaptedCheckpoint):
        return None
    ranks = {checkpoint.adapter.tensors[u.a].shape[0] for u in checkpoint.updates.values() if u.a}
    return {
        "folder": checkpoint.adapter_folder.name,
        "rank": max(ranks, default=0),
        "changed": len(checkpoint.updates),
        "parameters": sum(t.numel for t in checkpoint.adapter.tensors.values()),
    }


def human_bytes(n: int) -> str:
    """``1.3 GB``: decimal units, three digits."""
    size = float(n)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
