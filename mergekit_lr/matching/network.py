"""Networks that can be run from a checkpoint alone: perceptrons and ResNets by their names, others by transformers.

No code of a model is ever run: what a plain state dict computes follows from its names, or it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lr.arch.families import family_of
from mergekit_lr.arch.inferred import chain_order, chain_spec
from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.writer import write_safetensors
from mergekit_lr.errors import CheckpointError, UsageError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


def network_of(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, where: str, activation: str = "relu"
) -> nn.Module:
    """A module, in evaluation mode and fp32, that computes what these tensors mean.

    With a ``config``, the class of transformers that its ``architectures`` names; without, a `Perceptron` or a
    `ResNet`, whose parameters have the names of ``tensors``.

    Raises:
        CheckpointError: it is none of these, or tensors are missing or left over.
        UsageError: the activation is unknown.
    """
    if config is not None:
        return _of_transformers(tensors, config, where)
    kind = ResNet if family_of(tensors, None) == "resnet" else Perceptron
    network = kind(tensors, where) if kind is ResNet else Perceptron(tensors, where, activation)
    network.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in tensors.items()})
    return network.eval()


class Perceptron(nn.Module):
    """Linear layers in a chain, BatchNorm after those that have it, an activation between; inputs are flattened."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str, activation: str = "relu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UsageError(f"no activation {activation!r}", fix=f"use one of {', '.join(ACTIVATIONS)}")
        shapes = {n: tuple(t.shape) for n, t in tensors.items()}
        order = chain_order(shapes, where)
        wide = [n for n, s in shapes.items() if len(s) > 2]
        if wide:
            raise CheckpointError(
                "this is no plain perceptron, so what it computes does not follow from its weights alone",
                where=where,
                why=f"{wide[0]} is a convolution, and strides and pooling are nowhere written down",
                fix="use the functions of mergekit_lr.matching with the network as an nn.Module",
            )
        self.steps: list[tuple[str, str | None]] = []
        self.act = ACTIVATIONS[activation]
        spec = chain_spec(shapes, where)
        norms = {n.removesuffix(".running_mean") for n in shapes if n.endswith(".running_mean")}
        others = {n.rpartition(".")[0] for n in shapes} - norms - set(order)
        if others:
            raise CheckpointError(f"{min(others)} is neither a linear layer nor BatchNorm", where=where)
        for m in order:
            out, into = shapes[f"{m}.weight"]
            _place(self, m, nn.Linear(into, out, bias=f"{m}.bias" in shapes))
            writes = spec.of_tensor[f"{m}.weight"][0].axes[0]
            norm = next((n for n in norms if spec.of_tensor[f"{n}.running_mean"][0].axes[0] == writes), None)
            if norm is not None:
                _place(self, norm, nn.BatchNorm1d(out, affine=f"{norm}.weight" in shapes))
            self.steps.append((m, norm))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for i, (linear, norm) in enumerate(self.steps):
            x = self.get_submodule(linear)(x)
            x = x if norm is None else self.get_submodule(norm)(x)
            x = self.act(x) if i < len(self.steps) - 1 else x
        return x


