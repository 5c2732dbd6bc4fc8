"""Every expert and the router stay; each expert keeps the neurons that carry its output (``width_shrink``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mergekit_lr.experts import neurons
from mergekit_lr.experts.bank import ExpertBank, Routing
from mergekit_lr.experts.design import Refit, Tokens, features, own_refit, refit
from mergekit_lr.experts.problem import Problem, Reduced
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Selection = Literal["pivoted", "energy"]


def narrowed_width(width: int, keep: float, multiple: int) -> int:
    """``keep`` of ``width``, rounded to the nearest multiple (at least one); ``width`` itself where all is kept."""
    if keep >= 1.0:
        return width
    return min(width, max(multiple, round(keep * width / multiple) * multiple))


def neuron_choice(bank: ExpertBank, inputs: Tensor, routing: Routing, width: int, selection: Selection) -> Tensor:
    """The ``width`` neurons that each expert keeps, int64 ``[E, width]``, from the tokens that it gets.

    The target is the expert's own gate-weighted output, so ``B = A down^T`` and no other expert matters. An expert
    that no token reached keeps the neurons whose weights are largest, ``||gate_p|| ||up_p|| ||down_p||``.
    """
    chosen = []
    for e in range(bank.experts):
        rows, gates = routing.of(e)
        down = bank.down[e].double()
        if not len(rows):
            chosen.append(neurons.top(weight_scores(bank, e), width))
            continue
        phi = features(bank, e, inputs[rows], gates).double()
        if selection == "energy":
            chosen.append(neurons.top(neurons.energy(phi.square().sum(dim=0), down), width))
            continue
        gram = phi.T @ phi
        chosen.append(neurons.pivoted(gram, gram @ down.T, width))
    return torch.stack(chosen)


def weight_scores(bank: ExpertBank, expert: int) -> Tensor:
    """``||gate_p|| ||up_p|| ||down_p||`` of each neuron: all that is known without a token."""
    gate, up = bank.gate[expert].double().norm(dim=1), bank.up[expert].double().norm(dim=1)
    scores: Tensor = gate * up * bank.down[expert].double().norm(dim=0)
    return scores


def narrowed_by_weights(bank: ExpertBank, width: int) -> ExpertBank:
    """Each expert's ``width`` neurons with the largest weights."""
    if width >= bank.width:
        return bank
    return bank.keep_neurons(torch.stack([neurons.top(weight_scores(bank, e), width) for e in range(bank.experts)]))


@dataclass(frozen=True)
class Narrow:
    """How a layer is narrowed to ``width`` neurons for each expert."""

    width: int
    selection: Selection = "pivoted"
    refit: Refit = "joint"

    def __call__(self, problem: Problem) -> Reduced:
        if self.width >= problem.bank.width:
            return Reduced(problem.bank, notes={"width": problem.bank.width})
        kept = neuron_choice(problem.bank, problem.inputs, problem.routing, self.width, self.selection)
        bank = problem.bank.keep_neurons(kept)
        tokens = Tokens(problem.inputs, problem.target, problem.held)
        if self.refit == "own":
            bank, notes = own_refit(bank, problem.bank, list(range(bank.experts)), problem.routing, tokens)
        else:
            bank, notes = refit(bank, problem.routing, tokens, self.refit)
        return Reduced(bank, notes={"width": self.width, "selection": self.selection, **notes})

    def unseen(self, bank: ExpertBank) -> ExpertBank:
        """A layer that no token can reach (MTP): by its weights alone."""
        return narrowed_by_weights(bank, self.width)
