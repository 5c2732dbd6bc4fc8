"""One layer as a problem, and a reduced layer as its solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergekit_lr.arch.moe import MoeLayer
from mergekit_lr.experts.bank import ExpertBank, Routing, layer_output
from mergekit_lr.experts.rerouting import Rerouter
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One layer with the tokens that reach it: what a reduced layer is fitted to.

    ``bank``: its experts, fp32. ``inputs`` ``[N, H]``, ``routing`` and ``target`` ``[N, H]`` (the routed experts'
    gate-weighted sum) of the original model; ``held`` bool ``[N]``: tokens to judge on, which no fit may see.
    ``route(inputs, kept, rows)``: the same router with some experts only, or with other rows.
    """

    layer: MoeLayer
    bank: ExpertBank
    inputs: Tensor
    routing: Routing
    target: Tensor
    held: Tensor
    route: Rerouter

    def error(self, reduced: Reduced) -> float:
        """Squared error of the layer's output on held-out tokens over the output's own square."""
        inputs = self.inputs[self.held]
        off = layer_output(reduced.bank, inputs, reduced.routing(self.route, inputs)) - self.target[self.held]
        return float(off.double().square().sum() / self.target[self.held].double().square().sum().clamp_min(1e-300))


@dataclass(frozen=True)
class Reduced:
    """A layer with fewer or narrower experts.

    ``kept``: the original experts whose places in the router stay, ascending (None: all). ``rows`` ``[E', H]``: the
    router's matrix where it is not just the kept rows. ``names``: a tied router, which stays whole: the new expert of
    each old one. ``notes``: plain data for the report.
    """

    bank: ExpertBank
    kept: tuple[int, ...] | None = None
    rows: Tensor | None = None
    names: tuple[int, ...] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def routing(self, route: Rerouter, inputs: Tensor) -> Routing:
        """What its router says."""
        if self.names is not None:
            return route(inputs).renamed(torch.tensor(self.names, device=inputs.device))
        return route(inputs, self.kept, self.rows)


Fit = Callable[[Problem], Reduced]
"""How one layer is reduced."""
