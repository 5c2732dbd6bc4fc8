"""A layer's output as a linear function of its down projections: the features, and refits on them.

For expert m with hidden activations ``h`` the features of token t are ``phi_t = g_m(t) h_m(x_t)``, zero where the
router did not choose m; the layer gives ``sum_m W_m phi_m``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from mergekit_lr.experts.bank import ExpertBank, Routing, layer_output
from mergekit_lr.experts.refit import Fit, Normal, guarded_fit
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Refit = Literal["joint", "blocks", "own", "none"]

JOINT_COLUMNS = 8192
"""Above so many unknown columns the joint system (float64, squared) is solved by blocks."""

SWEEPS = 3
_CHUNK = 4096


@dataclass(frozen=True)
class Tokens:
    """What a layer is fitted to: inputs ``[N, H]``, target ``[N, H]``, and who is held out, bool ``[N]``."""

    inputs: Tensor
    target: Tensor
    held: Tensor


def features(bank: ExpertBank, expert: int, inputs: Tensor, gates: Tensor) -> Tensor:
    """``g h(x)`` of one expert, ``[tokens, I]``."""
    return gates[:, None] * bank.hidden(expert, inputs)


def joint_normal(bank: ExpertBank, inputs: Tensor, routing: Routing, target: Tensor) -> Normal:
    """Normal equations of all experts at once: columns ``m I ... (m + 1) I - 1`` are expert m's."""
    size = bank.experts * bank.width
    total = Normal(
        torch.zeros(size, size, dtype=torch.float64, device=inputs.device),
        torch.zeros(size, bank.model_width, dtype=torch.float64, device=inputs.device),
        0.0,
        0,
    )
    for start in range(0, len(inputs), _CHUNK):
        part = torch.arange(start, min(start + _CHUNK, len(inputs)), device=inputs.device)
        x, own = inputs[part], routing.rows(part)
        phi = torch.zeros(len(part), size, dtype=x.dtype, device=x.device)
        for m in range(bank.experts):
            tokens, gates = own.of(m)
            phi[tokens, m * bank.width : (m + 1) * bank.width] = features(bank, m, x[tokens], gates)
        total = total + Normal.of(phi, target[part])
    return total


def refit(bank: ExpertBank, routing: Routing, tokens: Tokens, kind: Refit) -> tuple[ExpertBank, dict[str, Any]]:
    """The bank with refitted down projections, and what the guard said. ``own`` needs `own_refit` instead."""
    if kind == "none":
        return bank, {"refit": "none"}
    clean = replace(tokens, target=tokens.target - bias_output(bank, tokens.inputs, routing))
    if kind == "joint" and bank.experts * bank.width <= JOINT_COLUMNS:
        return _joint(bank, routing, clean)
    return _blocks(bank, routing, clean)


def bias_output(bank: ExpertBank, inputs: Tensor, routing: Routing) -> Tensor | float:
    """What the biases of down give, which no refit changes."""
    if bank.down_bias is None:
        return 0.0
    return layer_output(replace(bank, down=torch.zeros_like(bank.down)), inputs, routing)


def _joint(bank: ExpertBank, routing: Routing, tokens: Tokens) -> tuple[ExpertBank, dict[str, Any]]:
    halves = [
        joint_normal(bank, tokens.inputs[part], routing.rows(part), tokens.target[part])
        for part in (~tokens.held, tokens.held)
    ]
    start = bank.down.transpose(1, 2).reshape(-1, bank.model_width)
    found = guarded_fit(halves[0], halves[1], start)
    down = found.weights.reshape(bank.experts, bank.width, -1).transpose(1, 2)
    return replace(bank, down=down.to(bank.down.dtype).contiguous()), {"refit": "joint", **said(found)}


def said(found: Fit) -> dict[str, Any]:
    """What a guarded fit did, for the report."""
    return {
        "ridge": found.ridge,
        "accepted": found.accepted,
        "held_out_before": round(found.before, 6),
        "held_out_after": round(found.after, 6),
    }