class ResNet(nn.Module):
    """The names of torchvision (``downsample``, ``fc``) and of the CIFAR ones (``shortcut``, ``linear``).

    A stem of 7 x 7 has stride 2 and is followed by max pooling, as torchvision's; a smaller one has neither. The first
    block of every stage but the first halves the maps, in its 3 x 3 convolution. A shortcut without weights that has to
    change shape takes every second place and pads with channels of zeros.
    """

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        super().__init__()
        found = sorted({(int(m[1]), int(m[2])) for n in tensors if (m := re.match(r"layer(\d+)\.(\d+)\.", n))})
        self.blocks = [(f"layer{s}.{b}", 2 if b == 0 and s > 1 else 1) for s, b in found]
        self.large = tensors["conv1.weight"].shape[-1] >= 7
        self._convolution(tensors, "conv1", 2 if self.large else 1)
        self._norm(tensors, "bn1")
        for name, stride in self.blocks:
            count = 3 if f"{name}.conv3.weight" in tensors else 2
            for i in range(1, count + 1):
                self._convolution(tensors, f"{name}.conv{i}", stride if i == count - 1 else 1)
                self._norm(tensors, f"{name}.bn{i}")
            for short in ("downsample", "shortcut"):
                if f"{name}.{short}.0.weight" in tensors:
                    self._convolution(tensors, f"{name}.{short}.0", stride)
                    self._norm(tensors, f"{name}.{short}.1")
        self.head = "fc" if "fc.weight" in tensors else "linear"
        if f"{self.head}.weight" not in tensors:
            raise CheckpointError("a ResNet without a head computes no classes", where=where)
        out, into = tensors[f"{self.head}.weight"].shape
        _place(self, self.head, nn.Linear(into, out, bias=f"{self.head}.bias" in tensors))

    def _convolution(self, tensors: Mapping[str, Tensor], name: str, stride: int) -> None:
        out, into, k, _ = tensors[f"{name}.weight"].shape
        _place(self, name, nn.Conv2d(into, out, k, stride, k // 2, bias=f"{name}.bias" in tensors))

    def _norm(self, tensors: Mapping[str, Tensor], name: str) -> None:
        _place(self, name, nn.BatchNorm2d(len(tensors[f"{name}.weight"])))

    def forward(self, x: Tensor) -> Tensor:
        x = self.get_submodule("bn1")(self.get_submodule("conv1")(x)).relu()
        x = nn.functional.max_pool2d(x, 3, 2, 1) if self.large else x
        for name, stride in self.blocks:
            block = self.get_submodule(name)
            count = 3 if hasattr(block, "conv3") else 2
            y = x
            for i in range(1, count + 1):
                y = block.get_submodule(f"bn{i}")(block.get_submodule(f"conv{i}")(y))
                y = y.relu() if i < count else y
            x = (y + _shortcut(block, x, y.shape[1], stride)).relu()
        out: Tensor = self.get_submodule(self.head)(x.mean((2, 3)))
        return out


def _shortcut(block: nn.Module, x: Tensor, channels: int, stride: int) -> Tensor:
    for name in ("downsample", "shortcut"):
        if hasattr(block, name):
            out: Tensor = block.get_submodule(f"{name}.1")(block.get_submodule(f"{name}.0")(x))
            return out
    x = x[:, :, ::stride, ::stride]
    before = (channels - x.shape[1]) // 2
    return nn.functional.pad(x, (0, 0, 0, 0, before, channels - x.shape[1] - before)) if channels > x.shape[1] else x


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Hang a module under a dotted name."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)


def _of_transformers(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> nn.Module:
    """Through a folder, so that names on disk become names in memory in transformers' own way."""
    import transformers
    from transformers.utils import logging

    names = config.get("architectures") or ["AutoModelForCausalLM"]
    kind = getattr(transformers, str(names[0]), None)
    known = isinstance(kind, type) and issubclass(
        kind, (transformers.PreTrainedModel, transformers.AutoModelForCausalLM)
    )
    if kind is None or not known:
        raise CheckpointError(f"transformers has no class {names[0]!r}", where=where, why="config.json asks for it")
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with TemporaryDirectory() as folder:
            here = Path(folder)
            fs.write_file(here / "config.json", _as_json(config))
            write_safetensors(here / "model.safetensors", tensors, {"format": "pt"})
            found, report = kind.from_pretrained(
                here,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as e:
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise CheckpointError("transformers cannot load the model", where=where, why=why) from e
    finally:
        logging.set_verbosity(before[0])
        if before[1]:
            logging.enable_progress_bar()
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(problem):
            first = sorted(map(str, report[problem]))[0]
            raise CheckpointError(f"the weights do not fit the model: {problem} {first}", where=where)
    network: nn.Module = found.eval()
    return network


def _as_json(config: Mapping[str, Any]) -> bytes:
    import json

    return json.dumps({k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}).encode()
