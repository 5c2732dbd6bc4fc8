"""One expert function for all mixtures of transformers 5, which sees what every expert is given and gives.

transformers dispatches the experts of a layer through `ALL_EXPERTS_FUNCTIONS`; `PROBE` is registered there and does
what the model's own loop over experts does, in the same order, so the layer's output is the same to the bit.
Indices and weights come from the router module itself, so sigmoid scores, correction biases, expert groups and sparse
mixers need no code here. Llama-4 has no such dispatch and multiplies an expert's *input* by its gate: its mixture is
watched through its own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import local
from typing import TYPE_CHECKING, Any

from mergekit_lr.arch.moe_families import Family
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

PROBE = "mergekit_lr_probe"


@dataclass(frozen=True)
class Visit:
    """What one expert did in one batch.

    ``tokens`` int64 ``[n]``: rows of the batch's flattened hidden states; ``gates`` ``[n]``: the router's weights;
    ``factors`` ``[n]``: what the outputs are multiplied by (the gates; 1 where the gate is inside the expert, as in
    Llama-4); ``hidden`` ``[n, I]``: input of the down projection (None for Llama-4); ``outputs`` ``[n, H]``: before
    the factor.
    """

    expert: int
    tokens: Tensor
    gates: Tensor
    factors: Tensor
    hidden: Tensor | None
    outputs: Tensor


@dataclass(frozen=True)
class Routing:
    """What the router of one layer said of one batch: ``[T, H]`` in, ``[T, E]`` logits, ``[T, k]`` choice, weights."""

    inputs: Tensor
    logits: Tensor
    indices: Tensor
    weights: Tensor


class Watcher:
    """Told about one batch of one layer; subclasses override what they want to know. Never changes the output."""

    def routed(self, routing: Routing) -> None:
        """Called once, before the experts run."""

    def visited(self, visit: Visit) -> None:
        """Called for each expert that some token is routed to, in ascending order."""


Replacement = Callable[[Any], Any]
"""From a `Routing` to the output of the routed experts ``[T, H]``, gates applied, in the dtype of the inputs."""


class _Scene(local):
    """Who watches, and what the router said last: one for each thread, for threads run batches side by side."""

    watcher: Watcher | None = None
    replacement: Replacement | None = None
    logits: Any = None


_scene = _Scene()


@contextmanager
def watching(watcher: Watcher | None, replacement: Replacement | None = None) -> Iterator[None]:
    """In this thread, tell ``watcher`` of every mixture that runs; let ``replacement`` do the experts' work."""
    _scene.watcher, _scene.replacement = watcher, replacement
    try:
        yield
    finally:
        _scene.watcher = _scene.replacement = _scene.logits = None


def current_watcher() -> Watcher | None:
    """Who watches in this thread."""
    return _scene.watcher


def install(model: Any, family: Family | None, mixtures: list[nn.Module]) -> None:
    """Let the probe run the experts of a model, and listen to its routers."""
    if family is None or family.memory is None:
        return
    if "llama4_text" in family.model_types:
        for block in mixtures:
            block.forward = _llama4_forward.__get__(block)
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(PROBE, routed_forward)
    model.set_experts_implementation(PROBE)
    for block in mixtures:
        getattr(block, family.memory.router).register_forward_hook(_note_logits)


def _note_logits(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
    _scene.logits = output[0]


def hidden_of(experts: Any, inputs: Tensor, expert: int) -> Tensor:
    """What one expert feeds its down projection: ``[n, H]`` -> ``[n, I]``."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    weight = getattr(experts, name)[expert]
    out = inputs @ weight if experts.is_transposed else torch.nn.functional.linear(inputs, weight)
    if experts.has_bias:
        out = out + getattr(experts, f"{name}_bias")[expert]
    hidden: Tensor = experts._apply_gate(out) if experts.has_gate else experts.act_fn(out)
    return hidden


def output_of(experts: Any, hidden: Tensor, expert: int) -> Tensor:
    """The output of one expert before its gate: ``[n, I]`` -> ``[n, H]``."""
    weight = experts.down_proj[expert]
    out = hidden @ weight if experts.is_transposed else torch.nn.functional.linear(hidden, weight)
    return out + experts.down_proj_bias[expert] if experts.has_bias else out


def expert_output(experts: Any, inputs: Tensor, expert: int) -> Tensor:
    """One expert of a mixture in memory on any tokens, ungated: ``[n, H]`` -> ``[n, H]``."""
    if hasattr(experts, "has_gate"):
        return output_of(experts, hidden_of(experts, inputs, expert), expert)
    gate, up = (inputs @ experts.gate_up_proj[expert]).chunk(2, dim=-1)  # Llama-4
    out: Tensor = (up * experts.act_fn(gate)) @ experts.down_proj[expert]
    return out


def routed_forward(experts: Any, inputs: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The experts of one layer on ``[T, H]``, chosen by ``[T, k]`` indices and weights: sum of gated outputs."""
    routing = Routing(inputs, _scene.logits, indices, weights)
    if _scene.watcher is not None:
        _scene.watcher.routed(routing)
    if _scene.replacement is not None:
        replaced: Tensor = _scene.replacement(routing)
        return replaced
    out = torch.zeros_like(inputs)
    for expert, places, tokens in by_expert(indices, experts.num_experts):
        gates = weights[tokens, places]
        hidden = hidden_of(experts, inputs[tokens], expert)
        outputs = output_of(experts, hidden, expert)
        if _scene.watcher is not None:
            _scene.watcher.visited(Visit(expert, tokens, gates, gates, hidden, outputs))
        out.index_add_(0, tokens, (outputs * gates[:, None]).to(out.dtype))
    return out


def by_expert(indices: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, places in its tokens' top k, tokens) of every expert that is chosen: by place, then by token."""
    count = len(indices)
    flat = indices.t().reshape(-1)
    order = torch.argsort(flat, stable=True)
    ends = torch.cumsum(torch.bincount(flat, minlength=experts), 0).tolist()
    start = 0
    for expert, end in enumerate(ends[:experts]):
        if end > start:
            chosen = order[start:end]
            yield expert, torch.div(chosen, count, rounding_mode="floor"), chosen % count
        start = end


def _llama4_forward(block: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """The mixture of Llama-4: all experts on all tokens, inputs scaled by the sigmoid of the logit, 0 if not chosen."""
    inputs = hidden_states.reshape(-1, block.hidden_dim)
    scores, logits = block.router(inputs)
    indices = torch.topk(logits, block.top_k, dim=1).indices
    routing = Routing(inputs, logits, indices, scores.gather(1, indices))
    watcher = _scene.watcher
    if watcher is not None:
        watcher.routed(routing)
    out: Tensor = block.shared_expert(inputs)
    if _scene.replacement is not None:
        return out + _scene.replacement(routing), logits
    count = scores.shape[1]
    scaled = inputs.repeat(count, 1) * scores.transpose(0, 1).reshape(-1, 1)
    routed = block.experts(scaled).reshape(count, *inputs.shape)
    if watcher is not None:
        for expert, places, tokens in by_expert(indices, count):
            gates = routing.weights[tokens, places]
            watcher.visited(Visit(expert, tokens, gates, torch.ones_like(gates), None, routed[expert, tokens]))
    out.add_(routed.sum(dim=0))
    return out, logits
