"""MergeMoE's least squares: the down projection of a merged expert, fitted to the average of what its members give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.writer import write_safetensors
from mergekit_lr.errors import CheckpointError
from mergekit_lr.experts.decision import LayerDecision
from mergekit_lr.experts.merging import least_squares_down
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lr.rewrite import Preparation

FOLDER = "fitted"
CHUNK = 4096
"""Tokens that are run at a time."""
ENOUGH = 20
"""Tokens for each column of a fit without much ridge (measured: with fewer, fits follow noise)."""
RIDGE_FOR_LITTLE = 1e-2


class _Averaged:
    """An experts module with one expert: the weighted mean of some, in the module's own layout."""

    def __init__(self, experts: Any, members: Sequence[int], shares: Sequence[float]) -> None:
        self.has_gate, self.is_transposed, self.has_bias = experts.has_gate, experts.is_transposed, experts.has_bias
        for name in ("act_fn", "_apply_gate"):
            if hasattr(experts, name):
                setattr(self, name, getattr(experts, name))
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            for full in (name, f"{name}_bias"):
                value = getattr(experts, full, None)
                if value is not None:
                    mean = sum(s * value[e].float() for e, s in zip(members, shares, strict=True))
                    setattr(self, full, [mean])


def fit_down(layer: Any, members: Sequence[int], shares: Sequence[float], ridge: float) -> tuple[Tensor, float, float]:
    """The fitted down projection ``[H, I]`` of one group, and the relative error before and after on these tokens.

    ``T = sum_i f_i E_i(X)`` over the members (without biases), ``P`` what the averaged expert feeds its down
    projection; ``D = argmin |D P - T|^2`` with a ridge towards the averaged down projection (arXiv 2510.14436, eq.
    13-16, where ``[f_1 D_1 .. f_k D_k] Q P^+`` is the same without a ridge).
    """
    from mergekit_lr.calibration.probe import hidden_of

    experts = layer.block.experts
    averaged = _Averaged(experts, members, shares)

    def down(source: Any, e: int) -> Tensor:
        w: Tensor = source.down_proj[e].double()
        return w.T if experts.is_transposed else w

    start = down(averaged, 0)
    width = start.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64)
    cross = torch.zeros(start.shape[0], width, dtype=torch.float64)
    energy = 0.0
    for x in torch.split(layer.inputs, CHUNK):
        p = hidden_of(averaged, x.float(), 0).double()
        target = torch.zeros(len(x), start.shape[0], dtype=torch.float64)
        for e, share in zip(members, shares, strict=True):
            target += share * (layer.hidden(x, e).double() @ down(experts, e).T)
        gram += p.T @ p
        cross += target.T @ p
        energy += float(target.square().sum())
    fitted = least_squares_down(gram, cross, ridge, start)

    def error(d: Tensor) -> float:
        squared = energy - 2 * float((d * cross).sum()) + float(((d @ gram) * d).sum())
        return (max(squared, 0.0) / energy) ** 0.5 if energy > 0 else 0.0

    return fitted, error(start), error(fitted)


def fit_all(
    work: Preparation, checkpoint: Checkpoint, decisions: Mapping[str, LayerDecision], *, ridge: float, seed: int
) -> None:
    """Fit every group of every layer on the calibration text; one file for each layer, resumed layer by layer.

    Raises:
        CheckpointError: too little text for the ridge, or none.
    """
    from mergekit_lr.calibration.layers import stream_layers, windows_for
    from mergekit_lr.calibration.stream import one_thread

    calibration = work.recipe.calibration
    assert calibration is not None
    folder = work.folder / FOLDER
    fs.make_folder(folder)
    todo = {b for b in decisions if not _file(folder, b).exists()}
    if not todo:
        return
    texts = [*calibration.text, *([calibration.dataset] if calibration.dataset else [])]
    if not texts:
        raise CheckpointError(
            "a least-squares merge needs calibration text",
            where="calibration",
            why="statistics alone do not hold what experts give on a token",
            fix="add `calibration: {text: [FILE]}`",
        )
    sizes = {"samples": calibration.samples, "sequence_length": calibration.sequence_length}
    windows = windows_for(checkpoint, texts, **sizes, seed=seed)
    for number, layer in enumerate(stream_layers(checkpoint, windows, device="cpu", limit=work.limit)):
        block = layer.prefix.removesuffix(".experts")
        work.tell(number, len(decisions), "fitting")
        if block in todo:
            with torch.inference_mode(), one_thread():
                _check(layer, ridge)
                _fit_layer(layer, decisions[block], _file(folder, block), ridge)
    work.tell(len(decisions), len(decisions), "fitting")


def _file(folder: Path, block: str) -> Path:
    return folder / f"{block}.safetensors"


def _check(layer: Any, ridge: float) -> None:
    experts = layer.block.experts
    width = int(experts.down_proj.shape[1 if experts.is_transposed else 2])
    tokens = len(layer.inputs)
    if tokens < ENOUGH * width and ridge < RIDGE_FOR_LITTLE:
        raise CheckpointError(
            f"too little calibration text for a least-squares fit: {tokens} tokens",
            where=layer.name,
            why=f"{ENOUGH} tokens for each of {width} neurons are needed, {ENOUGH * width} in all",
            fix=f"raise calibration.samples, or set ridge to {RIDGE_FOR_LITTLE} or more",
        )


def _fit_layer(layer: Any, decision: LayerDecision, path: Path, ridge: float) -> None:
    tensors: dict[str, Tensor] = {}
    errors: dict[str, str] = {}
    for j, (group, shares) in enumerate(zip(decision.partition.groups, decision.shares, strict=True)):
        if group.alone:
            continue
        fitted, before, after = fit_down(layer, group.members, shares, ridge)
        tensors[f"{decision.block}.experts.{j}.down"] = fitted.float().contiguous()
        errors[str(j)] = f"{before:.6g} {after:.6g}"
    if not tensors:  # a file must say that the layer is done
        tensors[f"{decision.block}.experts.none"] = torch.zeros(1)
    write_safetensors(path, tensors, errors)
