"""Held-out loss of a model on plain text: nats per token, nats per byte, perplexity.

For a text with tokens t_0 .. t_n the loss is the mean of -log p(t_i | t_s .. t_{i-1}), s the start of i's window.
Windows of ``context + 1`` tokens overlap by one, so that every token but the first is predicted exactly once. Nats
per byte divide the same sum by the bytes that those tokens stand for, which compares models of different tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint.foreign_code import check_loadable
from mergekit_lr.checkpoint.model import Checkpoint, open_folder
from mergekit_lr.checkpoint.open import local_path
from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.errors import CheckpointError, ResourceError, UsageError, join_problems
from mergekit_lr.lazy import torch
from mergekit_lr.report.consistency import count_problems

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

MAX_TEXT = 1 << 30


def evaluate(
    model: str | Path,
    texts: Sequence[str | Path],
    *,
    device: str = "cpu",
    context: int | None = None,
    max_tokens: int | None = None,
    batch: int = 8,
) -> dict[str, Any]:
    """Loss of a model (a folder or a Hub id) on each text file, in fp32.

    ``context`` is the window in tokens (by default the model's own, at most 1024); ``max_tokens`` cuts each text
    after that many predicted tokens. Special tokens are not added; nothing of the folder is executed.

    Returns:
        ``{"model", "context", "files": {path: {"loss", "loss_per_byte", "perplexity", "tokens", "bytes"}}, "mean"}``,
        losses in nats, ``mean`` the unweighted mean of the files' losses.

    Raises:
        CheckpointError: the folder does not load without missing or unexpected weights, or a text cannot be read.
        UsageError: a number is out of range, or no text was given.
    """
    if not texts:
        raise UsageError("no text to evaluate on", fix="give at least one text file")
    for name, value in (("context", context), ("max_tokens", max_tokens), ("batch", batch)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}", fix="give at least 1")
    contents = {str(t): text_of(Path(t)) for t in texts}
    reference = ModelReference.parse(str(model))
    if reference.adapter is not None:
        raise UsageError("an adapter is not evaluated on its base", fix="merge the two first, then evaluate the folder")
    network, tokenizer = load_for_evaluation(local_path(reference.model), device)
    limit = network.config.get_text_config().max_position_embeddings
    window = min(context or 1024, limit)
    files: dict[str, dict[str, Any]] = {}
    for path, content in contents.items():
        files[path] = _loss(network, tokenizer, content, path, window, max_tokens, batch)
    mean = math.fsum(f["loss"] for f in files.values()) / len(files)
    return {"model": str(model), "context": window, "files": files, "mean": mean}


def load_for_evaluation(folder: Path, device: str = "cpu") -> tuple[Any, Any]:
    """The model in fp32 and its tokenizer, from local files only and with no code of theirs.

    Raises:
        CheckpointError: the folder does not load, or a weight is missing, unexpected or of another shape.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not (folder / "config.json").exists():
        raise CheckpointError("no model that can be run", where=str(folder), why="there is no config.json")
    check_loadable(folder)
    _check_counts(folder)
    shown = logging.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    safe = {"trust_remote_code": False, "local_files_only": True}
    try:
        network, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **safe
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as e:
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise CheckpointError("transformers cannot load the model", where=str(folder), why=why) from e
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            first = sorted(map(str, report[kind]))[0]
            raise CheckpointError(f"the weights do not fit the model: {kind} {first}", where=str(folder))
    return network.to(device).eval(), tokenizer


def check_memory(models: Sequence[Checkpoint], copies: int, limit: int, what: str) -> None:
    """Refuse what would hold more than ``limit`` bytes: ``copies`` of the largest model in fp32.

    Raises:
        ResourceError: says how much is needed.
    """
    largest = max(sum(4 * t.numel for t in m.tensors.values()) for m in models)
    if copies * largest > limit:
        mib = -(-copies * largest // 2**20)
        raise ResourceError(
            f"{what} holds {copies} models in memory",
            why=f"a model takes {largest / 2**20:.0f} MiB in fp32, and {limit / 2**20:.0f} MiB are allowed",
            fix=f"allow at least --max-memory {mib}MiB",
        )


def _check_counts(folder: Path) -> None:
    """Refuse a config of a billion layers before transformers builds them."""
    with open_folder(folder, str(folder)) as checkpoint:
        found = count_problems(checkpoint.config or {}, checkpoint.tensors)
    if found:
        raise join_problems(CheckpointError, [f"{folder}: {p}; mend config.json" for p in found])


def text_of(path: Path) -> str:
    """A text file's content; CheckpointError where it cannot be had."""
    try:
        if path.stat().st_size > MAX_TEXT:
            raise CheckpointError("the text is too large", where=str(path), why=f"over {MAX_TEXT} bytes")
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise CheckpointError("cannot read the text", where=str(path), why=e.strerror or str(e)) from e
    except UnicodeDecodeError as e:
        raise CheckpointError("the text is not UTF-8", where=str(path), why=str(e)) from e


def windows(tokens: Tensor, context: int) -> Iterator[Tensor]:
    """Windows of ``context + 1`` tokens, each beginning with the last of the one before."""
    for start in range(0, len(tokens) - 1, context):
        yield tokens[start : start + context + 1]


def _loss(
    network: Any, tokenizer: Any, text: str, path: str, context: int, max_tokens: int | None, batch: int
) -> dict[str, Any]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    tokens = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    if max_tokens is not None:
        tokens = tokens[: max_tokens + 1]
    if len(tokens) < 2:
        raise CheckpointError("the text is too short", where=path, why=f"it has {len(tokens)} tokens")
    if int(tokens.max()) >= network.get_input_embeddings().weight.shape[0]:
        raise CheckpointError("the tokenizer has tokens that the model has no row for", where=path)
    total = 0.0
    pending: list[Tensor] = []
    every = list(windows(tokens, context))
    for i, window in enumerate(every):
        pending.append(window)
        last = i + 1 == len(every)
        if last or len(pending) == batch or len(every[i + 1]) != len(window):
            total += batch_loss(network, torch.stack(pending))
            pending = []
    predicted = len(tokens) - 1
    covered = _bytes_of(tokenizer, encoded, tokens, text)
    loss = total / predicted
    return {
        "loss": loss,
        "loss_per_byte": total / covered,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "tokens": predicted,
        "bytes": covered,
    }


def batch_loss(network: Any, batch: Tensor) -> float:
    """Sum of -log p over all predictions of a batch of windows, added up in fp64."""
    batch = batch.to(network.device)
    with torch.inference_mode():
        logits = network(input_ids=batch[:, :-1], use_cache=False).logits.float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        return float(losses.double().sum())


def _bytes_of(tokenizer: Any, encoded: Any, tokens: Tensor, text: str) -> int:
    """UTF-8 bytes of the text that the predicted tokens (all but the first) stand for."""
    if tokenizer.is_fast:
        offsets = encoded["offset_mapping"]
        return max(1, len(text[offsets[0][1] : offsets[len(tokens) - 1][1]].encode("utf-8")))
    return max(1, len(tokenizer.decode(tokens[1:]).encode("utf-8")))


def loss_table(results: Sequence[dict[str, Any]], *, names: Sequence[str] | None = None, best: bool = True) -> Table:
    """A table of models by texts, in nats per token; the lowest of each column in bold."""
    from rich.markup import escape
    from rich.table import Table

    files = list(dict.fromkeys(f for r in results for f in r["files"]))
    table = Table(title="held-out loss (nats per token)")
    table.add_column("model")
    for file in files:
        table.add_column(escape(Path(file).stem), justify="right")
    table.add_column("mean", justify="right")
    columns = [[r["files"].get(f, {}).get("loss") for r in results] for f in files]
    columns.append([r["mean"] for r in results])
    for row, result in enumerate(results):
        cells = [_cell(column, row, best) for column in columns]
        table.add_row(escape(names[row] if names else Path(result["model"]).name), *cells)
    return table


def _cell(column: list[float | None], row: int, best: bool) -> str:
    value = column[row]
    if value is None:
        return "-"
    lowest = min(v for v in column if v is not None)
    return f"[bold]{value:.4f}[/bold]" if best and len(column) > 1 and value == lowest else f"{value:.4f}"
