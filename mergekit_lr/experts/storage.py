"""One expert as matrices, from the parts that a checkpoint stores it in, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_lr.arch.moe import Stored
from mergekit_lr.arch.moe_families import Order, Slot
from mergekit_lr.experts.quantised import decode_fp8, decode_mxfp4
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

MATRICES = ("gate", "up", "down")


@dataclass(frozen=True)
class Expert:
    """``x -> down (act(gate x) * up x)``: gate and up ``[I, H]``, down ``[H, I]``, biases ``[I]``, ``[I]``, ``[H]``.

    A *neuron* is a row of gate and up, their biases' entries, and a column of down.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def width(self) -> int:
        return int(self.gate.shape[0])

    def tensors(self) -> list[Tensor]:
        """What it consists of, in a fixed order."""
        every = (self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias)
        return [t for t in every if t is not None]

    def neurons(self, chosen: Tensor) -> Expert:
        """The expert of some neurons, or of all in another order: ``chosen`` holds their indices."""
        return Expert(
            self.gate[chosen],
            self.up[chosen],
            self.down[:, chosen],
            None if self.gate_bias is None else self.gate_bias[chosen],
            None if self.up_bias is None else self.up_bias[chosen],
            self.down_bias,
        )


def weighted_mean(experts: Sequence[Expert], weights: Sequence[float]) -> Expert:
    """``sum_i w_i W_i / sum_i w_i`` of every matrix and bias."""
    total = sum(weights)
    shares = [w / total for w in weights]

    def mean(tensors: Sequence[Tensor]) -> Tensor:
        out = tensors[0] * shares[0]
        for t, share in zip(tensors[1:], shares[1:], strict=True):
            out = out.add_(t, alpha=share)
        return out

    def biases(name: str) -> Tensor | None:
        found = [getattr(e, name) for e in experts]
        return None if found[0] is None else mean(found)

    return Expert(
        *(mean([getattr(e, m) for e in experts]) for m in MATRICES),
        *(biases(f"{m}_bias") for m in MATRICES),
    )


def expert_from(stored_in: Sequence[Stored], parts: Sequence[Tensor]) -> Expert:
    """The expert that is stored as ``parts``, one for each of a layer's ``stored`` and of its shape; at least fp32."""
    found: dict[str, Tensor] = {}
    by_name = {(s.slot.name, s.suffix): (s, p.reshape(s.shape)) for s, p in zip(stored_in, parts, strict=True)}
    for (name, suffix), (stored, part) in by_name.items():
        if suffix not in ("", "_blocks"):
            continue
        scales = by_name.get((name, "_scale_inv" if suffix == "" else "_scales"))
        for matrix, value in _split(stored.slot, _decoded(stored, part, scales[1] if scales else None)).items():
            found[matrix + ("_bias" if stored.slot.bias else "")] = value
    return Expert(**found)


def _decoded(stored: Stored, part: Tensor, scales: Tensor | None) -> Tensor:
    """A part as floats, ``[out, in]``."""
    if stored.suffix == "_blocks":
        assert scales is not None  # `moe_layers` found both
        return decode_mxfp4(part, scales)
    wide = part if part.dtype == torch.float64 else part.float()
    if scales is not None:
        wide = decode_fp8(part, scales)
    return wide if stored.slot.bias or not stored.slot.transposed else wide.T


def _split(slot: Slot, stacked: Tensor) -> dict[str, Tensor]:
    """The matrices that share a tensor, along its outputs."""
    n = len(slot.holds)
    if n == 1:
        return {slot.holds[0]: stacked}
    if slot.order is Order.INTERLEAVED:
        return {m: stacked[i::n] for i, m in enumerate(slot.holds)}
    size = stacked.shape[0] // n
    return {m: stacked[i * size : (i + 1) * size] for i, m in enumerate(slot.holds)}


def stored_as(slot: Slot, expert: Expert) -> Tensor:
    """What one slot holds of an expert, in the slot's own orientation and order."""
    parts = [getattr(expert, m + ("_bias" if slot.bias else "")) for m in slot.holds]
    if slot.order is Order.INTERLEAVED and len(parts) > 1:
        stacked = torch.stack(parts, dim=1).reshape(-1, *parts[0].shape[1:])
    else:
        stacked = torch.cat(parts) if len(parts) > 1 else parts[0]
    return stacked.T.contiguous() if slot.transposed and not slot.bias else stacked
