"""Loss of the reduced model on held-out windows, and its divergence from the original, text by text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_lr.calibration.network import EMBEDDING, HEAD, Network
from mergekit_lr.calibration.states import States
from mergekit_lr.calibration.text import Batch, Windows
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 512
"""Tokens whose logits are held at a time."""


@dataclass
class Sums:
    """Sums over predicted tokens: their number, -log p of both models, ``KL(original || reduced)``; nats."""

    tokens: int = 0
    original: float = 0.0
    reduced: float = 0.0
    divergence: float = 0.0

    def means(self) -> dict[str, float]:
        """Per token: ``loss_original``, ``loss``, ``increase`` and ``kl``."""
        n = max(1, self.tokens)
        before, after = self.original / n, self.reduced / n
        return {"loss_original": before, "loss": after, "increase": after - before, "kl": self.divergence / n}


@dataclass(frozen=True)
class Losses:
    """Held-out loss and KL in nats per token, for each text and as the mean over texts."""

    texts: dict[str, Sums]

    def plain(self) -> dict[str, Any]:
        """For the report, rounded to 1e-6."""
        found = {t: {k: round(v, 6) for k, v in s.means().items()} for t, s in self.texts.items()}
        keys = ("loss_original", "loss", "increase", "kl")
        mean = {k: round(sum(f[k] for f in found.values()) / max(1, len(found)), 6) for k in keys}
        return {"unit": "nats per token", "texts": found, "mean": mean}


def compare(
    network: Network,
    windows: Windows,
    batches: Sequence[Batch],
    original: States,
    reduced: States,
    names: Sequence[str],
) -> Losses:
    """Both models' next-token predictions on every held-out window, from the states that leave the last layer."""
    sums: dict[str, Sums] = {}
    head = _head(network)
    place = 0
    with torch.inference_mode(), network.filled_norm() as norm:
        for batch in batches:
            one, other = (norm(s.read(batch.number).to(network.device)) for s in (original, reduced))
            for row, (length, held) in enumerate(zip(batch.lengths, batch.held_out, strict=True)):
                source = names[windows.sources[place]]
                place += 1
                if held and length > 1:
                    into = sums.setdefault(source, Sums())
                    ids = batch.ids[row, :length].to(network.device)
                    for states in _pieces(one[row, :length], other[row, :length], ids):
                        _add(into, network, head, *states)
    return Losses({n: sums[n] for n in dict.fromkeys(names) if n in sums})


def _pieces(one: Tensor, other: Tensor, ids: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for start in range(0, len(ids) - 1, _ROWS):
        stop = min(len(ids) - 1, start + _ROWS)
        yield one[start:stop], other[start:stop], ids[start + 1 : stop + 1]


def _add(into: Sums, network: Network, head: Tensor, one: Tensor, other: Tensor, following: Tensor) -> None:
    before, after = (_log_probabilities(network, head, s) for s in (one, other))
    into.tokens += len(following)
    into.original -= float(before.gather(1, following[:, None]).double().sum())
    into.reduced -= float(after.gather(1, following[:, None]).double().sum())
    into.divergence += float((before.exp() * (before - after)).double().sum())


def _log_probabilities(network: Network, head: Tensor, states: Tensor) -> Tensor:
    logits = states.float() @ head.T / float(getattr(network.config, "logits_scaling", None) or 1.0)
    return torch.log_softmax(logits, dim=-1)


def _head(network: Network) -> Tensor:
    """The output matrix ``[V, H]``, which may be the embedding."""
    tensors = network.checkpoint.tensors
    name = f"{HEAD}.weight" if f"{HEAD}.weight" in tensors else f"{EMBEDDING}.weight"
    info = tensors[name]
    return network.checkpoint.read(name, 0, info.numel).view(info.shape).float().to(network.device)
