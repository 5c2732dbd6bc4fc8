"""One look at a model, layer by layer, that fits reduced layers and says what they cost.

Two sets of hidden states go through the layers side by side: those of the original model, which give each layer its
inputs and its target, and those of the reduced model, which at the end give held-out loss and KL against the
original. One layer is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.arch.moe import MoeLayer, moe_layers
from mergekit_lr.calibration.network import Network
from mergekit_lr.calibration.probe import Routing as Seen
from mergekit_lr.calibration.probe import Watcher
from mergekit_lr.calibration.states import DiskStates, MemoryStates, States
from mergekit_lr.calibration.stream import Stream, exhaust, one_thread
from mergekit_lr.calibration.text import Batch, Windows
from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError
from mergekit_lr.experts.bank import Activation, ExpertBank, Routing, layer_output
from mergekit_lr.experts.heldout import Losses, compare
from mergekit_lr.experts.problem import Fit, Problem, Reduced
from mergekit_lr.experts.refitted import LayerFiles
from mergekit_lr.experts.rerouting import Rerouter
from mergekit_lr.experts.storage import expert_from
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class _Inputs(Watcher):
    def __init__(self, batch: Batch) -> None:
        self.valid, self.seen = batch.valid, None

    def routed(self, routing: Seen) -> None:
        keep = self.valid.to(routing.inputs.device)
        self.seen = (routing.inputs[keep].float(), routing.indices[keep], routing.weights[keep].float())  # type: ignore[assignment]


def activation_of(experts: Any) -> Activation:
    """The activation of a family's experts on separate gate and up: its own code on its own layout."""
    if not getattr(experts, "has_gate", True):
        raise CheckpointError("experts without a gate cannot be refitted", where=type(experts).__name__)

    def apply(gate: Tensor, up: Tensor) -> Tensor:
        both = torch.stack((gate, up), dim=-1).flatten(-2) if not experts.is_concatenated else torch.cat((gate, up), -1)
        hidden: Tensor = experts._apply_gate(both)
        return hidden

    return apply


def bank_of(checkpoint: Checkpoint, layer: MoeLayer, activation: Activation) -> ExpertBank:
    """The experts of a layer in fp32, from the checkpoint."""

    def part(slab: Any) -> Tensor:
        return checkpoint.read(slab.tensor, slab.start, slab.stop).reshape(slab.shape)

    experts = [expert_from(layer.stored, [part(s) for s in layer.slabs(e)]) for e in range(layer.experts)]
    return ExpertBank.of(experts, activation)


class Reduction:
    """The pass over one model.

    ``folder``: where hidden states go that do not fit ``limit`` bytes.
    """

    def __init__(self, checkpoint: Checkpoint, windows: Windows, *, device: str, limit: int, folder: Path) -> None:
        self.checkpoint, self.windows = checkpoint, windows
        self.network = Network(checkpoint, torch.float32, device)
        if not self.network.mixtures or self.network.family is None:
            raise CheckpointError("the model is dense: it has no mixture of experts", where=checkpoint.reference)
        if "llama4_text" in self.network.family.model_types:
            raise CheckpointError(
                "the experts of Llama-4 cannot be refitted", where=checkpoint.reference,
                why="its gates scale what goes into an expert, so its output is not linear in them",
                fix="use a pruning method with refit: none",
            )  # fmt: skip
        self.layers = {layer.index: layer for layer in moe_layers(checkpoint) if not layer.extra}
        stream = Stream(self.network, windows, limit=limit)
        self._on_disk = 6 * stream.state_bytes > limit
        held = stream.state_bytes * (2 if self._on_disk else 6)
        self.stream = Stream(self.network, windows, limit=limit, reserved=held)
        self.folder = folder

    def run(
        self,
        fit: Fit,
        files: LayerFiles,
        names: list[str],
    ) -> Iterator[tuple[MoeLayer, Reduced] | Losses]:
        """Every reduced layer in turn, and last what the reduction costs; ``names`` are the texts' names.

        Layers that ``files`` has are read from there, others are fitted and written.
        """
        with ExitStack() as stack:
            first, second = (self._states(stack, n) for n in ("original", "reduced"))
            self.stream.embed(first)
            self.stream.embed(second)
            for index in range(len(self.network.layers)):
                with self.network.filled(index) as module:
                    block = self.network.mixture(module)
                    seen = list(self.stream.run(index, module, first, _Inputs))
                    first.finish()
                    reduced, replacement = None, None
                    if block is not None:
                        layer = self.layers[index]
                        route = Rerouter(block, self._router(), layer.experts)
                        if files.said(layer) is None:
                            with torch.no_grad(), one_thread():
                                problem = self._problem(layer, block, seen, route)
                                files.save(layer, with_error(fit(problem), problem))
                            del problem
                        reduced = files.load(layer, activation_of(block.experts))
                        assert reduced is not None  # just written, cast to the output's dtype
                        replacement = _replacement(reduced, route)
                    del seen
                    exhaust(self.stream.run(index, module, second, lambda b: Watcher(), replacement))
                    second.finish()
                first.advance()
                second.advance()
                if reduced is not None:
                    yield layer, reduced
            yield compare(self.network, self.windows, self.stream.batches, first, second, names)

    def _router(self) -> str:
        family = self.network.family
        assert family is not None and family.memory is not None
        return family.memory.router

    def _states(self, stack: ExitStack, name: str) -> States:
        states: States = MemoryStates(self.stream.batches)
        if self._on_disk:
            folder = self.folder / name
            fs.make_folder(folder)
            size = self.network.config.hidden_size
            states = DiskStates(folder, self.stream.batches, size, self.network.dtype, -1)
        stack.callback(states.close)
        return states

    def _problem(self, layer: MoeLayer, block: Any, seen: list[Any], route: Rerouter) -> Problem:
        inputs, indices, weights = (torch.cat(p) for p in zip(*(w.seen for w in seen), strict=True))
        bank = bank_of(self.checkpoint, layer, activation_of(block.experts))
        routing = Routing(indices, weights)
        held = torch.cat([b.held[b.valid] for b in self.stream.batches])
        with torch.inference_mode():
            target = layer_output(bank, inputs, routing)
        clean = (t.clone() for t in (inputs, target))  # made under inference mode, which gradients refuse
        inputs, target = clean
        routing = Routing(indices.clone(), weights.clone())
        return Problem(layer, bank, inputs, routing, target, held, route)


def with_error(reduced: Reduced, problem: Problem) -> Reduced:
    """The same layer, with its error on held-out tokens among the notes."""
    return replace(reduced, notes={**reduced.notes, "error": round(problem.error(reduced), 6)})


def _replacement(reduced: Reduced, route: Rerouter) -> Callable[[Seen], Tensor]:
    def replaced(seen: Seen) -> Tensor:
        inputs = seen.inputs.float()
        routing = Routing(seen.indices, seen.weights.float())
        if reduced.kept is not None or reduced.rows is not None or reduced.names is not None:
            routing = reduced.routing(route, inputs)
        return layer_output(reduced.bank, inputs, routing).to(seen.inputs.dtype)

    return replaced
