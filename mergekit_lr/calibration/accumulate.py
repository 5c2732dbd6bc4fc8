"""What is summed over the tokens of one mixture: for each batch in its own dictionary, folded in order.

Inputs are taken as the model computed them and widened to fp32; sums over tokens are fp64. Padding never counts.
For a token t, expert e: g its gate (0 where not chosen), w the factor of its output (g; 1 in Llama-4, whose gate is
inside the expert), y the expert's output before w, h the input of its down projection, l the router's logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_lr.calibration.probe import Routing, Visit, Watcher, expert_output
from mergekit_lr.calibration.statistics import STORED
from mergekit_lr.calibration.text import Batch
from mergekit_lr.checkpoint.dtypes import torch_dtype
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

SAMPLE_CHUNK = 64  # tokens whose outputs of all experts are held at once
MAXIMA = ("output_max_norm", "output_max_abs")
"""Entries that are folded by the larger; all others are summed."""

Sums = dict[str, Any]
"""Entry -> tensor."""


@dataclass(frozen=True)
class Wanted:
    """Which optional entries are formed: ``linear`` for every Linear, ``input`` and ``hidden`` for mixtures."""

    linear: bool = False
    input: bool = False
    hidden: bool = False


def fold(total: Sums, part: Sums) -> None:
    """Add one batch's sums to the total, in place; Grams come in fp32 and are totalled in fp64."""
    for name, value in part.items():
        if name not in total:
            total[name] = value.double() if value.is_floating_point() else value.clone()
        elif name.rpartition(".")[2] in MAXIMA:
            torch.maximum(total[name], value, out=total[name])
        else:
            total[name] += value


class MixtureSums(Watcher):
    """Sums of one mixture over one batch."""

    def __init__(self, experts: Any, batch: Batch, sample: Tensor, wanted: Wanted, device: torch.device) -> None:
        self.experts, self.wanted = experts, wanted
        self.valid = batch.valid.to(device)
        self.sample = sample.to(device)
        self.sums: Sums = {}

    def routed(self, routing: Routing) -> None:
        valid = self.valid
        logits, indices = routing.logits[valid].double(), routing.indices[valid]
        count, experts = logits.shape
        softmax = logits.softmax(dim=-1)
        chosen = torch.zeros_like(logits).scatter_(1, indices, 1.0)
        gates = torch.zeros_like(logits).scatter_(1, indices, routing.weights[valid].double())
        width = routing.inputs.shape[-1]
        zeros = torch.zeros(experts, dtype=torch.float64, device=logits.device)
        self.sums |= {
            "tokens": torch.tensor([count]),
            "routing_count": chosen.sum(0).long(),
            "coselection": (chosen.T @ chosen).long(),
            "gate_sum": gates.sum(0),
            "gate_gram": gates.T @ gates,
            "gate_mass": softmax.sum(0),
            "router_gram": logits.T @ logits,
            "router_softmax_gram": softmax.T @ softmax,
            **{name: zeros.clone() for name in _NORMS},
            "output_sum": torch.zeros(experts, width, dtype=torch.float64, device=logits.device),
        }
        if self.wanted.input:
            inputs = routing.inputs[valid].float()
            self.sums["input_gram"] = inputs.T @ inputs
        if len(self.sample):
            self.sums |= all_experts(self.experts, routing.inputs[self.sample], experts)

    def visited(self, visit: Visit) -> None:
        keep = self.valid[visit.tokens]
        if not bool(keep.any()):
            return
        outputs, factors, e = visit.outputs[keep].float(), visit.factors[keep].double(), visit.expert
        norms = outputs.norm(dim=-1).double()
        gated = factors * norms
        self.sums["output_norm_sum"][e] = norms.sum()
        self.sums["output_square_sum"][e] = (norms * norms).sum()
        self.sums["gated_norm_sum"][e] = gated.sum()
        self.sums["gated_square_sum"][e] = (gated * gated).sum()
        self.sums["output_max_norm"][e] = norms.max()
        self.sums["output_max_abs"][e] = outputs.abs().max()
        self.sums["output_sum"][e] = outputs.double().sum(0)
        if self.wanted.hidden and visit.hidden is not None:
            scaled = visit.hidden[keep].float() * visit.factors[keep].float()[:, None]
            if "hidden_gram" not in self.sums:
                width = scaled.shape[1]
                self.sums["hidden_gram"] = scaled.new_zeros(len(self.sums["gate_sum"]), width, width)
            self.sums["hidden_gram"][e] = scaled.T @ scaled


_NORMS = (
    "output_norm_sum",
    "output_square_sum",
    "gated_norm_sum",
    "gated_square_sum",
    "output_max_norm",
    "output_max_abs",
)


def all_experts(experts: Any, inputs: Tensor, count: int) -> Sums:
    """Grams and sums of the outputs of *all* experts on ``[S, H]`` tokens, routed to them or not."""
    gram = torch.zeros(count, count, dtype=torch.float64, device=inputs.device)
    cosine, total = gram.clone(), torch.zeros(count, inputs.shape[1], dtype=torch.float64, device=inputs.device)
    for chunk in torch.split(inputs, SAMPLE_CHUNK):
        outputs = torch.stack([expert_output(experts, chunk, e) for e in range(count)]).double()
        total += outputs.sum(1)
        flat = outputs.flatten(1)
        gram += flat @ flat.T
        outputs /= outputs.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        cosine += flat @ flat.T  # flat is a view: the outputs are unit vectors now
    return {
        "expert_tokens": torch.tensor([len(inputs)]),
        "expert_gram": gram,
        "expert_cosine_gram": cosine,
        "expert_output_sum": total,
    }


class LinearSums:
    """Input Grams of the Linear modules of one layer over one batch; those that share an input share its Gram."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self.valid = batch.valid.to(device)
        self.sums: Sums = {}
        self._seen: list[tuple[Tensor, Tensor]] = []

    def called(self, name: str, inputs: Tensor) -> None:
        """A Linear runs on ``[..., in]``."""
        gram = next((g for x, g in self._seen if x is inputs), None)
        if gram is None:
            rows = inputs.reshape(-1, inputs.shape[-1])[self.valid].float()
            gram = rows.T @ rows
            self._seen.append((inputs, gram))
        self.sums[f"{name}.gram"] = gram
        self.sums[f"{name}.gram_tokens"] = torch.tensor([int(self.valid.sum())])


def linear_modules(layer: nn.Module) -> dict[str, nn.Module]:
    """Every Linear of a layer by its name in memory."""
    return {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}


class LayerWatcher(Watcher):
    """Everything that is summed over one layer and one batch."""

    def __init__(self, mixture: MixtureSums | None, linear: LinearSums | None) -> None:
        self.mixture, self.linear = mixture, linear

    def routed(self, routing: Any) -> None:
        if self.mixture is not None:
            self.mixture.routed(routing)

    def visited(self, visit: Any) -> None:
        if self.mixture is not None:
            self.mixture.visited(visit)

    def called(self, name: str, inputs: Tensor) -> None:
        if self.linear is not None:
            self.linear.called(name, inputs)


def as_stored(sums: Sums) -> dict[str, Tensor]:
    """Sums on the CPU, in the dtypes of the file; Grams made symmetric to the bit."""
    stored = {}
    for name, value in sums.items():
        last = name.rpartition(".")[2]
        if last.endswith("gram"):
            value = (value + value.mT) / 2
        stored[name] = value.cpu().to(torch_dtype(STORED[last])).contiguous()
    return stored
