"""Permutations learnt from the loss half-way between two models, by the straight-through estimator.

Source: Ainsworth, Hayase, Srinivasa, "Git Re-Basin", arXiv 2209.04836, section 3.3. A latent model Z, at first A, is
projected on the symmetry group by weight matching,

    pi = argmax over members of  sum_T <Z_T, pi(B)_T>

the loss is taken at ``(A + pi(B)) / 2``, and its gradient there moves Z as if Z were ``pi(B)``. So the first projection
is what weight matching finds, and it is kept unless another one has a lower loss on all samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergekit_lr.arch.symmetry import SymmetrySpec
from mergekit_lr.errors import CheckpointError
from mergekit_lr.linalg.assignment import one_thread
from mergekit_lr.matching.ascent import Tell, match_weights
from mergekit_lr.matching.member import Member, apply_all
from mergekit_lr.matching.running import Samples, batch_loss, chunks, mean_loss

SWEEPS = 2
"""Passes over the groups in each projection; it starts where the last one ended."""


@dataclass(frozen=True)
class Learned:
    """``start`` and ``loss``: half-way loss over all samples before and after; ``step``: at which it was found;
    ``tried``: how many different members were measured."""

    member: Member
    start: float
    loss: float
    step: int
    tried: int


def learn(
    spec: SymmetrySpec,
    network: nn.Module,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    samples: Samples,
    start: Member,
    *,
    steps: int = 100,
    rate: float = 1e-3,
    seed: int = 0,
    only: Sequence[str] = (),
    tell: Tell | None = None,
) -> Learned:
    """Improve ``start``, the member that weight matching found for ``b``. ``network`` computes what ``a`` means.

    Each step takes one batch, in an order drawn from ``seed``, and moves Z by Adam with step size ``rate``. Holds
    about seven models. The same result for the same seed, on any number of threads.

    Raises:
        CheckpointError: the network's parameters do not have the names of the tensors.
    """
    own = {n for n, t in network.state_dict().items() if t.is_floating_point()}
    names = [n for n, t in a.items() if t.is_floating_point() and n in spec.of_tensor]
    lacking = sorted(n for n in names if n not in own)
    if lacking:
        raise CheckpointError(
            "its permutations cannot be learnt", why=f"the running network calls {lacking[0]} by another name"
        )
    first = {n: a[n].float() for n in names}
    latent = {n: x.clone() for n, x in first.items()}
    free = [n for n in names if spec.of_tensor[n][0].groups()]
    adam = torch.optim.Adam([latent[n] for n in free], lr=rate)
    random = np.random.Generator(np.random.PCG64([seed, steps]))
    member, known, start_loss = start, {}, 0.0
    best: tuple[float, int, Member] | None = None
    with one_thread():
        for step in range(steps + 1):
            moved = {n: x.float() for n, x in apply_all(spec, member, b, names).items()}
            middle = {n: (first[n] + moved[n]) / 2 for n in names}
            key = _key(member)
            if key not in known:
                known[key] = _loss(network, middle, samples)
                if best is None or known[key] < best[0]:
                    best = known[key], step, member
            if step == 0:
                start_loss = known[key]
            if step == steps:
                break
            _step(network, middle, latent, free, samples, int(random.integers(len(samples.batches))), adam)
            if tell is not None:
                tell(step + 1, steps, "learning permutations")
            member = match_weights(
                spec, latent.__getitem__, b.__getitem__, seed=seed, only=only, max_sweeps=SWEEPS, start=member
            ).member
    assert best is not None
    return Learned(best[2], start_loss, best[0], best[1], len(known))


def _step(
    network: nn.Module,
    middle: Mapping[str, Tensor],
    latent: Mapping[str, Tensor],
    free: Sequence[str],
    samples: Samples,
    batch: int,
    adam: torch.optim.Optimizer,
) -> None:
    """Move the latent model against the gradient at ``middle``, which reaches it halved."""
    leaves = {n: x.requires_grad_(n in latent) for n, x in middle.items()}
    for inputs, labels in chunks(samples, [batch]):
        arguments = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
        out = functional_call(network, leaves, *arguments)
        batch_loss(out if isinstance(out, Tensor) else out.logits, labels).backward()  # type: ignore[no-untyped-call]
    for n in free:
        gradient = leaves[n].grad
        latent[n].grad = torch.zeros_like(latent[n]) if gradient is None else gradient / 2
    adam.step()


def _loss(network: nn.Module, tensors: Mapping[str, Tensor], samples: Samples) -> float:
    class Called(nn.Module):
        def forward(self, *inputs: Tensor, **more: Tensor) -> object:
            return functional_call(network, dict(tensors), inputs, more)

    return mean_loss(Called(), samples)


def _key(member: Member) -> bytes:
    parts = [*sorted(member.permutations.items()), *sorted(member.signs.items())]
    return b"".join(t.contiguous().numpy().tobytes() for _, t in parts)
