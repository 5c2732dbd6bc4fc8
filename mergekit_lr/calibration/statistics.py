"""The statistics file: one safetensors file with what calibration learned of a model, and its typed reader.

Entries of a mixture are named ``<mixture on disk>.experts.<entry>``, as in ``model.layers.3.mlp.experts.gate_sum``;
entries of a Linear ``<tensor>.gram`` and ``<tensor>.gram_tokens``, as in ``lm_head.weight.gram``. docs/calibration.md
gives each one's formula. The header's metadata says of which model, text and numbers they are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.model import Checkpoint, open_file
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "mergekit_lr.statistics"
VERSION = "1"
DIGEST_ELEMENTS = 2048
"""Elements of each tensor, from its middle on, that go into a model's digest."""

MIXTURE_ENTRIES: dict[str, str] = {
    "tokens": "count N of the tokens that were seen",
    "routing_count": "n_e = number of tokens whose top k holds e",
    "coselection": "number of tokens whose top k holds both i and j",
    "gate_sum": "sum_t g_te",
    "gate_gram": "sum_t g_ti g_tj",
    "gate_mass": "sum_t softmax(l_t)_e, over all tokens, chosen or not",
    "router_gram": "sum_t l_ti l_tj",
    "router_softmax_gram": "sum_t softmax(l_t)_i softmax(l_t)_j",
    "output_norm_sum": "sum of |y_te| over the tokens routed to e",
    "output_square_sum": "sum of |y_te|^2 over the tokens routed to e",
    "gated_norm_sum": "sum_t w_te |y_te|",
    "gated_square_sum": "sum_t w_te^2 |y_te|^2",
    "output_max_norm": "max of |y_te| over the tokens routed to e",
    "output_max_abs": "max over tokens and components of |y_te,c|",
    "output_sum": "sum of y_te over the tokens routed to e",
    "expert_tokens": "count S of the sample that all experts were run on",
    "expert_gram": "sum_s <y_si, y_sj> over the sample",
    "expert_cosine_gram": "sum_s <y_si, y_sj> / (|y_si| |y_sj|) over the sample",
    "expert_output_sum": "sum_s y_se over the sample",
    "input_gram": "sum_t x_t x_t^T of the mixture's input",
    "hidden_gram": "sum_t w_te^2 h_te h_te^T of each expert's down projection's input",
}
"""Every entry of a mixture and its formula; the last two only where asked for."""

STORED: dict[str, str] = {
    **dict.fromkeys(MIXTURE_ENTRIES, "F64"),
    **dict.fromkeys(("tokens", "routing_count", "coselection", "expert_tokens"), "I64"),
    **dict.fromkeys(("output_sum", "expert_output_sum", "input_gram", "hidden_gram", "gram"), "F32"),
    "gram_tokens": "I64",
}
"""The dtype that an entry is stored in, by the last part of its name."""

_MIXTURE = re.compile(r"^(.*\.(\d+)\..*experts)\.(\w+)$")
_HOW = {
    "input_gram": "--grams input",
    "hidden_gram": "--grams hidden",
    "gram": "--grams linear",
    "gram_tokens": "--grams linear",
    "expert_gram": "--similarity-tokens 4096",
    "expert_cosine_gram": "--similarity-tokens 4096",
    "expert_output_sum": "--similarity-tokens 4096",
    "expert_tokens": "--similarity-tokens 4096",
}


def model_digest(checkpoint: Checkpoint) -> str:
    """Which model it is, whatever its files are called and cut: sha256 over the sorted tensors.

    Of each its name, dtype, shape and `DIGEST_ELEMENTS` elements from its middle on. A model that differs in a few
    elements elsewhere is not told apart.
    """
    h = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        h.update(f"{name}\0{info.dtype}\0{list(info.shape)}\n".encode())
        start = info.numel // 2
        part = checkpoint.read(name, start, min(info.numel, start + DIGEST_ELEMENTS))
        h.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


