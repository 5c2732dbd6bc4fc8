"""What a streamed pass holds in memory, before it starts."""

from __future__ import annotations

from typing import Any

from mergekit_lr.calibration.accumulate import Wanted, linear_modules
from mergekit_lr.calibration.network import Network
from mergekit_lr.calibration.text import Batch


def batch_bytes(network: Network, batch: Batch) -> int:
    """Bytes that a layer's forward holds for one batch, roughly: a dozen hidden states, and the widest projection."""
    config = network.config
    widths = [int(getattr(config, n, 0) or 0) for n in ("intermediate_size", "moe_intermediate_size")]
    k = int(getattr(config, "num_experts_per_tok", 1) or 1)
    hidden = int(config.hidden_size)
    elements = batch.ids.numel() * ((12 + k) * hidden + 4 * max(widths))
    return elements * max(4, network.dtype.itemsize)


def statistics_bytes(network: Network, index: int, wanted: Wanted) -> int:
    """Bytes of one layer's statistics in fp32: Grams, and the matrices between experts."""
    layer = network.layers[index]
    linear: list[Any] = list(linear_modules(layer).values()) if wanted.linear else []
    elements = sum(int(m.in_features) ** 2 for m in linear)
    block: Any = network.mixture(layer)
    if block is not None:
        hidden, experts = int(network.config.hidden_size), len(block.experts.down_proj)
        width = int(block.experts.down_proj.numel()) // (experts * hidden)
        elements += 8 * experts**2 + 4 * experts * hidden
        elements += hidden**2 * wanted.input + experts * width**2 * wanted.hidden
    return 4 * elements
