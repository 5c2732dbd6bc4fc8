"""What a plain perceptron computes, from its state dict alone, and data files to run it on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mergekit_lr.arch.inferred import chain_order
from mergekit_lr.checkpoint.model import open_file
from mergekit_lr.errors import CheckpointError, UsageError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


def perceptron(
    tensors: Mapping[str, Tensor],
    inputs: Tensor,
    activation: str = "relu",
    where: str = "model",
    seen: dict[str, Tensor] | None = None,
) -> Tensor:
    """Outputs of linear layers with one activation between them; ``inputs [n, ...]`` are flattened.

    ``seen`` is filled with what enters each weight, ``[n, d]`` in fp64.

    Raises:
        CheckpointError: the tensors are anything but linear layers in a chain.
        UsageError: the activation is unknown.
    """
    if activation not in ACTIVATIONS:
        raise UsageError(f"no activation {activation!r}", fix=f"use one of {', '.join(ACTIVATIONS)}")
    layers = chain_order({n: tuple(t.shape) for n, t in tensors.items()}, where)
    others = set(tensors) - {f"{m}.{part}" for m in layers for part in ("weight", "bias")}
    if others or any(tensors[f"{m}.weight"].ndim != 2 for m in layers):
        raise CheckpointError(
            "this is no plain perceptron, so its loss cannot be measured from its weights alone",
            where=where,
            why=f"it has {min(others) if others else 'convolutions'}",
            fix="use mergekit_lr.matching.barrier.loss_barrier with a function that computes the loss",
        )
    x = inputs.flatten(1)
    for i, m in enumerate(layers):
        if seen is not None:
            seen[f"{m}.weight"] = x.double()
        weight = tensors[f"{m}.weight"].to(x.dtype)
        bias = tensors.get(f"{m}.bias")
        x = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        if i < len(layers) - 1:
            x = ACTIVATIONS[activation](x)
    return x


def read_data(path: Path) -> tuple[Tensor, Tensor]:
    """``inputs [n, ...]`` (fp32) and ``labels [n]`` (int64) of a safetensors file.

    Raises:
        CheckpointError: they are not there, or not as many of one as of the other.
    """
    inputs, labels = read_inputs(path), _read(path, "labels").long()
    if labels.ndim != 1 or len(labels) != len(inputs):
        shapes = f"{tuple(inputs.shape)} and {tuple(labels.shape)}"
        raise CheckpointError("inputs and labels do not fit", where=str(path), why=shapes)
    return inputs, labels


def read_inputs(path: Path) -> Tensor:
    """``inputs [n, ...]`` of a safetensors file, fp32.

    Raises:
        CheckpointError: there are none.
    """
    inputs = _read(path, "inputs").float()
    if inputs.ndim < 2 or not len(inputs):
        raise CheckpointError("`inputs` holds no samples", where=str(path), why=f"its shape is {tuple(inputs.shape)}")
    return inputs


def _read(path: Path, name: str) -> Tensor:
    with open_file(path, str(path)) as file:
        if name not in file.tensors:
            raise CheckpointError(
                f"the data has no tensor {name!r}", where=str(path), fix="store `inputs` [n, ...] and `labels` [n]"
            )
        shape = file.tensors[name].shape
        return file.read(name, 0, int(torch.tensor(shape).prod())).reshape(shape)
