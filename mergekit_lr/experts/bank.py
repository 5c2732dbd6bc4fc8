"""The routed experts of one MoE layer in memory, and who was sent where: what selection and refits work on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergekit_lr.experts.storage import Expert
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Activation = Callable[["Tensor", "Tensor"], "Tensor"]
"""``(gate pre-activations, up pre-activations) -> hidden``, elementwise: SwiGLU is ``silu(gate) * up``."""


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    return torch.nn.functional.silu(gate) * up


@dataclass(frozen=True)
class ExpertBank:
    """E gated experts of width I on a model of width H: ``E_e(x) = down_e act(gate_e x, up_e x)``.

    ``gate`` and ``up`` are ``[E, I, H]``, ``down`` is ``[E, H, I]``. Biases, where the family has them, are
    ``[E, I]`` and ``[E, H]``. A *neuron* is one row of gate and up with its column of down.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    activation: Activation = swiglu
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @classmethod
    def of(cls, experts: Sequence[Expert], activation: Activation = swiglu) -> ExpertBank:
        """From experts one by one."""
        found = {n: [getattr(e, n) for e in experts] for n in _TENSORS}
        stacked: dict[str, Any] = {n: None if t[0] is None else torch.stack(t) for n, t in found.items()}
        return cls(**stacked, activation=activation)

    def expert(self, index: int) -> Expert:
        """One expert by itself."""
        own: dict[str, Any] = {n: None if (t := getattr(self, n)) is None else t[index] for n in _TENSORS}
        return Expert(**own)

    @property
    def experts(self) -> int:
        return int(self.gate.shape[0])

    @property
    def width(self) -> int:
        return int(self.gate.shape[1])

    @property
    def model_width(self) -> int:
        return int(self.gate.shape[2])

    def hidden(self, expert: int, inputs: Tensor) -> Tensor:
        """Hidden activations ``[tokens, I]`` of one expert on ``inputs`` ``[tokens, H]``."""
        gate, up = inputs @ self.gate[expert].T, inputs @ self.up[expert].T
        if self.gate_bias is not None:
            gate = gate + self.gate_bias[expert]
        if self.up_bias is not None:
            up = up + self.up_bias[expert]
        return self.activation(gate, up)

    def output(self, expert: int, inputs: Tensor) -> Tensor:
        """``E_e(x)``, ``[tokens, H]``."""
        out = self.hidden(expert, inputs) @ self.down[expert].T
        return out if self.down_bias is None else out + self.down_bias[expert]

    def keep_experts(self, kept: list[int]) -> ExpertBank:
        """The bank of some experts only, in the order given."""
        index = torch.tensor(kept, dtype=torch.int64)
        changed: dict[str, Any] = {n: None if (t := getattr(self, n)) is None else t[index] for n in _TENSORS}
        return replace(self, **changed)

    def keep_neurons(self, kept: Tensor) -> ExpertBank:
        """Each expert narrowed to its own ``kept[e]`` neurons; ``kept`` is int64 ``[E, I']``."""
        rows = torch.arange(self.experts)[:, None]
        return replace(
            self,
            gate=self.gate[rows, kept],
            up=self.up[rows, kept],
            down=self.down.transpose(1, 2)[rows, kept].transpose(1, 2).contiguous(),
            gate_bias=None if self.gate_bias is None else self.gate_bias[rows, kept],
            up_bias=None if self.up_bias is None else self.up_bias[rows, kept],
        )


_TENSORS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


@dataclass(frozen=True)
class Routing:
    """The router's choice: ``indices`` int64 ``[tokens, k]`` and gate ``weights`` ``[tokens, k]``.

    An expert may stand twice in a row (a tied router sends several rows to one expert): its weights then add up.
    """

    indices: Tensor
    weights: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Tokens sent to ``expert``, ascending, and each one's summed gate weight."""
        hit = self.indices == expert
        tokens = hit.any(dim=1).nonzero()[:, 0]
        return tokens, (self.weights[tokens] * hit[tokens]).sum(dim=1)

    def rows(self, tokens: Tensor) -> Routing:
        """The routing of some tokens."""
        return Routing(self.indices[tokens], self.weights[tokens])

    def renamed(self, names: Tensor) -> Routing:
        """Expert ``e`` becomes ``names[e]`` (int64 ``[E]``): the tied router."""
        return Routing(names[self.indices], self.weights)


def layer_output(bank: ExpertBank, inputs: Tensor, routing: Routing) -> Tensor:
    """``T_t = sum_i g_i(t) E_i(x_t)``, the gate-weighted sum over each token's experts, ``[tokens, H]``."""
    total = torch.zeros(len(inputs), bank.model_width, dtype=inputs.dtype, device=inputs.device)
    for expert in range(bank.experts):
        tokens, gates = routing.of(expert)
        if len(tokens):
            total = total.index_add(0, tokens, gates[:, None] * bank.output(expert, inputs[tokens]))
    return total
