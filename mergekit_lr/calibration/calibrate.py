"""`calibrate`: one pass of text through a model, one layer in memory at a time, into one statistics file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergekit_lr.calibration.accumulate import Wanted
from mergekit_lr.calibration.network import Network
from mergekit_lr.calibration.run import GRAMS, Calibration
from mergekit_lr.calibration.text import load_tokenizer, read_windows
from mergekit_lr.checkpoint.dtypes import torch_dtype
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.open import open_model
from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.engine.memory import default_limit
from mergekit_lr.engine.plan import choose_device
from mergekit_lr.engine.progress import Progress
from mergekit_lr.engine.target import check_place
from mergekit_lr.errors import CheckpointError, UsageError
from mergekit_lr.lazy import torch
from mergekit_lr.sizes import parse_size

DTYPES = ("auto", "float32", "bfloat16", "float16")


def calibrate(
    model: str | Path,
    out: str | Path,
    text: Sequence[str | Path],
    *,
    samples: int = 128,
    sequence_length: int = 512,
    grams: Sequence[str] = (),
    similarity_tokens: int = 4096,
    dtype: str = "auto",
    device: str = "auto",
    max_memory: str | int | None = None,
    seed: int = 0,
    resume: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run text through a model and write what its mixtures (and, if asked, its Linear layers) did.

    Args:
        model: folder, Hub id, either with ``+adapter``.
        out: the statistics file to write, ``*.safetensors``.
        text: text files, or Hub datasets written ``org/name[:CONFIG[:SPLIT]]``.
        samples: windows of text, spread evenly over the texts.
        sequence_length: tokens of a window.
        grams: any of ``linear`` (input Gram of every Linear outside the experts), ``input`` (of each mixture),
            ``hidden`` (of each expert's down projection, gate-weighted).
        similarity_tokens: tokens on which all experts are run for the Grams between experts; 0 for none.
        dtype: what is computed in; ``auto`` is float32 on a CPU and the stored dtype on a GPU.
        max_memory: bytes for one layer, the batches in work and the statistics of the layer.
        seed: decides which windows and which tokens of the sample.

    Returns:
        ``{"out", "model", "tokens", "samples", "sequence_length", "mixtures", "entries", "metadata"}``.

    Raises:
        CheckpointError: the model cannot be run or has no mixture, or the text cannot be used.
        UsageError: arguments that make no sense together, or unfinished work of another run.
        ResourceError: the memory budget does not hold one layer and one batch.
    """
    target = Path(out)
    wanted = _wanted(grams, target, similarity_tokens, dtype)
    if not text:
        raise UsageError("there is no text to calibrate on", fix="give at least one text file")
    reference = ModelReference.parse(str(model))
    check_place(target)
    place = choose_device(device)
    with open_model(reference) as checkpoint:
        tokenizer = load_tokenizer(checkpoint.folder, checkpoint.reference)
        windows = read_windows(tokenizer, text, samples=samples, sequence_length=sequence_length, seed=seed)
        network = Network(checkpoint, compute_dtype(dtype, checkpoint, place), place)
        if not network.mixtures and not wanted.linear:
            raise CheckpointError(
                "the model is dense: it has no mixture of experts to watch",
                where=checkpoint.reference,
                why=f"model type {network.config.model_type!r}",
                fix="ask for --grams linear, or calibrate a mixture of experts",
            )
        limit = default_limit() if max_memory is None else parse_size(max_memory)
        return Calibration(network, windows, wanted, similarity_tokens, limit, target).run(
            resume=resume, overwrite=overwrite, progress=progress
        )


def _wanted(grams: Sequence[str], target: Path, similarity_tokens: int, dtype: str) -> Wanted:
    unknown = [g for g in grams if g not in GRAMS]
    if unknown:
        raise UsageError(f"the Gram {unknown[0]!r} is not known", fix=f"choose of {', '.join(GRAMS)}")
    if target.suffix != ".safetensors":
        raise UsageError("the output is not a safetensors file", where=str(target), fix="name it OUT.safetensors")
    if similarity_tokens < 0:
        raise UsageError(f"similarity_tokens is {similarity_tokens}", fix="give 0 or more")
    if dtype not in DTYPES:
        raise UsageError(f"the dtype {dtype!r} is not known", fix=f"choose of {', '.join(DTYPES)}")
    return Wanted(**{g: g in grams for g in GRAMS})


def compute_dtype(dtype: str, checkpoint: Checkpoint, device: str) -> torch.dtype:
    """The dtype to compute in; ``auto`` is float32 on a CPU and that of most stored weights on a GPU."""
    if dtype != "auto":
        named: torch.dtype = getattr(torch, dtype)
        return named
    if device == "cpu":
        return torch.float32
    sizes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.numel
    most = max(sizes, key=lambda code: sizes[code])
    return torch_dtype(most) if most in ("BF16", "F16") else torch.float32
