"""Ways to spend a budget of expert parameters: how many experts, how wide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_lr.arch.moe_config import Groups
from mergekit_lr.experts.bank import ExpertBank, Routing
from mergekit_lr.experts.design import features
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Concentration:
    """How unequally a layer's experts and neurons carry its output, each as sorted shares, largest first.

    ``experts`` ``[E]``: of ``sum_t g |E_e(x_t)|``; ``neurons`` ``[E I]``: of energy ``sum_t g^2 h_p^2 ||down_p||^2``.
    The units differ: compare models with each other, not the two numbers of one model.
    """

    experts: Tensor
    neurons: Tensor

    def kept(self, experts: int, width_share: float) -> tuple[float, float]:
        """Shares of the ``experts`` largest experts, and of the ``width_share`` largest neurons."""
        count = round(width_share * len(self.neurons))
        return float(self.experts[:experts].sum()), float(self.neurons[:count].sum())


def concentration(bank: ExpertBank, inputs: Tensor, routing: Routing) -> Concentration:
    """Measured on the tokens that the router sends to each expert."""
    outputs = torch.zeros(bank.experts, dtype=torch.float64)
    energy = torch.zeros(bank.experts, bank.width, dtype=torch.float64)
    for e in range(bank.experts):
        rows, gates = routing.of(e)
        phi = features(bank, e, inputs[rows], gates)
        outputs[e] = (phi @ bank.down[e].T).double().norm(dim=1).sum()
        energy[e] = phi.double().square().sum(dim=0) * bank.down[e].double().square().sum(dim=0)
    shares = [x.flatten().sort(descending=True).values for x in (outputs, energy)]
    return Concentration(*(s / s.sum().clamp_min(1e-300) for s in shares))


def splits(
    experts: int, width: int, keep: float, *, multiple: int, least: int, count: int, groups: Groups | None = None
) -> list[tuple[int, int]]:
    """Up to ``count`` pairs (experts, width) with at most ``keep`` of ``experts * width``, from all experts down.

    The first keeps every expert and narrows them, the last keeps every neuron and drops experts; the others lie
    between them at equal steps. Widths are multiples of ``multiple`` (of 1 where an expert is narrower than that).
    """
    if keep >= 1.0:
        return [(experts, width)]
    step = groups.count if groups else 1
    budget = keep * experts * width
    fewest = max(least, int(keep * experts))
    found: dict[tuple[int, int], None] = {}
    for i in range(count):
        share = i / max(1, count - 1)
        n = max(step, round((experts - share * (experts - fewest)) / step) * step)
        wide = width if n * width <= budget else int(budget / n / multiple) * multiple
        if wide > 0 and n >= least:
            found[n, wide] = None
    return list(found)


def promising(
    pairs: Sequence[tuple[int, int]], layers: Sequence[Concentration], width: int, slack: float = 0.1
) -> list[tuple[int, int]]:
    """The pairs that may be worth a trial: predicted to keep nearly as much as the best.

    The prediction is the mean over layers of (share of the kept experts) x (share of the kept neurons). It only
    spares trials; held-out text decides.
    """
    predicted = []
    for n, wide in pairs:
        products = [a * b for a, b in (c.kept(n, wide / width) for c in layers)]
        predicted.append(sum(products) / len(products))
    return [p for p, value in zip(pairs, predicted, strict=True) if value >= max(predicted) - slack]
