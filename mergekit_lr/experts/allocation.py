"""How many experts each of several neighbouring layers keeps, when only their total is given."""

from __future__ import annotations

from collections.abc import Sequence


def allocate(costs: Sequence[Sequence[float]], total: int, least: int) -> list[int]:
    """Experts for each layer, ``total`` in all: the next merge goes to the layer that it costs least.

    ``costs[l][k]``: what layer l costs with k experts (k = 0 unused; the last is all of them, cost 0). The price of a
    merge is the *increase* ``costs[l][k-1] - costs[l][k]``, not the cost itself. Equal prices go to the earlier
    layer; no layer gets fewer than ``least``. Sub-MoE's allocation (arXiv 2506.23266, section 3.2) leaves to the
    clustering what this makes explicit; experts of different layers are never merged with each other.

    Raises:
        ValueError: ``total`` cannot be reached.
    """
    counts = [len(c) - 1 for c in costs]
    if not len(costs) * least <= total <= sum(counts):
        raise ValueError(f"{total} experts cannot be divided among layers of {counts} with at least {least} each")
    while sum(counts) > total:
        prices = [(costs[i][k - 1] - costs[i][k], i) for i, k in enumerate(counts) if k > least]
        counts[min(prices)[1]] -= 1
    return counts


def windows(layers: int, size: int) -> list[range]:
    """Neighbouring layers by ``size``; a last single layer joins the window before it."""
    starts = list(range(0, layers, size))
    out = [range(s, min(s + size, layers)) for s in starts]
    if len(out) > 1 and len(out[-1]) < size:
        out[-2:] = [range(out[-2].start, layers)]
    return out