@dataclass(frozen=True)
class MixtureStatistics:
    """The entries of one mixture, read when they are asked for: ``E`` experts, ``H`` hidden, ``I`` expert width.

    ``layer``: index of the decoder layer; ``prefix``: what its entries are filed under. Vectors ``[E]`` and matrices
    ``[E, E]`` are float64, counts int64, the rest float32. Entries are sums: divide by the counts for means.
    """

    statistics: Statistics
    layer: int
    prefix: str

    def __getitem__(self, entry: str) -> Tensor:
        return self.statistics.read(f"{self.prefix}.{entry}")

    def __contains__(self, entry: str) -> bool:
        return f"{self.prefix}.{entry}" in self.statistics.checkpoint.tensors

    @property
    def tokens(self) -> int:
        """Tokens that the router saw."""
        return int(self["tokens"])

    @property
    def expert_tokens(self) -> int:
        """Tokens of the sample that all experts were run on."""
        return int(self["expert_tokens"])

    @property
    def routing_count(self) -> Tensor:
        """int64 ``[E]``: tokens routed to each expert."""
        return self["routing_count"]

    @property
    def frequency(self) -> Tensor:
        """float64 ``[E]``: share of the tokens whose top k holds the expert (sums to k)."""
        return self.routing_count.double() / self.tokens

    @property
    def cosine(self) -> Tensor:
        """float64 ``[E, E]``: mean cosine of two experts' outputs on the sample."""
        return self["expert_cosine_gram"] / self.expert_tokens

    def routed_mean(self, entry: str) -> Tensor:
        """float64 ``[E]``: a sum over routed tokens divided by their number; 0 for experts that were never chosen."""
        return self[entry].double() / self.routing_count.clamp_min(1)


@dataclass
class Statistics:
    """An open statistics file. Close it, or use it as a context manager."""

    path: Path
    metadata: Mapping[str, str]
    checkpoint: Checkpoint

    @cached_property
    def mixtures(self) -> dict[int, MixtureStatistics]:
        """Layer -> the statistics of its mixture, in ascending order."""
        found = {}
        for name in self.checkpoint.tensors:
            match = _MIXTURE.match(name)
            if match and match[3] == "routing_count":
                found[int(match[2])] = MixtureStatistics(self, int(match[2]), match[1])
        return dict(sorted(found.items()))

    def mixture(self, layer: int) -> MixtureStatistics:
        """The statistics of one layer's mixture.

        Raises:
            CheckpointError: the file has none for that layer.
        """
        if layer not in self.mixtures:
            raise CheckpointError(
                f"no statistics of a mixture of experts in layer {layer}",
                where=str(self.path),
                why=f"there are some of layers {sorted(self.mixtures)}" if self.mixtures else "there are none at all",
                fix="make them with: mergekit-lr calibrate MODEL OUT.safetensors --text FILE",
            )
        return self.mixtures[layer]

    def read(self, name: str) -> Tensor:
        """One entry, in its stored dtype and shape.

        Raises:
            CheckpointError: there is no such entry; the message says how to make it.
        """
        info = self.checkpoint.tensors.get(name)
        if info is None:
            how = _HOW.get(name.rpartition(".")[2], "")
            raise CheckpointError(
                f"the statistics have no {name!r}",
                where=str(self.path),
                fix=f"make it with: mergekit-lr calibrate MODEL OUT.safetensors --text FILE {how}".rstrip(),
            )
        return self.checkpoint.read(name, 0, info.numel).view(info.shape)

    def gram(self, tensor: str) -> Tensor:
        """float32 ``[in, in]``: sum over tokens of x x^T, x the input of the Linear whose weight is ``tensor``."""
        return self.read(f"{tensor}.gram")

    def gram_tokens(self, tensor: str) -> int:
        """Tokens that the Gram of ``tensor`` sums over."""
        return int(self.read(f"{tensor}.gram_tokens"))

    @property
    def tokens(self) -> int:
        """Tokens of the calibration text, padding not counted."""
        return int(self.metadata["tokens"])

    def check_model(self, model: Checkpoint) -> None:
        """Refuse statistics of another model.

        Raises:
            CheckpointError: the digests differ.
        """
        if self.metadata.get("model_digest") != model_digest(model):
            raise CheckpointError(
                "the statistics are of another model",
                where=str(self.path),
                why=f"their model digest is not that of {model.reference}",
                fix="calibrate that model, or say that any model's statistics will do",
            )

    def close(self) -> None:
        self.checkpoint.close()

    def __enter__(self) -> Statistics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_statistics(path: str | Path, model: Checkpoint | None = None, *, any_model: bool = False) -> Statistics:
    """Open a statistics file, and check that it belongs to ``model`` unless ``any_model`` is set.

    Raises:
        CheckpointError: it is no statistics file, of another version, or of another model.
    """
    path = Path(path)
    metadata = read_header(path).metadata
    fix = "make one with: mergekit-lr calibrate MODEL OUT.safetensors --text FILE"
    if metadata.get("kind") != FORMAT:
        raise CheckpointError("not a statistics file", where=str(path), why="its header does not say so", fix=fix)
    if metadata.get("format_version") != VERSION:
        version = metadata.get("format_version")
        raise CheckpointError("a statistics file of another version", where=str(path), why=f"{version!r}", fix=fix)
    statistics = Statistics(path, metadata, open_file(path, str(path)))
    if model is not None and not any_model:
        try:
            statistics.check_model(model)
        except CheckpointError:
            statistics.close()
            raise
    return statistics
