"""The neurons of one feed-forward block, matched with those of another: the same code inside experts and across models.

A block is ``x -> down (act(gate x) * up x)``, or ``x -> down act(up x)`` without a gate. Permuting its neurons (rows of
gate and up, columns of down) leaves it unchanged, so the neurons of two blocks have to be matched before an average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergekit_lr.errors import LinalgError, UsageError
from mergekit_lr.linalg.assignment import assign, cross_gram

Cost = Literal["weights", "activations", "both"]


@dataclass(frozen=True)
class GatedMLP:
    """Weights of one block as modules store them: ``up`` and ``gate`` ``[f, d]``, ``down`` ``[d, f]``.

    ``gate`` is None for a plain two-layer block. Biases (``[f]``) belong to the neurons; the bias of ``down`` does not.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None

    @property
    def neurons(self) -> int:
        return int(self.up.shape[0])

    def by_neuron(self) -> list[Tensor]:
        """What belongs to neuron i is row i of each of these."""
        parts = [self.gate, self.up, self.down.T]
        biases = [b.reshape(-1, 1) for b in (self.gate_bias, self.up_bias) if b is not None]
        return [p for p in parts if p is not None] + biases

    def permuted(self, permutation: Tensor) -> GatedMLP:
        """The same function, with neuron ``permutation[i]`` at place i."""

        def rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.index_select(0, permutation.to(t.device))

        up = self.up.index_select(0, permutation.to(self.up.device))
        down = self.down.index_select(1, permutation.to(self.down.device))
        return GatedMLP(up, down, rows(self.gate), rows(self.up_bias), rows(self.gate_bias))


def match_neurons(
    reference: GatedMLP,
    other: GatedMLP,
    activations: tuple[Tensor, Tensor] | None = None,
    *,
    cost: Cost | None = None,
    keep: Tensor | None = None,
    threads: int = 1,
) -> Tensor:
    """int64 ``[f]``: ``other.permuted(result)`` lies nearest to ``reference``; its neuron ``result[i]`` is i's match.

    * by weights: maximises ``<gate_r, P gate_o> + <up_r, P up_o> + <down_r^T, P down_o^T>``, that is, minimises the
      distance of the two blocks (Ainsworth et al., arXiv 2209.04836, section 3.2; one assignment is exact here, since
      nothing but the neurons moves).
    * by activations: maximises the sum of the correlations between matched neurons over the same n tokens (section
      3.1 there). ``activations`` holds what enters ``down``: ``[n, f]`` of the reference and of the other block.
    * by both: the sum of the two gains, each in units of what a neuron could at most reach: the product of the two
      blocks' root mean square norms per neuron, and 1 for a correlation.

    The default is ``both`` where activations are given, else ``weights``. Ties, dead and duplicate neurons keep their
    old place (``keep``, the identity by default). Computed in fp64; the same on any number of threads.

    Raises:
        LinalgError: shapes do not fit, or numbers are not finite.
        UsageError: activations are asked for and not given.
    """
    gain = neuron_gain(reference, other, activations, cost=cost, threads=threads)
    return assign(gain, keep)


def neuron_gain(
    reference: GatedMLP,
    other: GatedMLP,
    activations: tuple[Tensor, Tensor] | None = None,
    *,
    cost: Cost | None = None,
    threads: int = 1,
) -> Tensor:
    """fp64 ``[f, f]``: what neuron j of ``other`` is worth at place i of ``reference``; see `match_neurons`."""
    cost = cost or ("weights" if activations is None else "both")
    if cost != "weights" and activations is None:
        raise UsageError(f"matching by {cost} needs activations", fix="give activations, or match by weights")
    parts: list[Tensor] = []
    if cost != "activations":
        parts.append(_weight_gain(reference, other, scaled=cost == "both", threads=threads))
    if cost != "weights" and activations is not None:
        parts.append(correlation(*activations, threads=threads))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _weight_gain(reference: GatedMLP, other: GatedMLP, *, scaled: bool, threads: int) -> Tensor:
    left, right = reference.by_neuron(), other.by_neuron()
    if [p.shape for p in left] != [p.shape for p in right]:
        raise LinalgError(
            "the two blocks have different shapes",
            why=f"{[tuple(p.shape) for p in left]} and {[tuple(p.shape) for p in right]} by neuron",
            fix="match blocks of one width, or match softly by optimal transport",
        )
    gain = cross_gram(zip(left, right, strict=True), threads=threads)
    if not scaled:
        return gain
    squares = [sum(float(p.double().square().sum()) for p in parts) for parts in (left, right)]
    scale = (squares[0] * squares[1]) ** 0.5 / reference.neurons
    return gain / scale if scale > 0 else gain


def correlation(reference: Tensor, other: Tensor, *, threads: int = 1) -> Tensor:
    """Pearson correlations ``[f, f']`` between the columns of ``[n, f]`` and ``[n, f']``; 0 for a constant column."""
    if reference.ndim != 2 or other.ndim != 2 or reference.shape[0] != other.shape[0]:
        shapes = f"{tuple(reference.shape)} and {tuple(other.shape)}"
        raise LinalgError(f"activations of shapes {shapes} are not of one text")
    return cross_gram([(standardised(reference), standardised(other))], threads=threads)


def standardised(x: Tensor) -> Tensor:
    """Columns with mean 0 and norm 1, as rows; zero where a column is constant."""
    x = x.double()
    centred = x - x.mean(dim=0)
    norm = centred.norm(dim=0)
    constant = norm <= 1e-12 * x.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(constant, 0.0, centred / norm.masked_fill(constant, 1.0)).T
