"""Layer by layer with the tokens at hand, for methods that fit experts to what a layer really sees.

windows = windows_for(checkpoint, ["a.txt"], samples=128, sequence_length=512, seed=0)
for layer in stream_layers(checkpoint, windows):
    fit, judge = ~layer.held_out, layer.held_out
    ...                      # layer.inputs[fit], layer.weights[fit], layer.hidden(x, e), layer.output(x, e)
    layer.replace(function)  # optional: later layers then see what the compressed layer gives
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.arch.experts import experts_prefix
from mergekit_lr.calibration.network import Network
from mergekit_lr.calibration.probe import Replacement, Routing, Watcher, expert_output, hidden_of
from mergekit_lr.calibration.states import DiskStates, MemoryStates, States
from mergekit_lr.calibration.stream import Stream, exhaust
from mergekit_lr.calibration.text import Batch, Windows, load_tokenizer, read_windows
from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.engine.memory import default_limit
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Layer:
    """One mixture with the tokens that reach it; ``N`` tokens in the order of the windows, padding left out.

    ``index`` of the decoder layer; ``name`` (``model.layers.3``); ``prefix`` of its statistics
    (``model.layers.3.mlp.experts``); ``block``: the mixture's module with its weights, as transformers holds it
    (``block.experts.gate_up_proj``), valid until the next layer is asked for. ``inputs`` ``[N, H]`` in the compute
    dtype; ``logits`` ``[N, E]``, ``indices`` ``[N, k]`` and ``weights`` ``[N, k]`` as the router gave them;
    ``held_out`` bool ``[N]``: tokens of the windows to judge on, every second window of a text.
    """

    index: int
    name: str
    prefix: str
    block: Any
    inputs: Tensor
    logits: Tensor
    indices: Tensor
    weights: Tensor
    held_out: Tensor
    _replacement: Replacement | None = field(default=None, repr=False)

    @property
    def experts(self) -> int:
        """Number of experts."""
        return int(self.logits.shape[1])

    @property
    def gates(self) -> Tensor:
        """``[N, E]``: the weights at their experts' places, 0 elsewhere."""
        return torch.zeros_like(self.logits, dtype=self.weights.dtype).scatter_(1, self.indices, self.weights)

    def output(self, inputs: Tensor, expert: int) -> Tensor:
        """One expert's output before its gate on ``[n, H]`` tokens."""
        return expert_output(self.block.experts, inputs, expert)

    def hidden(self, inputs: Tensor, expert: int) -> Tensor:
        """What one expert feeds its down projection on ``[n, H]`` tokens: ``[n, I]``."""
        return hidden_of(self.block.experts, inputs, expert)

    def replace(self, function: Replacement) -> None:
        """Let ``function`` stand for the routed experts from here on, so that later layers see its output.

        It gets a `Routing` of one batch (padding included, all rows count) and returns the sum of gated outputs
        ``[T, H]`` in the dtype of the inputs. Shared experts and residuals stay. It may run in several threads.
        """
        self._replacement = function


class _Tokens(Watcher):
    def __init__(self, batch: Batch) -> None:
        self.valid = batch.valid
        self.routing: Routing | None = None

    def routed(self, routing: Routing) -> None:
        keep = self.valid.to(routing.inputs.device)
        parts = (routing.inputs, routing.logits, routing.indices, routing.weights)
        self.routing = Routing(*(p[keep] for p in parts))


def windows_for(
    checkpoint: Checkpoint, text: Sequence[str | Path], *, samples: int, sequence_length: int, seed: int
) -> Windows:
    """Windows of text, cut by the model's own tokenizer; see `mergekit_lr.calibration.text.cut_windows`."""
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.reference)
    return read_windows(tokenizer, text, samples=samples, sequence_length=sequence_length, seed=seed)


def stream_layers(
    checkpoint: Checkpoint,
    windows: Windows,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    limit: int | None = None,
    folder: Path | None = None,
) -> Iterator[Layer]:
    """Every mixture of a model in turn, with the tokens that reach it; one layer in memory at a time.

    ``dtype`` is float32 unless given; ``limit`` bytes for one layer, its tokens, the batches in work and the hidden
    states, which are kept in ``folder`` if they do not fit (an empty folder of the caller's).

    Raises:
        CheckpointError: the model cannot be run, or is dense.
        ResourceError: the limit is too small.
        NonFiniteError: activations are not finite; the message names the layer.
    """
    network = Network(checkpoint, dtype or torch.float32, device)
    if not network.mixtures or network.family is None:
        raise CheckpointError("the model is dense: it has no mixture of experts", where=checkpoint.reference)
    limit = limit or default_limit()
    stream = Stream(network, windows, limit=limit)
    in_memory = 4 * stream.state_bytes <= limit or folder is None
    # A layer's tokens are held whole; the hidden states before and after it too where they stay in memory.
    held = stream.state_bytes * (3 if in_memory else 1)
    stream = Stream(network, windows, limit=limit, reserved=held)
    states: States = MemoryStates(stream.batches)
    if not in_memory and folder is not None:
        fs.make_folder(folder)
        states = DiskStates(folder, stream.batches, network.config.hidden_size, network.dtype, -1)
    try:
        stream.embed(states)
        for index in range(len(network.layers)):
            with network.filled(index) as module:
                block = network.mixture(module)
                tokens = list(stream.run(index, module, states, _Tokens))
                states.finish()
                if block is not None:
                    layer = _layer(network, index, block, stream.batches, tokens)
                    del tokens
                    yield layer
                    if layer._replacement is not None:
                        exhaust(stream.run(index, module, states, lambda b: Watcher(), layer._replacement))
                        states.finish()
                    del layer
                states.advance()
    finally:
        states.close()


def _layer(network: Network, index: int, block: Any, batches: Sequence[Batch], tokens: list[_Tokens]) -> Layer:
    assert network.family is not None
    seen = [t.routing for t in tokens if t.routing is not None]
    return Layer(
        index,
        network.layer_name(index),
        experts_prefix(network.family, network.layer_name(index)),
        block,
        torch.cat([r.inputs for r in seen]),
        torch.cat([r.logits for r in seen]),
        torch.cat([r.indices for r in seen]),
        torch.cat([r.weights for r in seen]),
        torch.cat([b.held[b.valid] for b in batches]).to(network.device),
    )