class Coordinates:
    """A layer's output in the making: one expert is changed while the others stay. ``sum`` ``[N, H]``."""

    def __init__(self, bank: ExpertBank, routing: Routing, tokens: Tokens) -> None:
        self.bank, self.tokens = bank, tokens
        self.routed = [routing.of(m) for m in range(bank.experts)]
        self.sum = torch.zeros_like(tokens.target)
        for m in range(bank.experts):
            self.sum.index_add_(0, self.routed[m][0], self.contribution(m))

    def contribution(self, m: int) -> Tensor:
        """``W_m phi_m`` on the tokens of expert m."""
        rows, gates = self.routed[m]
        return features(self.bank, m, self.tokens.inputs[rows], gates) @ self.bank.down[m].T

    def left(self, m: int) -> Tensor:
        """What expert m should give: the target less what the others give, on its tokens."""
        rows, _ = self.routed[m]
        return self.tokens.target[rows] - self.sum[rows] + self.contribution(m)

    def change(self, m: int, **new: Tensor) -> None:
        """Give expert m other tensors."""
        rows, _ = self.routed[m]
        before = self.contribution(m)
        for name, value in new.items():
            tensor = getattr(self.bank, name)
            if tensor is not None:
                tensor[m] = value.to(tensor.dtype)
        self.sum.index_add_(0, rows, self.contribution(m) - before)


def own_copy(bank: ExpertBank) -> ExpertBank:
    """The same bank in tensors of its own, which may be changed."""
    names = ("gate", "up", "down", "gate_bias", "up_bias")
    own: dict[str, Any] = {n: None if (t := getattr(bank, n)) is None else t.clone() for n in names}
    return replace(bank, **own)


def _blocks(bank: ExpertBank, routing: Routing, tokens: Tokens) -> tuple[ExpertBank, dict[str, Any]]:
    """Coordinate descent: each expert in turn against what the others leave, `SWEEPS` times."""
    work = Coordinates(own_copy(bank), routing, tokens)
    accepted = 0
    before = _held_error(work)
    for _ in range(SWEEPS):
        for m in range(bank.experts):
            rows, gates = work.routed[m]
            if not len(rows):
                continue
            held = tokens.held[rows]
            phi, left = features(work.bank, m, tokens.inputs[rows], gates), work.left(m)
            found = guarded_fit(
                Normal.of(phi[~held], left[~held]), Normal.of(phi[held], left[held]), work.bank.down[m].T
            )
            if found.accepted:
                accepted += 1
                work.change(m, down=found.weights.T)
    after = _held_error(work)
    notes = {"refit": "blocks", "sweeps": SWEEPS, "fits": SWEEPS * bank.experts, "accepted": accepted}
    return work.bank, {**notes, "held_out_before": round(before, 6), "held_out_after": round(after, 6)}


def _held_error(work: Coordinates) -> float:
    held = work.tokens.held
    off, target = work.sum[held] - work.tokens.target[held], work.tokens.target[held]
    return float(off.double().square().sum() / target.double().square().sum().clamp_min(1e-300))


def own_refit(
    bank: ExpertBank, original: ExpertBank, of: list[int], routing: Routing, tokens: Tokens
) -> tuple[ExpertBank, dict[str, Any]]:
    """Each expert against the output of the original expert ``of[m]`` on its own tokens, weighted by its gates."""
    down, accepted = bank.down.clone(), 0
    for m in range(bank.experts):
        rows, gates = routing.of(m)
        if not len(rows):
            continue
        held, x = tokens.held[rows], tokens.inputs[rows]
        phi = features(bank, m, x, gates)
        target = gates[:, None] * (original.hidden(of[m], x) @ original.down[of[m]].T)
        found = guarded_fit(Normal.of(phi[~held], target[~held]), Normal.of(phi[held], target[held]), bank.down[m].T)
        accepted += found.accepted
        down[m] = found.weights.T.to(down.dtype)
    return replace(bank, down=down), {"refit": "own", "fits": bank.experts, "accepted": accepted}
