"""From text to the token windows that a model is calibrated on: the same ones for the same text, numbers and seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.foreign_code import check_loadable
from mergekit_lr.errors import CheckpointError, UsageError
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

MAX_TEXT = 1 << 30
BATCH_TOKENS = 4096
"""Tokens of one batch. Fixed, because sums are formed batch by batch and must not depend on the machine."""


@dataclass(frozen=True)
class Batch:
    """Windows that run together: ids int64 ``[B, L]`` padded on the right, and each one's length."""

    number: int
    ids: Tensor
    lengths: tuple[int, ...]
    held_out: tuple[bool, ...]

    @property
    def valid(self) -> Tensor:
        """bool ``[B * L]``: what is a token and not padding."""
        width = self.ids.shape[1]
        return (torch.arange(width)[None] < torch.tensor(self.lengths)[:, None]).reshape(-1)

    @property
    def held(self) -> Tensor:
        """bool ``[B * L]``: what belongs to a window of the held-out half."""
        return torch.tensor(self.held_out).repeat_interleave(self.ids.shape[1])


@dataclass(frozen=True)
class Windows:
    """Token windows in the order in which they run: full ones first, then shorter ones.

    ``ids`` int64, one tensor per window; ``sources``: number of each one's text; ``held_out``: True for every second
    window of a text, for methods that fit on one half and judge on the other.
    """

    ids: tuple[Tensor, ...]
    sources: tuple[int, ...]
    held_out: tuple[bool, ...]
    sequence_length: int
    seed: int

    @property
    def tokens(self) -> int:
        """Tokens in all windows, padding not counted."""
        return sum(len(i) for i in self.ids)

    @property
    def digest(self) -> str:
        """sha256 of the windows: lengths, tokens, order, split."""
        h = hashlib.sha256()
        for ids, held in zip(self.ids, self.held_out, strict=True):
            h.update(f"{len(ids)} {int(held)}\n".encode())
            h.update(ids.to(torch.int64).numpy().astype("<i8").tobytes())
        return h.hexdigest()

    def batches(self) -> list[Batch]:
        """Consecutive windows, as many as fit `BATCH_TOKENS` (at least one), padded to the longest of the batch."""
        size = max(1, BATCH_TOKENS // self.sequence_length)
        return list(self._batches(size))

    def _batches(self, size: int) -> Iterator[Batch]:
        for number, start in enumerate(range(0, len(self.ids), size)):
            part = self.ids[start : start + size]
            lengths = tuple(len(i) for i in part)
            padded = torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True)
            yield Batch(number, padded, lengths, self.held_out[start : start + size])


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        CheckpointError: it is missing, empty, too large or not UTF-8.
    """
    try:
        fs.reading("read", path)
        if path.stat().st_size > MAX_TEXT:
            raise CheckpointError("the text is too large", where=str(path), why=f"over {MAX_TEXT} bytes")
        content = path.read_text(encoding="utf-8")
    except OSError as e:
        fix = "check the path"
        raise CheckpointError("cannot read the text", where=str(path), why=e.strerror or str(e), fix=fix) from e
    except UnicodeDecodeError as e:
        raise CheckpointError("the text is not UTF-8", where=str(path), why=str(e), fix="convert it") from e
    if not content.strip():
        raise CheckpointError("the text is empty", where=str(path), fix="give a file with text")
    return content


def load_tokenizer(folder: Path | None, reference: str) -> Any:
    """The model's own tokenizer, from local files and with no code of theirs.

    Raises:
        CheckpointError: there is none, or transformers cannot read it.
    """
    fix = "put the model's tokenizer files into its folder"
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
    if folder is None or not any((folder / n).exists() for n in names):
        raise CheckpointError("the model has no tokenizer", where=reference, why="text cannot be cut", fix=fix)
    check_loadable(folder)
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError) as e:
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise CheckpointError("transformers cannot read the tokenizer", where=reference, why=why, fix=fix) from e
    finally:
        logging.set_verbosity(verbosity)


def tokenise(tokenizer: Any, text: str) -> Tensor:
    """Token ids int64 ``[n]``, no special tokens added."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def cut_windows(
    texts: Sequence[tuple[str, Tensor]], *, samples: int, sequence_length: int, seed: int, bytes_per_token: float = 4.0
) -> Windows:
    """Choose ``samples`` windows of ``sequence_length`` tokens, spread evenly over the texts.

    A text is cut into consecutive windows, its tail dropped; a text shorter than a window is one short window. Each
    text gives the same number as far as it has them; which ones is decided by a hash of seed, text and position.

    Raises:
        UsageError: a number is out of range.
        CheckpointError: there is too little text; the message says how much more is needed.
    """
    for name, value, least in (("samples", samples, 1), ("sequence_length", sequence_length, 2)):
        if value < least:
            raise UsageError(f"{name} is {value}", fix=f"give at least {least}")
    capacity = [max(1, len(ids) // sequence_length) if len(ids) > 1 else 0 for _, ids in texts]
    if sum(capacity) < samples:
        lacking = (samples - sum(capacity)) * sequence_length
        raise CheckpointError(
            "there is too little text",
            where=", ".join(name for name, _ in texts[:3]) + (", ..." if len(texts) > 3 else ""),
            why=f"it gives {sum(capacity)} of {samples} windows of {sequence_length} tokens",
            fix=f"add about {lacking} tokens ({math.ceil(lacking * bytes_per_token)} bytes) of text, "
            "or ask for fewer samples or a smaller sequence length",
        )
    chosen: list[tuple[Tensor, int, bool]] = []
    for number, ((_, ids), share) in enumerate(zip(texts, _shares(capacity, samples), strict=True)):
        ranked = _ranked(ids, capacity[number], seed)[:share]
        held = {place: rank % 2 == 1 for rank, place in enumerate(ranked)}
        for place in sorted(ranked):
            chosen.append((ids[place * sequence_length : (place + 1) * sequence_length], number, held[place]))
    chosen.sort(key=lambda c: -len(c[0]))
    windows, sources, held_out = zip(*chosen, strict=True)
    return Windows(windows, sources, held_out, sequence_length, seed)


def _shares(capacity: Sequence[int], samples: int) -> list[int]:
    """How many windows each text gives: one more each in turn, for as long as it has one."""
    shares = [0] * len(capacity)
    left = samples
    while left:
        open_texts = [i for i, c in enumerate(capacity) if shares[i] < c]
        each = max(1, min(left // len(open_texts), min(capacity[i] - shares[i] for i in open_texts)))
        for i in open_texts[: left // each]:
            shares[i] += each
            left -= each
    return shares


def _ranked(ids: Tensor, count: int, seed: int) -> list[int]:
    """Windows of a text in an order that only seed and content decide."""
    content = hashlib.sha256(ids.numpy().astype("<i8").tobytes()).digest()

    def key(place: int) -> bytes:
        return hashlib.sha256(f"{seed}\0{place}\0".encode() + content).digest()

    return sorted(range(count), key=key)


def read_windows(
    tokenizer: Any, texts: Iterable[str | Path], *, samples: int, sequence_length: int, seed: int
) -> Windows:
    """Windows of text files; see `cut_windows`.

    Raises:
        CheckpointError: a file cannot be used, or there is too little text.
        UsageError: there is no text, or a number is out of range.
    """
    from mergekit_lr.calibration.dataset import dataset_text, is_dataset

    named: list[tuple[str, Tensor]] = []
    size = 0
    for text in texts:
        if is_dataset(text):
            content = dataset_text(str(text), at_least=8 * samples * sequence_length)
        else:
            content = read_text(Path(text))
        size += len(content.encode("utf-8"))
        named.append((str(text), tokenise(tokenizer, content)))
    if not named:
        raise UsageError("there is no text to calibrate on", fix="give at least one text file")
    tokens = sum(len(ids) for _, ids in named)
    return cut_windows(
        named,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        bytes_per_token=size / max(1, tokens),
    )


def sample_rows(windows: Windows, batches: Sequence[Batch], tokens: int, seed: int) -> list[Tensor]:
    """For each batch, the rows of its flattened tokens that belong to a random sample of ``tokens`` of all."""
    valid = [b.valid for b in batches]
    count = sum(int(v.sum()) for v in valid)
    key = hashlib.sha256(f"{seed}\0{windows.digest}\0sample".encode()).digest()[:16]
    draws = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.from_numpy(np.argsort(draws, kind="stable")[: min(tokens, count)].copy())] = True
    rows = []
    for mask, part in zip(valid, torch.split(chosen, [int(v.sum()) for v in valid]), strict=True):
        rows.append(mask.nonzero().reshape(-1)[part])
    return rows
