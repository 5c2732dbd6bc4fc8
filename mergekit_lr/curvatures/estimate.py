"""Diagonal Fisher information of a language model from text: squared gradients, one sequence at a time.

    F_j = E_x sum_t E_{y ~ p(. | x_<t)} (d log p(y | x_<t) / d w_j)^2

For each sequence one label is drawn from the model at every position, and the gradient of the sum of their
log-likelihoods is squared: labels are independent given the text and their scores have mean zero, so cross terms
vanish in expectation. What is returned is the mean over predicted tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint.open import local_path
from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.curvatures.moments import Moment, Moments, is_factorable
from mergekit_lr.engine.memory import default_limit
from mergekit_lr.errors import CheckpointError, ResourceError, UsageError
from mergekit_lr.evaluation import load_for_evaluation
from mergekit_lr.lazy import torch
from mergekit_lr.sizes import format_size, parse_size

if TYPE_CHECKING:
    from torch import Tensor

MAX_TEXT = 1 << 30


def fisher_diagonal(
    model: str | Path,
    texts: Sequence[str | Path],
    *,
    form: str = "full",
    samples: int = 256,
    sequence_length: int = 256,
    labels: str = "sampled",
    seed: int = 0,
    device: str = "cpu",
    max_memory: str | int | None = None,
) -> Moments:
    """Estimate F for every parameter of a model folder (or Hub id), fp32.

    ``samples`` sequences of ``sequence_length`` tokens are taken at evenly spread places of each text in turn.
    ``labels: text`` takes the text's own next tokens instead of drawing (the empirical Fisher, which is what an
    optimizer's second moments estimate). Each gradient is squared, added to its sum and freed as soon as it is
    complete, so weights, sums (with ``rank1`` only row and column sums) and one gradient are held, not two models.

    Raises:
        CheckpointError: the model does not load, or a text is too short.
        ResourceError: weights and sums exceed ``max_memory``.
        UsageError: a number is out of range.
    """
    if samples < 1 or sequence_length < 2:
        raise UsageError("samples must be at least 1 and sequence_length at least 2")
    reference = ModelReference.parse(str(model))
    if reference.adapter is not None:
        raise UsageError("an adapter's Fisher is not estimated", fix="merge it into its base first, then estimate")
    network, tokenizer = load_for_evaluation(local_path(reference.model), device)
    _check_memory(network, form, max_memory)
    sums = _Sums(network, form == "rank1")
    tokens = 0
    generator = torch.Generator().manual_seed(seed)
    try:
        for ids in sequences(tokenizer, texts, samples, sequence_length):
            _one(network, ids.to(network.device), generator, labels == "sampled")
            tokens += len(ids) - 1
    finally:
        sums.remove()
    facts = {"labels": labels, "samples": str(samples), "sequence_length": str(sequence_length), "seed": str(seed)}
    return Moments("text", sums.moments(tokens), facts)


def _check_memory(network: Any, form: str, max_memory: str | int | None) -> None:
    limit = default_limit() if max_memory is None else parse_size(max_memory)
    sizes = [(p.numel(), is_factorable(tuple(p.shape))) for p in network.parameters()]
    needed = sum(4 * n for n, _ in sizes) + sum(4 * n for n, f in sizes if form == "full" or not f)
    needed += 8 * max((n for n, _ in sizes), default=0)
    if needed > limit:
        less = "" if form == "rank1" else ", or --form rank1, which holds row and column sums only"
        raise ResourceError(
            "the estimate does not fit in memory",
            why=f"weights and sums take {format_size(needed)}, {format_size(limit)} are allowed",
            fix=f"allow more with --max-memory{less}",
        )


def sequences(tokenizer: Any, texts: Sequence[str | Path], samples: int, length: int) -> Iterator[Tensor]:
    """Token ids of ``samples`` sequences: each text gives its share, evenly spread over it."""
    for i, path in enumerate(texts):
        wanted = samples // len(texts) + (i < samples % len(texts))
        try:
            if Path(path).stat().st_size > MAX_TEXT:
                raise CheckpointError("the text is too large", where=str(path), why=f"over {MAX_TEXT} bytes")
            content = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise CheckpointError("cannot read the text", where=str(path), why=str(e)) from e
        ids = torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) < length:
            why = f"it has {len(ids)} tokens, one sequence takes {length}"
            raise CheckpointError("the text is too short", where=str(path), why=why)
        last = len(ids) - length
        for k in range(wanted):
            start = last * k // max(1, wanted - 1)
            yield ids[start : start + length]


def _one(network: Any, ids: Tensor, generator: torch.Generator, sampled: bool) -> None:
    """Backward of the summed log-likelihood of one sequence's labels; hooks take the gradients."""
    with torch.enable_grad():
        logits = network(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        wanted = _draw(logits.detach(), generator) if sampled else ids[1:]
        torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").backward()  # type: ignore[no-untyped-call]


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label for each row of logits: Gumbel's way, on numbers drawn on the CPU so that devices agree."""
    uniform = torch.rand(logits.shape, generator=generator).clamp_(min=1e-20).to(logits.device)
    return (logits - (-uniform.log()).log()).argmax(-1)


class _Sums:
    """Sums of squared gradients, by hooks that run when a parameter's gradient is complete."""

    def __init__(self, network: Any, rank1: bool) -> None:
        self.named = {n: p for n, p in network.named_parameters() if p.dtype.is_floating_point}
        self.sums: dict[str, list[Tensor]] = {}
        self.hooks = []
        for name, p in self.named.items():
            shape = tuple(p.shape)
            parts = [shape]
            if rank1 and is_factorable(shape):
                parts = [shape[:-1], (*shape[:-2], shape[-1])]
            self.sums[name] = [torch.zeros(s, device=p.device) for s in parts]
            self.hooks.append(p.register_post_accumulate_grad_hook(self._taker(name)))

    def _taker(self, name: str) -> Any:
        def take(p: Tensor) -> None:
            assert p.grad is not None
            parts = self.sums[name]
            square = p.grad.float().square_()
            if len(parts) == 1:
                parts[0].add_(square)
            else:
                parts[0].add_(square.sum(-1))
                parts[1].add_(square.sum(-2))
            p.grad = None

        return take

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def moments(self, tokens: int) -> dict[str, Moment]:
        found = {}
        for name, parts in self.sums.items():
            mean = [(s / tokens).cpu() for s in parts]
            shape = tuple(self.named[name].shape)
            whole: Any = tuple(mean) if len(mean) == 2 else mean[0]
            found[name] = Moment(shape, lambda whole=whole: whole, factored=len(mean) == 2, unbiased=True)  # type: ignore[misc]
        return found
