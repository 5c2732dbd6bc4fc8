"""What the models of a recipe are run on: windows of text, or the rows of a data file; and their loss on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lr.calibration.layers import windows_for
from mergekit_lr.checkpoint.model import Checkpoint, open_file
from mergekit_lr.errors import CheckpointError, RecipeError
from mergekit_lr.matching.network import network_of
from mergekit_lr.recipe import Recipe

ROWS = 256
"""Rows of a data file that run together."""
Batch = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Samples:
    """``batches`` as a network takes them; ``labels`` of each: classes ``[n]``, or the tokens ``[n, length]``.

    A token that is padding has the label -100. None where a data file has no labels.
    """

    batches: tuple[Batch, ...]
    labels: tuple[Tensor, ...] | None


def samples_of(recipe: Recipe, merge: Any, model: Checkpoint) -> Samples:
    """Of the recipe's parameter ``data``, or else of its ``calibration``.

    Raises:
        RecipeError: there is neither.
        CheckpointError: files cannot be used, or there is too little text.
    """
    if merge.data is not None:
        inputs, labels = read_inputs(Path(merge.data)), read_labels(Path(merge.data))
        return Samples(as_batches(inputs, model.config), None if labels is None else torch.split(labels, ROWS))
    c = recipe.calibration
    texts = [*c.text, *filter(None, [c.dataset])] if c else []
    if c is None or not texts:
        raise RecipeError(
            "there is nothing to run the models on",
            where=str(recipe.origin or "recipe"),
            fix="add `calibration: {text: [FILE]}` for language models, or the parameter `data` for others",
        )
    windows = windows_for(model, texts, samples=c.samples, sequence_length=c.sequence_length, seed=recipe.seed)
    batches, labels_ = [], []
    for batch in windows.batches():
        mask = batch.valid.reshape(batch.ids.shape)
        whole = {} if bool(mask.all()) else {"attention_mask": mask.long()}
        batches.append({"input_ids": batch.ids, **whole})
        labels_.append(batch.ids.masked_fill(~mask, -100))
    return Samples(tuple(batches), tuple(labels_))


def as_batches(inputs: Tensor, config: Mapping[str, Any] | None) -> tuple[Batch, ...]:
    """Rows of a data file, as a plain network takes them, or one of transformers (images)."""
    rows: tuple[Tensor, ...] = torch.split(inputs, ROWS)
    return rows if config is None else tuple({"pixel_values": x} for x in rows)


def run(network: nn.Module, batch: Batch) -> Tensor:
    """Outputs or logits.

    Raises:
        CheckpointError: the network does not take such a batch.
    """
    try:
        out = network(**batch) if isinstance(batch, Mapping) else network(batch)
    except (TypeError, ValueError, RuntimeError, IndexError) as e:
        given = {k: list(v.shape) for k, v in (batch if isinstance(batch, Mapping) else {"inputs": batch}).items()}
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise CheckpointError(f"the model cannot be run on {given}", why=why) from e
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits


def batch_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy: of classes, or of each next token."""
    if outputs.ndim == 3:
        outputs, labels = outputs[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(outputs, labels)


def mean_loss(network: nn.Module, samples: Samples) -> float:
    """`batch_loss` over all batches, each weighted by its labels, in fp64."""
    assert samples.labels is not None
    total, count = 0.0, 0
    with torch.inference_mode():
        for batch, labels in zip(samples.batches, samples.labels, strict=True):
            outputs = run(network, batch).double()
            n = int((labels[:, 1:] if outputs.ndim == 3 else labels).ge(0).sum())
            total, count = total + n * float(batch_loss(outputs, labels)), count + n
    return total / count


def check_labels(network: nn.Module, samples: Samples, where: str) -> Samples:
    """The samples, if a loss can be computed from them.

    Raises:
        CheckpointError: there are no labels, labels and outputs do not fit, or the model predicts no next token.
    """
    fix = "give a data file with `labels`, or a model that predicts the next token and text"
    if samples.labels is None:
        raise CheckpointError("there is no loss to learn from", where=where, why="the data has no labels", fix=fix)
    with torch.inference_mode():
        outputs = run(network, samples.batches[0])
    config: Any = getattr(network, "config", None)
    words = outputs.ndim == 3 and not str((config.architectures or [""])[0]).endswith(("CausalLM", "LMHeadModel"))
    most = max(int(x.max()) for x in samples.labels)
    if words or outputs.ndim not in (2, 3) or most >= outputs.shape[-1]:
        why = f"outputs have shape {list(outputs.shape)} and labels go up to {most}"
        raise CheckpointError("there is no loss to learn from", where=where, why=why, fix=fix)
    return samples


def loaded(model: Checkpoint, tensors: Mapping[str, Tensor], activation: str) -> nn.Module:
    """The network of a checkpoint, with ``tensors`` in the place of its own."""
    return network_of(tensors, model.config, model.reference, activation)


def read_inputs(path: Path) -> Tensor:
    """``inputs [n, ...]`` of a safetensors file, fp32.

    Raises:
        CheckpointError: there are none.
    """
    found = _read(path, "inputs", needed=True)
    assert found is not None
    if found.ndim < 2 or not len(found):
        raise CheckpointError("`inputs` holds no samples", where=str(path), why=f"its shape is {tuple(found.shape)}")
    return found.float()


def read_labels(path: Path) -> Tensor | None:
    """``labels [n]`` of a safetensors file, int64; None where it has none.

    Raises:
        CheckpointError: there are not as many as inputs, or one is negative.
    """
    found, inputs = _read(path, "labels", needed=False), read_inputs(path)
    if found is None:
        return None
    if found.ndim != 1 or len(found) != len(inputs) or int(found.min()) < 0:
        shapes = f"{tuple(inputs.shape)} and {tuple(found.shape)}"
        raise CheckpointError("inputs and labels do not fit", where=str(path), why=shapes)
    return found.long()


def _read(path: Path, name: str, *, needed: bool) -> Tensor | None:
    with open_file(path, str(path)) as file:
        if name not in file.tensors:
            if not needed:
                return None
            raise CheckpointError(
                f"the data has no tensor {name!r}", where=str(path), fix="store `inputs` [n, ...] and `labels` [n]"
            )
        info = file.tensors[name]
        return file.read(name, 0, info.numel).reshape(info.shape)


def chunks(samples: Samples, order: Sequence[int]) -> Iterator[tuple[Batch, Tensor]]:
    """Batches with their labels in an order."""
    assert samples.labels is not None
    for i in order:
        yield samples.batches[i], samples.labels[i]
