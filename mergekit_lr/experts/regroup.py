"""Fewer experts that are made of real neurons: pruning, and neuron selection, with refits (``neuron_select``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from mergekit_lr.arch.moe_config import Groups
from mergekit_lr.experts import neurons
from mergekit_lr.experts.bank import ExpertBank, Routing
from mergekit_lr.experts.design import Coordinates, Refit, Tokens, bias_output, features, own_copy, own_refit, refit
from mergekit_lr.experts.grouping import around, cosine_of
from mergekit_lr.experts.narrow import narrowed_by_weights, neuron_choice
from mergekit_lr.experts.partition import Partition, joined
from mergekit_lr.experts.problem import Problem, Reduced
from mergekit_lr.experts.refit import Normal, guarded_fit
from mergekit_lr.experts.score import best, score
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Likeness = Literal["router", "output"]

_SAMPLE = 4096
"""Tokens that likeness of outputs is measured on."""


def routed_sums(problem: Problem) -> dict[str, Tensor]:
    """The sums over routed tokens that `mergekit_lr.experts.score` ranks experts by, float64 ``[E]`` each."""
    names = ("routing_count", "gate_sum", "output_norm_sum", "output_square_sum", "gated_norm_sum", "gated_square_sum")
    sums = {n: torch.zeros(problem.bank.experts, dtype=torch.float64) for n in names}
    for e in range(problem.bank.experts):
        rows, gates = problem.routing.of(e)
        norm = problem.bank.output(e, problem.inputs[rows]).double().norm(dim=1)
        gated = gates.double() * norm
        parts = (torch.ones_like(norm), gates.double(), norm, norm.square(), gated, gated.square())
        for name, part in zip(names, parts, strict=True):
            sums[name][e] = part.sum()
    return sums


def likeness(problem: Problem, kind: Likeness) -> Tensor:
    """Cosine between experts, float64 ``[E, E]``: of router logits over tokens, or of outputs on a sample of them."""
    x = problem.inputs[:: max(1, len(problem.inputs) // _SAMPLE)]
    if kind == "router":
        logits = x.double() @ problem.route.rows.double().T
        return cosine_of(logits.T @ logits)
    outputs = torch.stack([torch.nn.functional.normalize(problem.bank.output(e, x), dim=1)
                           for e in range(problem.bank.experts)]).double()  # fmt: skip
    flat = outputs.flatten(1)
    return cosine_of(flat @ flat.T)


@dataclass(frozen=True)
class Regroup:
    """How a layer is reduced to ``experts`` experts.

    ``score`` chooses the experts whose router rows stay; with ``select`` the others' neurons may replace theirs,
    ``sweeps`` times over; then ``refit``. ``width``: neurons of each expert (None: as many as now). ``groups``: a
    router that chooses among groups first.
    """

    experts: int
    width: int | None = None
    score: str = "gated_square"
    select: bool = True
    likeness: Likeness = "router"
    sweeps: int = 3
    refit: Refit = "joint"
    groups: Groups | None = None

    def __call__(self, problem: Problem) -> Reduced:
        parts = self.partition(problem)
        kept = [g.centre for g in parts.groups]
        bank = problem.bank.keep_experts(kept)
        routing = problem.route(problem.inputs, kept)
        if self.width is not None and self.width < bank.width:
            bank = bank.keep_neurons(neuron_choice(bank, problem.inputs, routing, self.width, "pivoted"))
        tokens = Tokens(problem.inputs, problem.target, problem.held)
        notes: dict[str, Any] = {"groups": [list(g.members) for g in parts.groups], "kept": kept, "width": bank.width}
        if self.select and len(kept) < problem.bank.experts:
            bank, swapped = select_neurons(problem.bank, bank, parts, routing, tokens, self.sweeps)
            notes["swapped"] = swapped
        said: dict[str, Any]
        if self.refit == "own":
            bank, said = own_refit(bank, problem.bank, kept, routing, tokens)
        else:
            bank, said = refit(bank, routing, tokens, self.refit)
        return Reduced(bank, tuple(kept), notes={**notes, **said})

    def partition(self, problem: Problem) -> Partition:
        """Who stays, and which of the others' neurons each of these may take."""
        ranks = score(self.score, routed_sums(problem))
        alike = likeness(problem, self.likeness)
        count = problem.bank.experts
        sections = self.groups.members(count) if self.groups else [range(count)]
        each = self.experts // len(sections)
        found = []
        for section in sections:
            who = list(section)
            found.append((who, around(best(ranks[who], each), alike[who][:, who])))
        return joined(found)

    def unseen(self, bank: ExpertBank, last: Reduced) -> ExpertBank:
        """A layer that no token can reach (MTP): the experts that the last layer kept, their largest neurons."""
        bank = bank.keep_experts(list(last.kept or range(bank.experts)))
        return bank if self.width is None else narrowed_by_weights(bank, self.width)


def select_neurons(
    original: ExpertBank, bank: ExpertBank, parts: Partition, routing: Routing, tokens: Tokens, sweeps: int
) -> tuple[ExpertBank, int]:
    """Let each expert of ``bank`` choose its neurons anew from all members of its group, against what is left for it.

    Expert m's candidates are the neurons of every member; the target is the layer's output less what the other
    experts give now. `neurons.pivoted` chooses, a guarded least-squares fit gives their down columns, and the change
    counts only if it lowers the error on held-out tokens. Each sweep goes over all experts once more, since what is
    left for one changes with the others. Returns the bank and how many neurons came from another expert than the
    group's centre at the end.
    """
    clean = replace(tokens, target=tokens.target - bias_output(bank, tokens.inputs, routing))
    work = Coordinates(own_copy(bank), routing, clean)
    foreign = [0] * bank.experts
    for _ in range(sweeps):
        for m, group in enumerate(parts.groups):
            rows, gates = work.routed[m]
            if group.alone or not len(rows):
                continue
            found = _choose(original, group.members, work, m, gates)
            if found is not None:
                chosen, down = found
                members = torch.tensor(group.members)[chosen // original.width]
                own = chosen % original.width
                work.change(m, down=down, **taken(original, members, own))
                foreign[m] = int((members != group.centre).sum())
    return work.bank, sum(foreign)


def taken(original: ExpertBank, members: Tensor, own: Tensor) -> dict[str, Tensor]:
    """Gate and up rows (and biases) of neuron ``own[p]`` of expert ``members[p]``."""
    names = ("gate", "up", "gate_bias", "up_bias")
    return {n: t[members, own] for n in names if (t := getattr(original, n)) is not None}


def _choose(
    original: ExpertBank, members: Sequence[int], work: Coordinates, m: int, gates: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The best neurons and their down columns ``[H, I]``; None where they do no better than those in place."""
    rows, _ = work.routed[m]
    inputs, held, left = work.tokens.inputs[rows], work.tokens.held[rows], work.left(m)
    phi = torch.cat([features(original, e, inputs, gates) for e in members], dim=1)
    fit, judge = Normal.of(phi[~held], left[~held]), Normal.of(phi[held], left[held])
    if fit.tokens == 0 or judge.tokens == 0:
        return None
    chosen = neurons.pivoted(fit.gram, fit.cross, work.bank.width)
    down = torch.cat([original.down[e] for e in members], dim=1)[:, chosen]
    found = guarded_fit(fit.keep(chosen), judge.keep(chosen), down.T)
    now = float((work.contribution(m) - left)[held].double().square().sum()) / max(judge.power, 1e-300)
    return (chosen, found.weights.T) if found.after < now else None
