"""Gates of a mixture that is built from dense models: what the base computes on prompts that each expert is for.

For expert e with positive prompts P and negative ones N, and layer l:

    h(p)   = what enters layer l at the last token of prompt p, or its mean over the prompt's tokens,
             or the sum of the prompt's embeddings (the same for every layer)
    v      = mean of h over P                       (for embeddings: their sum, at unit length)
    v      = v - the same over N                    if there are negative prompts
    gate_e = v / |v|

``[H]``, fp32. Prompts are cut by the base's own tokenizer with its first token before them, if it has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mergekit_lr.calibration.network import Network
from mergekit_lr.calibration.probe import Watcher
from mergekit_lr.calibration.states import MemoryStates
from mergekit_lr.calibration.stream import Stream, exhaust
from mergekit_lr.calibration.text import Windows, load_tokenizer, tokenise
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError
from mergekit_lr.experts.mixtures import GateMode, Prompts
from mergekit_lr.lazy import torch
from mergekit_lr.linalg import symmetric_eigh

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lr.rewrite import Preparation

DEGENERATE = 5.0
"""Condition number of a layer's gates above which experts are hard to tell apart, as mergekit warns."""


def random_gate(key: int, shape: tuple[int, int], *, uniform: bool) -> Tensor:
    """Normal entries, or uniform ones in ``+- 1 / sqrt(H)`` as a Linear begins with; fp32 ``[E, H]``, by ``key``."""
    generator = np.random.Generator(np.random.Philox(key=key))
    values = generator.random(shape) * 2 - 1 if uniform else generator.standard_normal(shape)
    return torch.from_numpy((values / (shape[1] ** 0.5 if uniform else 1.0)).astype(np.float32))


def gates_from_prompts(
    work: Preparation, base: Checkpoint, experts: Sequence[Prompts], mode: GateMode
) -> dict[int, Tensor]:
    """Gates ``[E, H]`` fp32 for every layer.

    Raises:
        CheckpointError: the base has no tokenizer or cannot be run; a prompt has no token.
        ResourceError: one layer and its tokens do not fit the budget.
    """
    tokenizer = load_tokenizer(base.folder, base.reference)
    texts = list(dict.fromkeys(p for pair in experts for side in pair for p in side))
    first = tokenizer.bos_token or ""
    ids = [tokenise(tokenizer, first + t) for t in texts]
    empty = next((t for t, i in zip(texts, ids, strict=True) if not len(i)), None)
    if empty is not None:
        raise CheckpointError(f"the prompt {empty!r} has no token", where=base.reference, fix="write a longer one")
    longest = max(len(i) for i in ids)
    windows = Windows(tuple(ids), (0,) * len(ids), (False,) * len(ids), longest, 0)
    network = Network(base, torch.float32, work.device)
    if mode == "cheap_embed":
        sums = {t: network.embed(i[None])[0].cpu().sum(0) for t, i in zip(texts, ids, strict=True)}
        one = torch.stack([_gate(sums, pair, total=True) for pair in experts])
        return dict.fromkeys(range(len(network.layers)), one)
    return _hidden(work, network, windows, texts, experts, mode)


def _hidden(
    work: Preparation,
    network: Network,
    windows: Windows,
    texts: list[str],
    experts: Sequence[Prompts],
    mode: GateMode,
) -> dict[int, Tensor]:
    stream = Stream(network, windows, limit=work.limit)
    stream = Stream(network, windows, limit=work.limit, reserved=2 * stream.state_bytes)
    states = MemoryStates(stream.batches)
    found: dict[int, Tensor] = {}
    stream.embed(states)
    for index in range(len(network.layers)):
        work.tell(index, len(network.layers), f"gates of layer {index + 1}")
        seen = [v for b in stream.batches for v in _of_prompts(states.read(b.number), b.lengths, mode)]
        sums = dict(zip(texts, seen, strict=True))
        found[index] = torch.stack([_gate(sums, pair, total=False) for pair in experts])
        if index + 1 < len(network.layers):
            with network.filled(index) as layer:
                exhaust(stream.run(index, layer, states, lambda b: Watcher()))
            states.finish()
            states.advance()
    states.close()
    return found


def _of_prompts(hidden: Tensor, lengths: Sequence[int], mode: GateMode) -> list[Tensor]:
    """One vector for each prompt of a batch ``[B, L, H]``; what pads a prompt is no part of it."""
    rows = [h[:n].float().cpu() for h, n in zip(hidden, lengths, strict=True)]
    return [r.mean(0) if mode == "hidden_avg" else r[-1] for r in rows]


def _gate(vectors: Mapping[str, Tensor], prompts: Prompts, *, total: bool) -> Tensor:
    sides = []
    for side in prompts:
        if side:
            stacked = torch.stack([vectors[p] for p in side]).double()
            sides.append(_unit(stacked.sum(0)) if total else stacked.mean(0))
    return _unit(sides[0] - sides[1] if len(sides) > 1 else sides[0]).float()


def _unit(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x)
    return x / length.clamp(min=1e-8)


def degenerate(gates: Mapping[int, Tensor]) -> list[int]:
    """Layers whose gates are nearly dependent: the condition number of ``[E, H]`` is above `DEGENERATE`."""
    found = []
    for layer, gate in sorted(gates.items()):
        wide = gate.double()
        values, _ = symmetric_eigh(wide @ wide.T)
        if values[-1] <= 0 or float((values[0] / values[-1]).sqrt()) > DEGENERATE:
            found.append(layer)
    return found
